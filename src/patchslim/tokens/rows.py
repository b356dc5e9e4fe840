"""Row movements on plain tensors: gather, scatter, stride. They know no `Tokens`."""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, rows: Tensor, prefix: int = 0) -> Tensor:
    """Rows of every image: x (B, N, ...) at rows (B, K), counted from `prefix`, gives (B, K, ...).

    One flat `index_select`: on a CPU several times faster than `gather` with an expanded index,
    and a plain Gather in every exporter.
    """
    batch, count = x.shape[:2]
    if x.ndim == 2:
        return x.gather(1, rows + prefix if prefix else rows)
    first = torch.arange(prefix, prefix + batch * count, count, device=x.device).unsqueeze(1)
    flat = x.flatten(0, 1).index_select(0, (rows + first).flatten())
    return flat.view(batch, rows.shape[1], *x.shape[2:])


def put(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """The rows x (B, N, C) with those at `rows` (B, K) replaced by `values` (B, K, C)."""
    batch, count = x.shape[:2]
    first = torch.arange(0, batch * count, count, device=x.device).unsqueeze(1)
    flat = x.flatten(0, 1).index_copy(0, (rows + first).flatten(), values.flatten(0, 1))
    return flat.view_as(x)


def pack_rows(t: Tensor, real: Tensor | None) -> Tensor:
    """Those of the rows t (B, n, ...) that are real (B, n), behind one another (1, N, ...)."""
    return (t.flatten(0, 1) if real is None else t[real]).unsqueeze(0)


def strided_cells(grid: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """The cells in every `stride`-th row and column of a grid, in raster order."""
    height, width = grid
    cells = torch.arange(height * width, device=device).view(height, width)
    return cells[::stride, ::stride].flatten()


def with_prefix(rows: Tensor, prefix: int) -> Tensor:
    """Rows of the whole sequence: the prefix rows, and then the patch rows `rows` (B, K)."""
    if not prefix:
        return rows
    first = torch.arange(prefix, device=rows.device).expand(rows.shape[0], -1)
    return torch.cat([first, rows + prefix], dim=1)
