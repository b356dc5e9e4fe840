"""Queries, keys and values that one layer computes side by side, and how to compute some alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.hosts._adapter import Part

QKV_COLUMNS: dict[Part, slice] = {
    "qkv": slice(0, 3),
    "qk": slice(0, 2),
    "kv": slice(1, 3),
    "q": slice(0, 1),
    "v": slice(2, 3),
}


def linear_columns(layer: Any, y: Tensor, start: int, stop: int) -> Tensor:
    """Computes columns `start` to `stop` of a linear layer; only a plain one skips the others."""
    if type(layer) is not nn.Linear:  # quantized, or with a low-rank update
        some: Tensor = layer(y)[..., start:stop]
        return some
    bias = None if layer.bias is None else layer.bias[start:stop]
    return F.linear(y, layer.weight[start:stop], bias)
