"""Multiply-adds of a running model, by torch's own counter: the check on counts from shapes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, images: Tensor) -> int:
    """What torch counts while `model` answers for `images`, in multiply-adds an image.

    The counter knows products of matrices, and not every fused operation that torch may run in
    their place. So attention is computed unfused, that of `nn.MultiheadAttention`, too. The model
    is copied without gradients: the counter cannot follow weights that require gradients where
    gradients are switched off.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        _without_fast_path(),
        FlopCounterMode(display=False) as counter,
    ):
        model(images)
    return int(counter.get_total_flops()) // 2 // images.shape[0]


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keeps `nn.MultiheadAttention` from running as one operation that the counter cannot see."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
