"""Spells operations of a graph as XNNPACK computes them, so that it is cut into fewer parts.

XNNPACK takes matrix products, sums, products, softmax, slices and reshapes. Whatever lies between
two of its partitions is run one operator at a time by ExecuTorch's portable kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

ATEN = torch.ops.aten


def respell(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, with attention and slices in operators that XNNPACK takes."""
    respelled: torch.export.ExportedProgram = program.run_decompositions(SPELLINGS)
    return respelled


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    *causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as two products of batches of matrices with a softmax between them.

    PyTorch's own form asks after each row that is masked as a whole. A slimmed model has none: each
    image keeps a token.
    """
    if (
        any(causal)
        or dropout
        or enable_gqa
        or query.ndim != 4
        or (mask is not None and mask.dtype == torch.bool)
    ):
        return NotImplemented
    batch, heads, rows, channels = query.shape
    keys, width = key.shape[2], value.shape[3]
    scale = channels**-0.5 if scale is None else scale
    scores = torch.bmm(
        (query * scale).reshape(batch * heads, rows, channels),
        key.reshape(batch * heads, keys, channels).transpose(1, 2),
    )
    if mask is not None:
        scores = (scores.view(batch, heads, rows, keys) + mask).view(batch * heads, rows, keys)
    mixed = torch.bmm(scores.softmax(-1), value.reshape(batch * heads, keys, width))
    return mixed.view(batch, heads, rows, width)


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: bool,
) -> Any:
    """The norm of the last dimension, with means over the last two of four, as XNNPACK has them."""
    if len(shape) != 1:
        return NotImplemented
    wide = x.reshape(1, -1, 1, x.shape[-1])
    centred = wide - wide.mean([2, 3], keepdim=True)
    variance = (centred * centred).mean([2, 3], keepdim=True)
    normed = (centred * torch.rsqrt(variance + eps)).view(x.shape)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _expand(x: Tensor, size: Sequence[int], *, implicit: bool = False) -> Any:
    """The tensor itself, where it has that shape: a class token of one image."""
    wanted = [own if each == -1 else each for own, each in zip(x.shape, size, strict=False)]
    return x.view(wanted) if len(size) == x.ndim and wanted == [*x.shape] else NotImplemented


def _split_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Slices of these sizes."""
    ends = accumulate(sizes)
    return [
        ATEN.slice.Tensor(x, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)
    ]


def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    """Slices of this size, of which the last may be smaller."""
    length = x.shape[dim]
    return _split_sizes(x, [min(size, length - begin) for begin in range(0, length, size)], dim)


def _chunk(x: Tensor, chunks: int, dim: int = 0) -> list[Tensor]:
    """So many slices at most."""
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _select(x: Tensor, dim: int, index: int) -> Tensor:
    """A slice of one, without its dimension."""
    dim, index = dim % x.ndim, index % x.shape[dim]
    shape = [*x.shape[:dim], *x.shape[dim + 1 :]]
    return torch.reshape(ATEN.slice.Tensor(x, dim, index, index + 1), shape)


def _unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    """Every slice of one, without its dimension."""
    return [_select(x, dim, index) for index in range(x.shape[dim])]


SPELLINGS = {
    ATEN.scaled_dot_product_attention.default: _attention,
    ATEN.layer_norm.default: _layer_norm,
    ATEN.expand.default: _expand,
    ATEN.split_with_sizes.default: _split_sizes,
    ATEN.split.Tensor: _split,
    ATEN.chunk.default: _chunk,
    ATEN.unbind.int: _unbind,
    ATEN.select.int: _select,
}
