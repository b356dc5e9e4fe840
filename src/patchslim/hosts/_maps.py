"""Rows laid out as maps, for hosts that keep their tokens in maps and project by 1x1 convolutions.

Each row is a map of one cell, since a layer of theirs that reads row by row does not ask where it
is. With maps of more cells, torch (2.15) computes wrong gradients of a batch norm where the layout
in memory of its input and that of its gradient differ.
"""

from __future__ import annotations

from torch import Tensor


def as_map(x: Tensor) -> Tensor:
    """Lays rows (B, N, C) out as maps of one cell (B*N, C, 1, 1)."""
    return x.flatten(0, 1).unsqueeze(2).unsqueeze(3)


def as_rows(maps: Tensor, like: Tensor) -> Tensor:
    """Lays maps of one cell out as rows (B, N, C), of as many as `like` has."""
    return maps.flatten(1).view(like.shape[0], like.shape[1], -1)
