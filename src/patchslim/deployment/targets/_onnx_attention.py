"""How attention is spelled for ONNX Runtime: as one node, which opset 23 has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# PyTorch writes for this opset itself since 2.9. Before, it wrote for 18 and translated the result.
NEW_TORCH, NEW_OPSET, OLD_OPSET = (2, 9), 23, 18


def choose_opset() -> int:
    """The opset that this PyTorch writes best."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return NEW_OPSET if version >= NEW_TORCH else OLD_OPSET


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the exporter is to write for operators of PyTorch, where not what it has itself."""
    if opset < NEW_OPSET:
        return {}
    return {torch.ops.aten.scaled_dot_product_attention.default: _attend}


def _attend(  # noqa: PLR0913 (the arguments of PyTorch's operator)
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: FBT001, FBT002
) -> Any:
    """One node, with a mask for each query: ONNX Runtime refuses one that all of them share."""
    from onnxscript import opset23 as op

    del dropout_p, enable_gqa  # a model that is exported drops nothing, and the node sees heads
    if attn_mask is not None and attn_mask.shape[-2] == 1:
        shape = [1] * (len(attn_mask.shape) - 2) + [int(query.shape[-2]), 1]
        attn_mask = op.Expand(attn_mask, op.Constant(value_ints=shape))
    attended, *_ = op.Attention(
        query, key, value, attn_mask=attn_mask, scale=scale, is_causal=int(is_causal)
    )
    return attended
