"""Finds out what became of every patch of an image: kept, merged, fused, dropped or deferred.

Traced tokens carry a map back to the grid of patches (`Tokens.origin`). It is read here, and so is
what a method remembers about each token (`Tokens.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from patchslim.errors import WrongInput
from patchslim.hosts._answers import eval_mode
from patchslim.model.model import SlimModel
from patchslim.schedules.blocks import stage_blocks
from patchslim.tokens.tokens import Tokens


class Fate(IntEnum):
    """What can become of a patch, that is of a cell of the grid."""

    SELF = 0  # it still has a token of its own
    MERGED = 1  # one token stands for it and for other patches
    FUSED = 2  # it is in the one token into which a method fuses all patches that it removes
    DROPPED = 3  # no token stands for it
    WAITING = 4  # its token is deferred: it skips blocks and comes back later


@dataclass(frozen=True)
class PatchMap:
    """What became of the patches of one image after one block.

    Attributes:
        block: the number of the block, from 0.
        grid: height and width of the grid of patches.
        fate: the fate of each patch, in raster order.
        into: for each patch, the patch whose token stands for it now; -1 if none does.
        most: how many patch tokens the schedule leaves at most if images keep numbers of their
            own; None if all images keep the same number.
        heat: what the method remembers about each patch, 0 if it was dropped; None if the method
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
        """How many patch tokens are left, with the one that stands in for those that wait."""
        return len(set(self.into) - {-1})

    @property
    def waiting(self) -> int:
        """How many patches wait."""
        return self.fate.count(Fate.WAITING)

    @property
    def slow(self) -> int:
        """How many patch tokens go through the next block while others wait."""
        pairs = zip(self.into, self.fate, strict=True)
        return len({into for into, fate in pairs if fate is not Fate.WAITING} - {-1})


def trace_patches(
    slimmed: SlimModel, images: Tensor, *, blocks: Sequence[int] | None = None
) -> list[list[PatchMap]]:
    """Returns for each image what became of its patches after each of `blocks`.

    By default these are the blocks at a quarter, a half and three quarters of the depth, or, if
    the method defers tokens, the blocks in which it decides. The last block is traced with all its
    tokens, even if the exact tail computes only those that the head reads.
    """
    depth = slimmed.plan.shape.depth
    if blocks is None:
        deciding = slimmed.plan.decision_blocks if slimmed.method.defers else ()
        blocks = deciding or stage_blocks(depth) or (0,)
    chosen = list(blocks)
    if not chosen or any(not 0 <= block < depth for block in chosen):
        raise WrongInput(f"blocks={chosen}: this host has blocks 0 to {depth - 1}.")
    parameter = next(slimmed.host.parameters())
    with eval_mode(slimmed), torch.inference_mode():
        traced = slimmed.trace(images.to(parameter.device, parameter.dtype), max(chosen) + 1)
    fuses = slimmed.method.extra_rows > 0
    most = _patch_limits(slimmed, (images.shape[-2], images.shape[-1]))
    by_block = [
        _make_patch_maps(traced[block], block, most[block], fuses=fuses) for block in chosen
    ]
    return [list(of_image) for of_image in zip(*by_block, strict=True)]


def _patch_limits(slimmed: SlimModel, image_size: tuple[int, int]) -> list[int | None]:
    """Returns for each block the most patches that an image may keep; None if all keep as many."""
    shape = slimmed.plan.for_size(slimmed.host, image_size).shape
    if not slimmed.method.adaptive:
        return [None] * shape.depth
    return [rows - shape.prefix for rows in slimmed.counts(image_size)]


def _make_patch_maps(
    tokens: Tokens, block: int, most: int | None, *, fuses: bool
) -> list[PatchMap]:
    """Reads from the tokens after one block what became of the patches of every image."""
    origin, cells = tokens.origin, tokens.cells()
    if origin is None:
        raise WrongInput("These tokens keep no map to the grid: trace them with SlimModel.trace().")
    row = origin.clamp(min=0)
    gone = origin < 0
    if tokens.alive is not None:
        gone = gone | (tokens.alive.gather(1, row) == 0)
    into = cells.gather(1, row).masked_fill(gone, -1)
    # How many patches share the token of each patch; more than one means that it was merged.
    members = torch.zeros_like(cells).scatter_add(1, row, (~gone).long()).gather(1, row)
    joined = Fate.FUSED if fuses else Fate.MERGED
    fate = torch.full_like(into, Fate.SELF).masked_fill(members > 1, joined)
    fate = fate.masked_fill(gone, Fate.DROPPED).masked_fill(_waiting_cells(tokens), Fate.WAITING)
    return [
        PatchMap(block, tokens.grid, tuple(map(Fate, fates)), tuple(targets), most, heat)
        for fates, targets, heat in zip(
            fate.tolist(), into.tolist(), _heat_per_cell(tokens), strict=True
        )
    ]


def _waiting_cells(tokens: Tokens) -> Tensor:
    """Returns a mask (B, H*W) of the patches whose token is deferred."""
    deferred = tokens.deferred
    if deferred is None or deferred.whole.origin is None:
        return tokens.x.new_zeros((), dtype=torch.bool)
    row = deferred.whole.origin
    waits = row.new_ones(len(row), deferred.whole.patches).scatter(1, deferred.kept, 0)
    return (row >= 0) & (waits.gather(1, row.clamp(min=0)) == 1)


def _heat_per_cell(tokens: Tokens) -> list[tuple[float, ...] | None]:
    """Returns for each image what the method remembers about every patch."""
    tokens = tokens.rejoin()
    if tokens.memory is None or tokens.origin is None:
        return [None] * len(tokens.x)
    heat = tokens.memory.gather(1, tokens.origin.clamp(min=0)).masked_fill(tokens.origin < 0, 0)
    return [tuple(of_image) for of_image in heat.tolist()]
