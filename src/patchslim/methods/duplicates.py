"""`duplicates`: patches of the input that show exactly the same are one, before the first block.

Flat scans, screenshots, documents, padded images: every block profits. What is removed can be said
before the network runs, and without a weight of it. With `tolerance`, patches that nearly show the
same are one too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.errors import BadSetting
from patchslim.methods import Method, Place, Placement, Signals, Threshold
from patchslim.methods import _clustering as grouping
from patchslim.methods._clustering import Groups
from patchslim.methods._windows import Windows
from patchslim.tokens.reduction import Merge, Reduction
from patchslim.tokens.rows import take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MAX_PAIRWISE = (
    1024  # patches that are compared each with each; of more, those of a square of the grid
)
WINDOW_SIDE = 16  # of that square, in cells
PIXEL_CHUNK = 64  # pixels that are looked at at a time


class Duplicates(Method):
    """Joins patches with the same pixels, in the whole image or within squares of `window` cells.

    `tolerance` is the root mean square by which the pixels of two patches may differ, as the model
    sees them; 0 is not at all. Attention goes on counting each joined patch, so that without
    positions the answer is the same; positions are averaged.
    """

    place = Place.BEFORE_BLOCK
    placement: ClassVar[Placement] = Placement.FIRST
    reads = ("pixels",)
    proportional = True
    adaptive = True
    tuned_threshold = Threshold("tolerance", first=0.05)

    def __init__(self, *, tolerance: float = 0.0, window: int = 0) -> None:
        super().__init__()
        if not 0 <= tolerance < math.inf or window < 0:
            raise BadSetting(
                f"tolerance={tolerance}, window={window}: neither can be below 0; 0 means exactly "
                "the same pixels, and in the whole image."
            )
        self.tolerance, self.window = tolerance, window

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """Of patches that show the same the first stays, and the others join it."""
        if tokens.content is None:
            raise BadSetting("Duplicates are found by pixels, and these tokens come without.")
        keep = min(keep, tokens.patches)
        rows = tokens.rows()
        real = torch.ones_like(rows, dtype=torch.bool) if tokens.alive is None else tokens.alive
        shown = tokens.content()
        if tokens.position is not None:
            shown = take(shown, tokens.position)
        own = square_of(tokens.cells(), tokens.grid, self.window)
        to = first_identical(shown, own, real)
        first = real & (to == rows)
        near = self._near_duplicates(tokens, shown, first, own) if self.tolerance else None
        apart = _rank_by_contrast(shown, first) if near is None else near.apart
        kept = apart.masked_fill(~real, -torch.inf).topk(keep, dim=1).indices
        count = ((apart > 0) & real).sum(dim=1, keepdim=True).clamp(1, keep)
        padding = torch.arange(keep, device=kept.device) < count
        stays = torch.zeros_like(real).scatter(1, kept, padding)
        other = _previous_kept(stays) if near is None else near.assign_rows(stays)
        to = torch.where(stays.gather(1, to), to, other.gather(1, to))
        to = torch.where(stays | ~real, rows, to)
        place = torch.zeros_like(rows).scatter(
            1, kept, torch.arange(keep, device=kept.device).expand_as(kept)
        )
        return Merge(kept, rows, place.gather(1, to), padding, real & ~stays)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Nothing for the same pixels; for nearly the same, products of patches with patches."""
        count = rows - prefix
        run = self._window_side(count) ** 2 or count
        return -(-count // run) * run * min(run, count) * block.pixels if self.tolerance else 0

    def fewest(self, patches: int) -> int:
        """One of each square in which near-duplicates are looked for."""
        run = self._window_side(patches) ** 2 or patches
        return max(1, -(-patches // run)) if self.tolerance else 1

    def _window_side(self, patches: int) -> int:
        """The side of the squares in which near-duplicates are looked for; 0 for the whole."""
        return self.window or (WINDOW_SIDE if patches > MAX_PAIRWISE else 0)

    def _near_duplicates(
        self, tokens: Tokens, shown: Tensor, first: Tensor, own: Tensor
    ) -> NearDuplicates:
        """Patches by how near another of their square is; duplicates of the `first` go first."""
        # Duplicates take no part: they go where their first one goes.
        tiles = Windows.from_cells(
            tokens.cells(), tokens.grid, first, self._window_side(tokens.patches)
        )
        some = tiles.of(shown.to(torch.promote_types(shown.dtype, torch.float32)))
        power = torch.linalg.vector_norm(some, dim=2).square() / some.shape[2]
        cost = power.unsqueeze(2) + power.unsqueeze(1)
        cost = torch.baddbmm(cost, some, some.transpose(1, 2), alpha=-2 / some.shape[2])
        del some  # as large as the images
        never = ~(tiles.alive.unsqueeze(1) & tiles.alive.unsqueeze(2))
        square = tiles.of(own)
        never = never | (square.unsqueeze(1) != square.unsqueeze(2))
        cost.masked_fill_(never, torch.inf)
        worth = tiles.of(-tokens.rows().to(cost.dtype))  # the first of them stays
        groups = grouping.leaders(cost, worth, self.tolerance**2)
        apart, best = tiles.to_rows(groups.apart), tiles.best_rows(worth)
        apart = torch.where(apart > 0, _rank_by_contrast(shown, first), apart)
        if best is not None:
            apart = torch.where(best, grouping.unjoinable_distance(apart), apart)
        return NearDuplicates(apart.masked_fill(~first, -1.0), tiles, groups, cost)


@dataclass(frozen=True)
class NearDuplicates:
    """What is known of patches that are not the same, but near."""

    apart: Tensor
    tiles: Windows
    groups: Groups
    cost: Tensor

    def assign_rows(self, stays: Tensor) -> Tensor:
        """The nearest patch that stays, for each (B, n); one before it where none is near."""
        rows = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
        to = self.tiles.assign_rows(self.groups, self.cost, stays, rows)
        return torch.where(stays.gather(1, to), to, _previous_kept(stays))


def _rank_by_contrast(shown: Tensor, first: Tensor) -> Tensor:
    """Patches by their contrast, flat ones first to go; duplicates of an earlier one before all."""
    shown = shown.to(torch.promote_types(shown.dtype, torch.float32))
    contrast = shown.var(dim=2, correction=0)
    rows = torch.arange(first.shape[1], device=first.device)
    return torch.where(first, 1 + contrast / (1 + contrast) - 1e-6 * rows, -1.0)


def _previous_kept(stays: Tensor) -> Tensor:
    """For each row the last one before it that stays, or the first of all (B, n)."""
    rows = torch.arange(stays.shape[1], device=stays.device)
    last = torch.where(stays, rows, -1).cummax(dim=1).values
    first = stays.to(torch.int8).argmax(dim=1, keepdim=True)
    return torch.where(last < 0, first, last)


def square_of(cells: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The square of side * side cells that each cell lies in (B, n); one for all if side is 0."""
    if not side:
        return torch.zeros_like(cells)
    return cells // grid[1] // side * grid[1] + cells % grid[1] // side


def first_identical(shown: Tensor, square: Tensor, real: Tensor) -> Tensor:
    """For each row the first one of its square with the same entries, itself if none (B, n).

    Rows are told apart by a sum of their bits in integers, which no order of addition changes, and
    those with equal sums are compared entry by entry.
    """
    key = square * 0x5851F42D4C957F2D
    for start in range(0, shown.shape[2], PIXEL_CHUNK):
        bits = shown[..., start : start + PIXEL_CHUNK].float().contiguous().view(torch.int32)
        number = torch.arange(start + 1, start + 1 + bits.shape[2], device=bits.device)
        key = key + (bits.to(torch.int64) * (number * 0x9E3779B97F4A7C1 * 2 + 1)).sum(dim=2)
    key = torch.where(real, key, torch.arange(key.shape[1], device=key.device) - (1 << 62))
    ordered, order = key.sort(dim=1, stable=True)
    begins = torch.ones_like(real)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = torch.arange(key.shape[1], device=key.device).expand_as(key)
    first = torch.where(begins, place, 0).cummax(dim=1).values
    to = torch.empty_like(order).scatter(1, order, order.gather(1, first))
    same = square.gather(1, to) == square
    for some in shown.split(PIXEL_CHUNK, dim=2):
        same = same & (take(some.contiguous(), to) == some).all(dim=2)
    return torch.where(same, to, place)
