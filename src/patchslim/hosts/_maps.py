"""Rows laid out as maps, for hosts that keep their tokens in maps and project by 1x1 convolutions.

All rows stand in one column, since a layer of theirs that reads row by row does not ask where.
"""

from __future__ import annotations

from torch import Tensor


def as_map(x: Tensor) -> Tensor:
    """Lays rows (B, N, C) out as a map of one column (B, C, N, 1).

    It is copied: torch 2.15 computes wrong gradients of a batch norm whose input is a view like it.
    """
    return x.transpose(1, 2).unsqueeze(3).contiguous()


def as_rows(x: Tensor) -> Tensor:
    """Lays a map of one column (B, C, N, 1) out as rows (B, N, C)."""
    return x.squeeze(3).transpose(1, 2)
