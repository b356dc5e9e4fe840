"""`cubistmerge`: merges neighbours within rows and then within columns, so that a grid is left.

Gong, Lis, "CubistMerge: Spatial-Preserving Token Merging For Diverse ViT Backbones" (2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.methods import Method, Place, Placement, Signals
from patchslim.tokens.chain import Chain
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import Fixed, Reduction, new_index
from patchslim.tokens.rows import take
from patchslim.tokens.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Strongest(Merge):
    """A `Merge` that takes, for each channel, the value that is farthest from zero.

    `before` and `after` (B, m) are the rows that join each kept row, or the kept row itself.
    """

    before: Tensor
    after: Tensor

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Compares features channel by channel; adds up plain numbers of a row."""
        if weight is None or t.ndim == 2:
            return super().move(t, weight=weight, total=total, prefix=prefix)
        out = take(t, self.kept, prefix)
        for side in (self.before, self.after):
            joining = take(t, side, prefix)
            out = torch.where(joining.abs() > out.abs(), joining, out)
        return torch.cat([t[:, :prefix], out], dim=1) if prefix else out


class CubistMerge(Method):
    """Takes as many pairs of neighbours out of every row of the grid, and then of every column.

    What is too many for a smaller grid merges with its neighbour in the sequence, as all do once
    the grid is not whole.
    """

    place = Place.BEFORE_BLOCK
    placement: ClassVar[Placement] = Placement.FIRST
    reads = ("x",)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """Merges the pairs of the highest cosines in each row, then in each column."""
        height, width = tokens.grid
        cuts = [(1, tokens.patches - keep, False)]
        if tokens.position is None and tokens.patches == height * width:
            high, wide = _smaller_grid(tokens.grid, keep)
            cuts = [(height, width - wide, False), (wide, height - high, True)]
            cuts += [(1, high * wide - keep, False)]
        done: Reduction = Fixed(tokens.patches)
        for lines, count, down in cuts:
            if count:
                step = _merge_along(tokens, lines, count, down=down)
                done = Chain(done, tokens.patches, step)
                tokens = step.apply(tokens)
        return done

    def fewest(self, patches: int) -> int:
        """Halves `patches`: every second row of a line may go."""
        return patches - patches // 2


def _smaller_grid(grid: tuple[int, int], keep: int) -> tuple[int, int]:
    """Finds the grid of about the same shape that has least more than `keep` cells."""
    height, width = grid
    shapes = [
        (high * wide, high, wide)
        for high in range(-(-height // 2), height + 1)
        for wide in range(-(-width // 2), width + 1)
        if high * wide >= keep and abs(high * width - wide * height) <= max(grid)
    ]
    return min(shapes)[1:]


def _merge_along(tokens: Tokens, lines: int, count: int, *, down: bool) -> Strongest:
    """Merges the `count` best pairs of each line: of each row, or `down` each column."""
    every = torch.arange(tokens.patches, device=tokens.x.device)
    number = every.view(-1, lines).T if down else every.view(lines, -1)
    x = tokens.x[:, tokens.prefix :]
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=2)[:, number]
    near = (unit[:, :, :-1] * unit[:, :, 1:]).sum(dim=3)
    # Each second row proposes the one before it or the one after it.
    both = F.pad(near, (0, near.shape[2] % 2), value=-math.inf).unflatten(2, (-1, 2)).max(dim=3)
    pair = both.values.topk(count, dim=2).indices
    goes, into = 2 * pair + 1, 2 * (pair + both.indices.gather(2, pair))

    place = torch.arange(number.shape[1], device=x.device)
    joins = torch.full_like(number, -1).expand(x.shape[0], -1, -1).scatter(2, goes, into)
    order = place + (joins >= 0) * len(place)
    stays = order.topk(len(place) - count, dim=2, largest=False).indices
    before = place - (F.pad(joins, (1, 0), value=-1)[:, :, :-1] == place).long()
    after = place + (F.pad(joins, (0, 1), value=-1)[:, :, 1:] == place).long()

    number = number.expand_as(joins)
    kept, before, after = (
        number.gather(2, each).transpose(1, 2 if down else 1).flatten(1)
        for each in (stays, before.gather(2, stays), after.gather(2, stays))
    )
    gone, into = (number.gather(2, each).flatten(1) for each in (goes, into))
    into = new_index(kept, tokens.patches, otherwise=-1).gather(1, into)
    return Strongest(kept=kept, gone=gone, into=into, before=before, after=after)
