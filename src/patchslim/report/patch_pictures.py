"""Pictures of which patches survive, wait or became one. They know no method, and need Pillow."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from patchslim.errors import WrongInput
from patchslim.report.patch_maps import Fate, PatchMap

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont
Pixels = npt.NDArray[np.uint8]
Shades = npt.NDArray[np.float32]
PANEL_SIDE = 176  # pixels that the longer side of a panel has at least
GAP = 8
CAPTION_HEIGHT = 22
FONT_SIZE = 13  # pixels that letters of a caption have, where it fits
BACKGROUND = (250, 250, 248)
TEXT_COLOUR = (70, 70, 74)
EDGE_COLOUR = (255, 255, 255)
DROPPED_BRIGHTNESS = 0.18  # how bright a dropped patch is still shown
FUSED_BRIGHTNESS = 0.45
GROUP_TINT = 0.5  # how much of a patch that is merged shows the colour of its group
DOT_RADIUS = 0.2  # radius of the mark of the patch that others joined, in cells
DOT_RIM = 1.25  # pixels of the dark rim, which shows the mark on white
# A patch that waits shows its brightness alone, between these two blues, under thin stripes.
WAITING_BLUES = ((44, 74, 118), (172, 200, 230))
STRIPE_COLOUR = (214, 228, 244)
STRIPE_OPACITY = 0.55  # how much of a stripe covers the patch
STRIPE_SPACING = 8  # pixels from one stripe to the next, along a line
# The scale of heat, evenly spaced: from dark to bright, so that it is read without a legend.
HEAT_COLOURS = ((10, 8, 38), (84, 18, 109), (187, 55, 84), (249, 142, 20), (252, 250, 160))
HEAT_OPACITY = 0.72  # how much of a patch shows the colour of its heat, and not its brightness
# How far the hue turns from cell to cell, down and across: so no two neighbours are alike.
HUE_STEPS = (0.7548776662, 0.5698402910)


def draw_patches(pixels: Pixels, survivals: Sequence[PatchMap]) -> Image:
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
    factor = max(1, -(-PANEL_SIDE // max(pixels.shape[:2])))
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = large.shape[:2]
    heated = any(survival.heat is not None for survival in survivals)
    size = ((width + GAP) * (len(survivals) + 1) - GAP, (height + CAPTION_HEIGHT) * (1 + heated))
    sheet = Images.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)

    def put(panel: Pixels, caption: str, column: int, line: int = 0) -> None:
        left, top = column * (width + GAP), line * (height + CAPTION_HEIGHT)
        sheet.paste(Images.fromarray(panel), (left, top))
        middle = (left + width / 2, top + height + CAPTION_HEIGHT / 2)
        pen.text(middle, caption, TEXT_COLOUR, font=_fit_font(caption, width), anchor="mm")

    put(large, _image_caption(survivals), 0)
    several = len({survival.grid for survival in survivals}) > 1
    for column, survival in enumerate(survivals, 1):
        put(_draw_panel(large, survival), _caption(survival, several=several), column)
        if survival.heat is not None:
            put(
                _draw_heat_panel(large, survival.grid, survival.heat),
                _format_range(survival.heat),
                column,
                1,
            )
    if heated:
        put(_draw_heat_scale(height, width), "least to most remembered", 0, 1)
    return sheet


def encode_png(picture: Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _image_caption(survivals: Sequence[PatchMap]) -> str:
    """How many patches the image has, where all panels have as many."""
    counts = {len(survival.into) for survival in survivals}
    return f"{counts.pop()} patches" if len(counts) == 1 else ""


def _caption(survival: PatchMap, *, several: bool = False) -> str:
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


def _format_range(heat: Sequence[float]) -> str:
    """What the darkest and the brightest colour of a panel stand for."""
    return f"{min(heat):.2g} to {max(heat):.2g}"


def _fit_font(caption: str, width: int) -> FreeTypeFont | ImageFont:
    """A font in which the caption is no wider than its panel."""
    from PIL import ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    length = font.getlength(caption)
    return font if length <= width else ImageFont.load_default(FONT_SIZE * width / length)


def _draw_panel(pixels: Pixels, survival: PatchMap) -> Pixels:
    """The image with every patch shown by its fate."""
    cell = _cell_of_pixels(pixels.shape, survival.grid)
    fate = np.array(survival.fate)[cell]
    group = np.array(survival.into)[cell]
    shown = pixels.astype(np.float32)
    merged, fused = (fate == kind for kind in (Fate.MERGED, Fate.FUSED))
    shown[merged] = (1 - GROUP_TINT) * shown[merged] + GROUP_TINT * _cell_tints(survival.grid)[
        group[merged]
    ]
    shown[fused] = (
        FUSED_BRIGHTNESS * (0.2 * shown + 0.8 * _group_means(shown, group, survival.grid))[fused]
    )
    shown[fate == Fate.DROPPED] *= DROPPED_BRIGHTNESS
    _draw_waiting(shown, fate == Fate.WAITING)
    edge = _find_edges(group) & _grow_mask(merged)
    shown[edge] = 0.45 * shown[edge] + 0.55 * np.array(EDGE_COLOUR, np.float32)
    _draw_dots(
        shown, _distance_to_centre(pixels.shape[:2], survival.grid), merged & (group == cell)
    )
    drawn: Pixels = shown.clip(0, 255).astype(np.uint8)
    return drawn


def _draw_heat_panel(pixels: Pixels, grid: tuple[int, int], heat: Sequence[float]) -> Pixels:
    """The image in grey, under the colours of its heat."""
    heated = np.array(heat, np.float32)
    share = (heated - heated.min()) / max(float(np.ptp(heated)), 1e-30)
    colours = _heat_to_colour(share)[_cell_of_pixels(pixels.shape, grid)]
    seen = HEAT_OPACITY * colours + (1 - HEAT_OPACITY) * _brightness(pixels)[:, :, None]
    drawn: Pixels = seen.round().astype(np.uint8)
    return drawn


def _draw_heat_scale(height: int, width: int) -> Pixels:
    """A bar with all the colours of heat, from the least to the most."""
    drawn = np.full((height, width, 3), BACKGROUND, np.uint8)
    side = width // 8
    bar = _heat_to_colour(np.linspace(0, 1, width - 2 * side, dtype=np.float32))
    drawn[-3 * CAPTION_HEIGHT // 4 :, side : side + len(bar)] = bar
    return drawn


def _heat_to_colour(share: Shades) -> Shades:
    """The colour of each share of the most heat (..., 3)."""
    places = np.linspace(0, 1, len(HEAT_COLOURS))
    anchors = np.array(HEAT_COLOURS, np.float32)
    channels = [np.interp(share, places, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _draw_waiting(shown: Shades, waiting: npt.NDArray[np.bool_]) -> None:
    """Puts what waits behind a blue veil with stripes, which run on from patch to patch."""
    dark, light = (np.array(blue, np.float32) for blue in WAITING_BLUES)
    share = _brightness(shown)[waiting][:, None] / 255
    shown[waiting] = (1 - share) * dark + share * light
    down, across = np.indices(waiting.shape)
    striped = waiting & ((down + across) % STRIPE_SPACING == 0)
    shown[striped] = (1 - STRIPE_OPACITY) * shown[striped] + STRIPE_OPACITY * np.array(
        STRIPE_COLOUR, np.float32
    )


def _brightness(pixels: Pixels | Shades) -> Shades:
    """How bright each pixel is."""
    weights = np.array((0.299, 0.587, 0.114), np.float32)
    bright: Shades = pixels.astype(np.float32) @ weights
    return bright


def _cell_of_pixels(shape: tuple[int, ...], grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The grid cell of each pixel."""
    rows, columns = (np.arange(shape[axis]) * grid[axis] // shape[axis] for axis in range(2))
    cell: npt.NDArray[np.int64] = rows[:, None] * grid[1] + columns[None, :]
    return cell


def _cell_tints(grid: tuple[int, int]) -> Shades:
    """A colour for each cell, for the group that joined it: the same after every block."""
    down, across = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    hues = (down * HUE_STEPS[0] + across * HUE_STEPS[1]) % 1
    return np.array([colorsys.hls_to_rgb(hue, 0.5, 1.0) for hue in hues], np.float32) * 255


def _distance_to_centre(shape: tuple[int, ...], grid: tuple[int, int]) -> tuple[Shades, float]:
    """How far each pixel is from the middle of its cell, in pixels; and the side of a cell."""
    sides = [shape[0] / grid[0], shape[1] / grid[1]]
    down, across = (
        np.abs((np.arange(pixels) + 0.5) % side - side / 2)
        for pixels, side in zip(shape, sides, strict=True)
    )
    distance: Shades = np.hypot(down[:, None], across[None, :]).astype(np.float32)
    return distance, min(sides)


def _draw_dots(shown: Shades, middle: tuple[Shades, float], cells: npt.NDArray[np.bool_]) -> None:
    """Puts a dot into the middle of each cell of `cells`, unless cells are too small for dots."""
    distance, side = middle
    radius = DOT_RADIUS * side
    if radius >= 1:
        shown[cells & (distance <= radius + DOT_RIM)] = TEXT_COLOUR
        shown[cells & (distance <= radius)] = EDGE_COLOUR


def _group_means(pixels: Shades, group: npt.NDArray[np.int64], grid: tuple[int, int]) -> Shades:
    """For each pixel the mean colour of its group."""
    index = group.ravel() + 1  # dropped cells are group -1
    count = np.bincount(index, minlength=grid[0] * grid[1] + 1).clip(min=1)
    sums = [np.bincount(index, pixels[:, :, c].ravel(), count.size) for c in range(3)]
    means: Shades = (np.stack(sums, axis=1) / count[:, None])[index].reshape(pixels.shape)
    return means.astype(np.float32)


def _find_edges(group: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """The pixels whose right or lower neighbour is of another group."""
    edge = np.zeros(group.shape, bool)
    edge[:, :-1] |= group[:, :-1] != group[:, 1:]
    edge[:-1] |= group[:-1] != group[1:]
    return edge


def _grow_mask(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask, grown by one pixel to the left and upwards, so that it meets its own edges."""
    grown = mask.copy()
    grown[:, :-1] |= mask[:, 1:]
    grown[:-1] |= mask[1:]
    return grown
