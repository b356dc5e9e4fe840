"""Pictures of which patches survive and which became one: what became of every grid cell.

It reads the maps that tokens carry back to the grid. It knows no method, and needs Pillow only to
draw.
"""

from __future__ import annotations

import colorsys
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
TINT = 0.5  # how much of a patch that is merged shows the colour of its group
MARK = 0.2  # radius of the mark of the patch that others joined, in cells
RIM = 1.25  # pixels of the dark rim, which shows the mark on white
# How far the hue turns from cell to cell, down and across: so no two neighbours are alike.
TURN = (0.7548776662, 0.5698402910)


class Fate(IntEnum):
    """What can become of a grid cell."""

    SELF = 0  # it is still a row of its own
    MERGED = 1  # one row stands for it and for other cells
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
        most: how many patch rows the schedule leaves at most, where images keep numbers of their
            own; None where all keep the same.
    """

    block: int
    grid: tuple[int, int]
    fate: tuple[Fate, ...]
    into: tuple[int, ...]
    most: int | None = None

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
    most = _most(slimmed, (images.shape[2], images.shape[3]))
    each = [_survivals(traced[block], block, most[block], fuses=fuses) for block in chosen]
    return [list(one) for one in zip(*each, strict=True)]


def draw(pixels: Pixels, survivals: Sequence[Survival]) -> Image:
    """The image, and beside it one panel for each of `survivals`.

    Dropped patches are darkened. Patches that became one are outlined together and tinted by a
    colour of their own, with a dot on the one that the others joined. Those in a fused row are
    dimmed and show their mean colour.

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


def _most(slimmed: SlimModel, image_size: tuple[int, int]) -> list[int | None]:
    """For each block the most patch rows that an image may keep, where images differ."""
    shape = slimmed.shape(image_size)
    if not slimmed.reducer.adaptive:
        return [None] * shape.depth
    return [rows - shape.prefix for rows in slimmed.counts(image_size)]


def _survivals(tokens: Tokens, block: int, most: int | None, *, fuses: bool) -> list[Survival]:
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
        Survival(block, tokens.grid, tuple(map(Fate, fates)), tuple(places), most)
        for fates, places in zip(fate.tolist(), into.tolist(), strict=True)
    ]


def _caption(survival: Survival) -> str:
    """Where the panel is, and how many rows are left; of how many, where that is the image's."""
    left = f"after block {survival.block}: {survival.left}"
    if survival.most is None or survival.most >= len(survival.into):
        return f"{left} left"
    return f"{left} (cap {survival.most})"


def _panel(pixels: Pixels, survival: Survival) -> Pixels:
    """The image with every patch shown by its fate."""
    height, width = survival.grid
    rows = np.arange(pixels.shape[0]) * height // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * width // pixels.shape[1]
    cell = rows[:, None] * width + columns[None, :]
    fate = np.array(survival.fate)[cell]
    group = np.array(survival.into)[cell]
    shown = pixels.astype(np.float32)
    merged, fused = (fate == kind for kind in (Fate.MERGED, Fate.FUSED))
    shown[merged] = (1 - TINT) * shown[merged] + TINT * _tints(survival.grid)[group[merged]]
    shown[fused] = FUSED * (0.2 * shown + 0.8 * _means(shown, group, survival.grid))[fused]
    shown[fate == Fate.DROPPED] *= DROPPED
    edge = _edges(group) & _beside(merged)
    shown[edge] = 0.45 * shown[edge] + 0.55 * np.array(EDGE, np.float32)
    _mark(shown, _from_middle(pixels.shape[:2], survival.grid), merged & (group == cell))
    drawn: Pixels = shown.clip(0, 255).astype(np.uint8)
    return drawn


def _tints(grid: tuple[int, int]) -> Shades:
    """A colour for each cell, for the group that joined it: the same after every block."""
    down, across = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    hues = (down * TURN[0] + across * TURN[1]) % 1
    return np.array([colorsys.hls_to_rgb(hue, 0.5, 1.0) for hue in hues], np.float32) * 255


def _from_middle(shape: tuple[int, ...], grid: tuple[int, int]) -> tuple[Shades, float]:
    """How far each pixel is from the middle of its cell, in pixels; and the side of a cell."""
    sides = [shape[0] / grid[0], shape[1] / grid[1]]
    down, across = (
        np.abs((np.arange(pixels) + 0.5) % side - side / 2)
        for pixels, side in zip(shape, sides, strict=True)
    )
    distance: Shades = np.hypot(down[:, None], across[None, :]).astype(np.float32)
    return distance, min(sides)


def _mark(shown: Shades, middle: tuple[Shades, float], cells: npt.NDArray[np.bool_]) -> None:
    """Puts a dot into the middle of each cell of `cells`, unless cells are too small for dots."""
    distance, side = middle
    radius = MARK * side
    if radius >= 1:
        shown[cells & (distance <= radius + RIM)] = INK
        shown[cells & (distance <= radius)] = EDGE


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
