"""What became of every grid cell of an image: it stayed, was merged, dropped, or waits.

Read from the maps that tokens carry back to the grid, and from what a method remembers of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchslim.errors import WrongInput
from patchslim.hosts._answers import eval_mode
from patchslim.model.model import SlimModel
from patchslim.schedules.schedule import stage_blocks
from patchslim.tokens.tokens import Tokens

if TYPE_CHECKING:
    pass


class Fate(IntEnum):
    """What can become of a grid cell."""

    SELF = 0  # it is still a row of its own
    MERGED = 1  # one row stands for it and for other cells
    FUSED = 2  # it is in the one row that takes all that a method gives up
    DROPPED = 3  # no row stands for it
    WAITING = 4  # its row waits while others go through the blocks, and will be back


@dataclass(frozen=True)
class PatchMap:
    """What became of the grid of one image after one block.

    Attributes:
        block: the block, counted from 0.
        grid: height and width of the grid.
        fate: of each cell in raster order.
        into: for each cell, the cell whose row stands for it now; -1 where none does.
        most: how many patch rows the schedule leaves at most, where images keep numbers of their
            own; None where all keep the same.
        heat: what the method remembers of each cell, 0 where it was dropped; None where it
            remembers nothing.
    """

    block: int
    grid: tuple[int, int]
    fate: tuple[Fate, ...]
    into: tuple[int, ...]
    most: int | None = None
    heat: tuple[float, ...] | None = None

    @property
    def left(self) -> int:
        """How many patch rows are left, with the one that stands in for those that wait."""
        return len(set(self.into) - {-1})

    @property
    def waiting(self) -> int:
        """How many cells wait."""
        return self.fate.count(Fate.WAITING)

    @property
    def slow(self) -> int:
        """How many patch rows go on by themselves, where others wait."""
        pairs = zip(self.into, self.fate, strict=True)
        return len({into for into, fate in pairs if fate is not Fate.WAITING} - {-1})


def trace_patches(
    slimmed: SlimModel, images: Tensor, *, blocks: Sequence[int] | None = None
) -> list[list[PatchMap]]:
    """For each image, what became of its grid cells after each of `blocks`.

    Without `blocks`: after those at a quarter, a half and three quarters of the depth; where the
    method has rows wait, after those in which it decides. The last block is traced as if all its
    rows were computed, even where the exact tail skips it.
    """
    depth = slimmed.plan.shape.depth
    chosen = list(_default_blocks(slimmed, depth) if blocks is None else blocks)
    if not chosen or any(not 0 <= block < depth for block in chosen):
        raise WrongInput(f"blocks={chosen}: this host has blocks 0 to {depth - 1}.")
    parameter = next(slimmed.host.parameters())
    with eval_mode(slimmed), torch.inference_mode():
        traced = slimmed.trace(images.to(parameter.device, parameter.dtype), max(chosen) + 1)
    fuses = slimmed.method.extra_rows > 0
    most = _row_limits(slimmed, (images.shape[2], images.shape[3]))
    each = [_make_patch_maps(traced[block], block, most[block], fuses=fuses) for block in chosen]
    return [list(one) for one in zip(*each, strict=True)]


def _default_blocks(slimmed: SlimModel, depth: int) -> tuple[int, ...]:
    """The blocks that are shown where none are asked for."""
    deciding = slimmed.plan.decision_blocks if slimmed.method.defers else ()
    return deciding or stage_blocks(depth) or (0,)


def _row_limits(slimmed: SlimModel, image_size: tuple[int, int]) -> list[int | None]:
    """For each block the most patch rows that an image may keep, where images differ."""
    shape = slimmed.plan.for_size(slimmed.host, image_size).shape
    if not slimmed.method.adaptive:
        return [None] * shape.depth
    return [rows - shape.prefix for rows in slimmed.counts(image_size)]


def _make_patch_maps(
    tokens: Tokens, block: int, most: int | None, *, fuses: bool
) -> list[PatchMap]:
    """What became of the grids of all images, by the tokens after one block."""
    origin, cells = tokens.origin, tokens.cells()
    if origin is None:
        raise WrongInput("These tokens keep no map to the grid: trace them with SlimModel.trace().")
    row = origin.clamp(min=0)
    gone = origin < 0
    if tokens.alive is not None:
        gone = gone | (tokens.alive.gather(1, row) == 0)
    into = cells.gather(1, row).masked_fill(gone, -1)
    members = torch.zeros_like(cells).scatter_add(1, row, (~gone).long()).gather(1, row)
    joined = Fate.FUSED if fuses else Fate.MERGED
    fate = torch.full_like(into, Fate.SELF).masked_fill(members > 1, joined)
    fate = fate.masked_fill(gone, Fate.DROPPED).masked_fill(_waiting_cells(tokens), Fate.WAITING)
    return [
        PatchMap(block, tokens.grid, tuple(map(Fate, fates)), tuple(places), most, heat)
        for fates, places, heat in zip(
            fate.tolist(), into.tolist(), _heat_per_cell(tokens), strict=True
        )
    ]


def _waiting_cells(tokens: Tokens) -> Tensor:
    """Which grid cells have a row that waits (B, H*W)."""
    parked = tokens.deferred
    if parked is None or parked.whole.origin is None:
        return tokens.x.new_zeros((), dtype=torch.bool)
    row = parked.whole.origin
    waits = row.new_ones(len(row), parked.whole.patches).scatter(1, parked.kept, 0)
    return (row >= 0) & (waits.gather(1, row.clamp(min=0)) == 1)


def _heat_per_cell(tokens: Tokens) -> list[tuple[float, ...] | None]:
    """What the method remembers of every grid cell of each image."""
    every = tokens.rejoin()
    if every.memory is None or every.origin is None:
        return [None] * len(every.x)
    heat = every.memory.gather(1, every.origin.clamp(min=0)).masked_fill(every.origin < 0, 0)
    return [tuple(each) for each in heat.tolist()]
