"""Gathers, replaces and packs rows of plain tensors. Knows nothing of `Tokens`."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, rows: Tensor, prefix: int = 0) -> Tensor:
    """Gathers rows of each image: x (B, N, ...) and rows (B, K) give (B, K, ...).

    Rows are counted from `prefix`. One flat `index_select` is several times faster on a CPU than
    `gather` with an expanded index, and every exporter turns it into a plain Gather.
    """
    batch, count = x.shape[:2]
    if x.ndim == 2:
        return x.gather(1, rows + prefix if prefix else rows)
    first = torch.arange(prefix, prefix + batch * count, count, device=x.device).unsqueeze(1)
    flat = x.flatten(0, 1).index_select(0, (rows + first).flatten())
    return flat.view(batch, rows.shape[1], *x.shape[2:])


def mark_diagonal(square: Tensor) -> Tensor:
    """Marks the diagonal of square matrices (..., n, n), as a mask (n, n).

    In a graph, `torch.eye` counts more than 255 rows in 16 bits without a sign, which OpenVINO does
    not have.
    """
    rows = torch.arange(square.shape[-1], device=square.device)
    return rows.unsqueeze(1) == rows


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Returns x (B, N, C) with the rows `rows` (B, K) replaced by `values` (B, K, C)."""
    batch, count = x.shape[:2]
    first = torch.arange(0, batch * count, count, device=x.device).unsqueeze(1)
    flat = x.flatten(0, 1).index_copy(0, (rows + first).flatten(), values.flatten(0, 1))
    return flat.view_as(x)


def pack_rows(t: Tensor, real: Tensor | None) -> Tensor:
    """Puts the real rows of all images in one row of images: t (B, n, ...) gives (1, N, ...).

    `real` (B, n) says which rows are no padding; None means all.
    """
    return (t.flatten(0, 1) if real is None else t[real]).unsqueeze(0)


def strided_cells(grid: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """Lists the cells in every `stride`-th row and column of a grid, in raster order."""
    height, width = grid
    cells = torch.arange(height * width, device=device).view(height, width)
    return cells[::stride, ::stride].flatten()


def with_prefix(rows: Tensor, prefix: int) -> Tensor:
    """Turns patch rows (B, K) into rows of the whole sequence, with all prefix rows first."""
    if not prefix:
        return rows
    first = torch.arange(prefix, device=rows.device).expand(rows.shape[0], -1)
    return torch.cat([first, rows + prefix], dim=1)
