"""Rotary positions of patches, by the grid cell that each comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.tokens.tokens import Tokens


def rotate_halves(tokens: Tokens, t: Tensor) -> Tensor:
    """Rotates queries or keys (B, H, N, d) by each patch's position in the grid.

    `tokens.rotary` has a row for each grid cell: cosines, and behind them sines.
    """
    if tokens.rotary is None or not tokens.patches:
        return t
    table = tokens.rotary
    if tokens.position is not None:
        table = table[tokens.position].unsqueeze(1)
    cosine, sine = table.chunk(2, dim=-1)
    leading, patches = t[:, :, : tokens.prefix], t[:, :, tokens.prefix :]
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([leading, turned], dim=2)
