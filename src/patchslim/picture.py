"""Pictures of which patches survive: what became of every grid cell, and how to draw it.

It reads the maps that tokens carry back to the grid. It knows no method, and needs Pillow only to
draw.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from patchslim.errors import WrongInput
from patchslim.model import SlimModel
from patchslim.schedule import stages
from patchslim.slim import evaluating
from patchslim.tokens import Tokens

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Shades = npt.NDArray[np.float32]

PANEL = 176  # pixels that the longer side of a panel has at least
GAP = 8
CAPTION = 22
PAPER = (250, 250, 248)
INK = (70, 70, 74)
EDGE = (255, 255, 255)
DROPPED = 0.18  # how bright a dropped patch is still shown
FUSED = 0.45


class Fate(IntEnum):
    """What can become of a grid cell."""

    SELF = 0  # it is still a row of its own
    MERGED = 1  # it is in a row with other cells, averaged
    FUSED = 2  # it is in the one row that takes all that a method gives up
    DROPPED = 3  # no row stands for it


@dataclass(frozen=True)
class Survival:
    """What became of the grid of one image after one block.

    Attributes:
        block: the block, counted from 0.
        grid: height and width of the grid.
        fate: of each cell in raster order.
        into: for each cell, the cell whose row stands for it now; -1 where it was dropped.
    """

    block: int
    grid: tuple[int, int]
    fate: tuple[Fate, ...]
    into: tuple[int, ...]

    @property
    def left(self) -> int:
        """How many patch rows are left."""
        return len(set(self.into) - {-1})


def survivors(
    slimmed: SlimModel, images: Tensor, *, blocks: Sequence[int] | None = None
) -> list[list[Survival]]:
    """For each image, what became of its grid cells after each of `blocks`.

    Without `blocks`: after those at a quarter, a half and three quarters of the depth. The last
    block is traced as if all its rows were computed, even where the exact tail skips it.
    """
    depth = slimmed.shape().depth
    chosen = list(blocks) if blocks is not None else list(stages(depth) or (0,))
    if not chosen or any(not 0 <= block < depth for block in chosen):
        raise WrongInput(f"blocks={chosen}: this host has blocks 0 to {depth - 1}.")
    parameter = next(slimmed.host.parameters())
    with evaluating(slimmed), torch.inference_mode():
        traced = slimmed.trace(images.to(parameter.device, parameter.dtype), max(chosen) + 1)
    fuses = slimmed.reducer.adds > 0
    each = [_survivals(traced[block], block, fuses=fuses) for block in chosen]
    return [list(one) for one in zip(*each, strict=True)]


def draw(pixels: Pixels, survivals: Sequence[Survival]) -> Image:
    """The image, and beside it one panel for each of `survivals`.

    Dropped patches are darkened. Patches that were merged show the mean colour of their group,
    outlined; those in a fused row show it darker.

    Args:
        pixels: the image (H, W, 3), as the model saw it before normalising.
        survivals: what became of its cells, after one block or several.
    """
    from PIL import Image as Images
    from PIL import ImageDraw, ImageFont

    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise WrongInput(
            f"Got pixels of shape {pixels.shape} and type {pixels.dtype}; draw() takes (H, W, 3) "
            "of uint8, the image before it is normalised."
        )
    factor = max(1, -(-PANEL // max(pixels.shape[:2])))
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    panels = [large, *(_panel(large, survival) for survival in survivals)]
    cells = survivals[0].grid[0] * survivals[0].grid[1] if survivals else 0
    captions = [f"{cells} patches" if cells else "", *map(_caption, survivals)]
    height, width = large.shape[:2]
    sheet = Images.new("RGB", ((width + GAP) * len(panels) - GAP, height + CAPTION), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = place * (width + GAP)
        sheet.paste(Images.fromarray(panel), (left, 0))
        pen.text((left + width / 2, height + CAPTION / 2), caption, INK, font=font, anchor="mm")
    return sheet


def png(picture: Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _survivals(tokens: Tokens, block: int, *, fuses: bool) -> list[Survival]:
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
    fate = fate.masked_fill(gone, Fate.DROPPED)
    return [
        Survival(block, tokens.grid, tuple(map(Fate, fates)), tuple(places))
        for fates, places in zip(fate.tolist(), into.tolist(), strict=True)
    ]


def _caption(survival: Survival) -> str:
    """Where the panel is, and how many rows are left."""
    return f"after block {survival.block}: {survival.left} left"


def _panel(pixels: Pixels, survival: Survival) -> Pixels:
    """The image with every patch shown by its fate."""
    height, width = survival.grid
    rows = np.arange(pixels.shape[0]) * height // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * width // pixels.shape[1]
    cell = rows[:, None] * width + columns[None, :]
    fate = np.array(survival.fate)[cell]
    group = np.array(survival.into)[cell]
    shown = pixels.astype(np.float32)
    joined = (fate == Fate.MERGED) | (fate == Fate.FUSED)
    means = _means(shown, group, survival.grid)
    shown = np.where(joined[:, :, None], 0.2 * shown + 0.8 * means, shown)
    shown = np.where((fate == Fate.FUSED)[:, :, None], shown * FUSED, shown)
    shown = np.where((fate == Fate.DROPPED)[:, :, None], shown * DROPPED, shown)
    edge = _edges(group) & _beside(fate == Fate.MERGED)
    shown[edge] = 0.45 * shown[edge] + 0.55 * np.array(EDGE, np.float32)
    drawn: Pixels = shown.clip(0, 255).astype(np.uint8)
    return drawn


def _means(pixels: Shades, group: npt.NDArray[np.int64], grid: tuple[int, int]) -> Shades:
    """For each pixel the mean colour of its group."""
    index = group.ravel() + 1  # dropped cells are group -1
    count = np.bincount(index, minlength=grid[0] * grid[1] + 1).clip(min=1)
    sums = [np.bincount(index, pixels[:, :, c].ravel(), count.size) for c in range(3)]
    means: Shades = (np.stack(sums, axis=1) / count[:, None])[index].reshape(pixels.shape)
    return means.astype(np.float32)


def _edges(group: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """The pixels whose right or lower neighbour is of another group."""
    edge = np.zeros(group.shape, bool)
    edge[:, :-1] |= group[:, :-1] != group[:, 1:]
    edge[:-1] |= group[:-1] != group[1:]
    return edge


def _beside(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask, grown by one pixel to the left and upwards, so that it meets its own edges."""
    grown = mask.copy()
    grown[:, :-1] |= mask[:, 1:]
    grown[:-1] |= mask[1:]
    return grown
