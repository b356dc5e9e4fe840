"""Pictures of which patches survive, wait or became one: what became of every grid cell.

It reads the maps that tokens carry back to the grid, and what a method remembers of every row. It
knows no method, and needs Pillow only to draw.
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
from patchslim.hosts._answers import evaluating
from patchslim.model.model import SlimModel
from patchslim.schedules.schedule import stages
from patchslim.tokens.tokens import Tokens

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

Pixels = npt.NDArray[np.uint8]
Shades = npt.NDArray[np.float32]

PANEL = 176  # pixels that the longer side of a panel has at least
GAP = 8
CAPTION = 22
LETTERS = 13  # pixels that letters of a caption have, where it fits
PAPER = (250, 250, 248)
INK = (70, 70, 74)
EDGE = (255, 255, 255)
DROPPED = 0.18  # how bright a dropped patch is still shown
FUSED = 0.45
TINT = 0.5  # how much of a patch that is merged shows the colour of its group
MARK = 0.2  # radius of the mark of the patch that others joined, in cells
RIM = 1.25  # pixels of the dark rim, which shows the mark on white
# A patch that waits shows its brightness alone, between these two blues, under thin stripes.
VEIL = ((44, 74, 118), (172, 200, 230))
STRIPE = (214, 228, 244)
STRIPED = 0.55  # how much of a stripe covers the patch
STRIPES = 8  # pixels from one stripe to the next, along a line
# The scale of heat, evenly spaced: from dark to bright, so that it is read without a legend.
HEAT = ((10, 8, 38), (84, 18, 109), (187, 55, 84), (249, 142, 20), (252, 250, 160))
COVER = 0.72  # how much of a patch shows the colour of its heat, and not its brightness
# How far the hue turns from cell to cell, down and across: so no two neighbours are alike.
TURN = (0.7548776662, 0.5698402910)


class Fate(IntEnum):
    """What can become of a grid cell."""

    SELF = 0  # it is still a row of its own
    MERGED = 1  # one row stands for it and for other cells
    FUSED = 2  # it is in the one row that takes all that a method gives up
    DROPPED = 3  # no row stands for it
    WAITING = 4  # its row waits while others go through the blocks, and will be back


@dataclass(frozen=True)
class Survival:
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


def survivors(
    slimmed: SlimModel, images: Tensor, *, blocks: Sequence[int] | None = None
) -> list[list[Survival]]:
    """For each image, what became of its grid cells after each of `blocks`.

    Without `blocks`: after those at a quarter, a half and three quarters of the depth; where the
    method has rows wait, after those in which it decides. The last block is traced as if all its
    rows were computed, even where the exact tail skips it.
    """
    depth = slimmed.shape().depth
    chosen = list(_usual(slimmed, depth) if blocks is None else blocks)
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
    dimmed and show their mean colour. Those that wait are blue under stripes, and those that go on
    meanwhile are clear. Where a method remembers something of every patch, a second line of panels
    shows how much, from the least to the most of each panel.

    Args:
        pixels: the image (H, W, 3), as the model saw it before normalising.
        survivals: what became of its cells, after one block or several.
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise WrongInput(
            f"Got pixels of shape {pixels.shape} and type {pixels.dtype}; draw() takes (H, W, 3) "
            "of uint8, the image before it is normalised."
        )
    factor = max(1, -(-PANEL // max(pixels.shape[:2])))
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = large.shape[:2]
    heated = any(survival.heat is not None for survival in survivals)
    size = ((width + GAP) * (len(survivals) + 1) - GAP, (height + CAPTION) * (1 + heated))
    sheet = Images.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)

    def put(panel: Pixels, caption: str, column: int, line: int = 0) -> None:
        left, top = column * (width + GAP), line * (height + CAPTION)
        sheet.paste(Images.fromarray(panel), (left, top))
        middle = (left + width / 2, top + height + CAPTION / 2)
        pen.text(middle, caption, INK, font=_fitting(caption, width), anchor="mm")

    put(large, _whole_caption(survivals), 0)
    several = len({survival.grid for survival in survivals}) > 1
    for column, survival in enumerate(survivals, 1):
        put(_panel(large, survival), _caption(survival, several=several), column)
        if survival.heat is not None:
            put(_heat_panel(large, survival.grid, survival.heat), _range(survival.heat), column, 1)
    if heated:
        put(_scale(height, width), "least to most remembered", 0, 1)
    return sheet


def png(picture: Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _usual(slimmed: SlimModel, depth: int) -> tuple[int, ...]:
    """The blocks that are shown where none are asked for."""
    deciding = slimmed.deciding() if slimmed.reducer.parks else ()
    return deciding or stages(depth) or (0,)


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
    fate = fate.masked_fill(gone, Fate.DROPPED).masked_fill(_waiting(tokens), Fate.WAITING)
    return [
        Survival(block, tokens.grid, tuple(map(Fate, fates)), tuple(places), most, heat)
        for fates, places, heat in zip(fate.tolist(), into.tolist(), _heat(tokens), strict=True)
    ]


def _waiting(tokens: Tokens) -> Tensor:
    """Which grid cells have a row that waits (B, H*W)."""
    parked = tokens.parked
    if parked is None or parked.whole.origin is None:
        return tokens.x.new_zeros((), dtype=torch.bool)
    row = parked.whole.origin
    waits = row.new_ones(len(row), parked.whole.patches).scatter(1, parked.kept, 0)
    return (row >= 0) & (waits.gather(1, row.clamp(min=0)) == 1)


def _heat(tokens: Tokens) -> list[tuple[float, ...] | None]:
    """What the method remembers of every grid cell of each image."""
    every = tokens.rejoined()
    if every.memory is None or every.origin is None:
        return [None] * len(every.x)
    heat = every.memory.gather(1, every.origin.clamp(min=0)).masked_fill(every.origin < 0, 0)
    return [tuple(each) for each in heat.tolist()]


def _whole_caption(survivals: Sequence[Survival]) -> str:
    """How many patches the image has, where all panels have as many."""
    counts = {len(survival.into) for survival in survivals}
    return f"{counts.pop()} patches" if len(counts) == 1 else ""


def _caption(survival: Survival, *, several: bool = False) -> str:
    """Where the panel is, and how many rows are left; of how many, where that is the image's.

    Where there are `several` grids, as in a pyramid, it says how many patches its own has.
    """
    where = f"after block {survival.block}: "
    if survival.waiting:
        return where + f"{survival.slow} slow, {survival.waiting} wait"
    left = f"{survival.left} of {len(survival.into)}" if several else str(survival.left)
    if survival.most is None or survival.most >= len(survival.into):
        return where + f"{left} left"
    return where + f"{left} (cap {survival.most})"


def _range(heat: Sequence[float]) -> str:
    """What the darkest and the brightest colour of a panel stand for."""
    return f"{min(heat):.2g} to {max(heat):.2g}"


def _fitting(caption: str, width: int) -> FreeTypeFont | ImageFont:
    """A font in which the caption is no wider than its panel."""
    from PIL import ImageFont

    font = ImageFont.load_default(LETTERS)
    length = font.getlength(caption)
    return font if length <= width else ImageFont.load_default(LETTERS * width / length)


def _panel(pixels: Pixels, survival: Survival) -> Pixels:
    """The image with every patch shown by its fate."""
    cell = _cells(pixels.shape, survival.grid)
    fate = np.array(survival.fate)[cell]
    group = np.array(survival.into)[cell]
    shown = pixels.astype(np.float32)
    merged, fused = (fate == kind for kind in (Fate.MERGED, Fate.FUSED))
    shown[merged] = (1 - TINT) * shown[merged] + TINT * _tints(survival.grid)[group[merged]]
    shown[fused] = FUSED * (0.2 * shown + 0.8 * _means(shown, group, survival.grid))[fused]
    shown[fate == Fate.DROPPED] *= DROPPED
    _veil(shown, fate == Fate.WAITING)
    edge = _edges(group) & _beside(merged)
    shown[edge] = 0.45 * shown[edge] + 0.55 * np.array(EDGE, np.float32)
    _mark(shown, _from_middle(pixels.shape[:2], survival.grid), merged & (group == cell))
    drawn: Pixels = shown.clip(0, 255).astype(np.uint8)
    return drawn


def _heat_panel(pixels: Pixels, grid: tuple[int, int], heat: Sequence[float]) -> Pixels:
    """The image in grey, under the colours of its heat."""
    heated = np.array(heat, np.float32)
    share = (heated - heated.min()) / max(float(np.ptp(heated)), 1e-30)
    colours = _colours(share)[_cells(pixels.shape, grid)]
    seen = COVER * colours + (1 - COVER) * _brightness(pixels)[:, :, None]
    drawn: Pixels = seen.round().astype(np.uint8)
    return drawn


def _scale(height: int, width: int) -> Pixels:
    """A bar with all the colours of heat, from the least to the most."""
    drawn = np.full((height, width, 3), PAPER, np.uint8)
    side = width // 8
    bar = _colours(np.linspace(0, 1, width - 2 * side, dtype=np.float32))
    drawn[-3 * CAPTION // 4 :, side : side + len(bar)] = bar
    return drawn


def _colours(share: Shades) -> Shades:
    """The colour of each share of the most heat (..., 3)."""
    places = np.linspace(0, 1, len(HEAT))
    anchors = np.array(HEAT, np.float32)
    channels = [np.interp(share, places, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _veil(shown: Shades, waiting: npt.NDArray[np.bool_]) -> None:
    """Puts what waits behind a blue veil with stripes, which run on from patch to patch."""
    dark, light = (np.array(blue, np.float32) for blue in VEIL)
    share = _brightness(shown)[waiting][:, None] / 255
    shown[waiting] = (1 - share) * dark + share * light
    down, across = np.indices(waiting.shape)
    striped = waiting & ((down + across) % STRIPES == 0)
    shown[striped] = (1 - STRIPED) * shown[striped] + STRIPED * np.array(STRIPE, np.float32)


def _brightness(pixels: Pixels | Shades) -> Shades:
    """How bright each pixel is."""
    weights = np.array((0.299, 0.587, 0.114), np.float32)
    bright: Shades = pixels.astype(np.float32) @ weights
    return bright


def _cells(shape: tuple[int, ...], grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The grid cell of each pixel."""
    rows, columns = (np.arange(shape[axis]) * grid[axis] // shape[axis] for axis in range(2))
    cell: npt.NDArray[np.int64] = rows[:, None] * grid[1] + columns[None, :]
    return cell


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
