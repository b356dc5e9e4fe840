"""Draws which patches of an image survive, wait or were merged, from its `PatchMap`s.

This file knows no method and no model. It needs Pillow.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from patchslim.errors import BadFile, WrongInput
from patchslim.files import write_bytes_atomically
from patchslim.report.patch_maps import Fate, PatchMap

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

Pixels = npt.NDArray[np.uint8]
Shades = npt.NDArray[np.float32]

PANEL_SIDE = 176  # least pixels of the longer side of a panel
GAP = 8  # pixels between two panels
CAPTION_HEIGHT = 22
FONT_SIZE = 13  # pixels of the letters of a caption; fewer if it would not fit
BACKGROUND = (250, 250, 248)
TEXT_COLOUR = (70, 70, 74)
EDGE_COLOUR = (255, 255, 255)
DROPPED_BRIGHTNESS = 0.18  # share of its brightness that a dropped patch keeps
FUSED_BRIGHTNESS = 0.45
GROUP_TINT = 0.5  # share of the group's colour in a merged patch
DOT_RADIUS = 0.2  # in cells; the dot marks the patch into which others were merged
DOT_RIM = 1.25  # pixels of a dark rim, so that the dot can be seen on white
# A waiting patch shows its brightness alone, in a shade between these two blues under stripes.
WAITING_BLUES = ((44, 74, 118), (172, 200, 230))
STRIPE_COLOUR = (214, 228, 244)
STRIPE_OPACITY = 0.55
STRIPE_SPACING = 8  # pixels from one stripe to the next, along a row of pixels
# Evenly spaced colours from least to most heat. Dark to bright can be read without a legend.
HEAT_COLOURS = ((10, 8, 38), (84, 18, 109), (187, 55, 84), (249, 142, 20), (252, 250, 160))
HEAT_OPACITY = 0.72  # share of the heat's colour in a patch; the rest is the patch in grey
# How far the hue turns from cell to cell, down and across. Neighbours never look alike.
HUE_STEPS = (0.7548776662, 0.5698402910)


def draw_patches(pixels: Pixels, maps: Sequence[PatchMap]) -> Image:
    """Draws the image and, beside it, one panel for each of `maps`.

    Dropped patches are dark. Patches that were merged are outlined together and tinted in a colour
    of their group, with a dot on the one into which the others were merged. Fused patches are
    dimmed and show their mean colour. Waiting patches are blue under stripes, and those that go on
    meanwhile are clear. If the method remembers something about every patch, a second row of
    panels shows how much, from the least to the most of each panel.

    Args:
        pixels: the image (H, W, 3), as the model saw it before it was normalised.
        maps: what became of its patches, after one block or several.
    """
    from PIL import Image as PillowImage
    from PIL import ImageDraw

    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise WrongInput(
            f"Got pixels of shape {pixels.shape} and type {pixels.dtype}; draw_patches() takes "
            "(H, W, 3) of uint8, the image before it is normalised."
        )
    factor = max(1, -(-PANEL_SIDE // max(pixels.shape[:2])))
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = large.shape[:2]
    has_heat = any(patch_map.heat is not None for patch_map in maps)
    size = ((width + GAP) * (len(maps) + 1) - GAP, (height + CAPTION_HEIGHT) * (1 + has_heat))
    sheet = PillowImage.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(sheet)

    def add_panel(panel: Pixels, caption: str, column: int, row: int = 0) -> None:
        left, top = column * (width + GAP), row * (height + CAPTION_HEIGHT)
        sheet.paste(PillowImage.fromarray(panel), (left, top))
        middle = (left + width / 2, top + height + CAPTION_HEIGHT / 2)
        pen.text(middle, caption, TEXT_COLOUR, font=_fit_font(caption, width), anchor="mm")

    patch_counts = {len(patch_map.into) for patch_map in maps}
    add_panel(large, f"{patch_counts.pop()} patches" if len(patch_counts) == 1 else "", 0)
    several = len({patch_map.grid for patch_map in maps}) > 1
    for column, patch_map in enumerate(maps, 1):
        add_panel(_draw_panel(large, patch_map), _caption(patch_map, several=several), column)
        heat = patch_map.heat
        if heat is not None:
            extremes = f"{min(heat):.2g} to {max(heat):.2g}"
            add_panel(_draw_heat_panel(large, patch_map.grid, heat), extremes, column, 1)
    if has_heat:
        add_panel(_draw_heat_scale(height, width), "least to most remembered", 0, 1)
    return sheet


def find_picture_format(path: Path) -> str:
    """The format in which Pillow writes a file of this name."""
    from PIL import Image

    found = Image.registered_extensions().get(path.suffix.lower())
    if found not in Image.SAVE:
        raise BadFile(f"{path}: a picture is saved as .png, .jpg or .webp. Give such a name.")
    return str(found)


def save_picture(picture: Image, path: Path) -> None:
    """Writes a picture, whole or not at all."""
    stream = io.BytesIO()
    try:
        picture.save(stream, format=find_picture_format(path))
    except (OSError, ValueError, KeyError) as error:
        raise BadFile(f"{path}: the picture cannot be saved so: {error}. Give a .png.") from error
    write_bytes_atomically(path, stream.getvalue())


def encode_png(picture: Image) -> bytes:
    """Returns the picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _caption(patch_map: PatchMap, *, several: bool = False) -> str:
    """Says which block the panel shows, and how many patch tokens are left or wait after it.

    If the panels have `several` grids, as in a pyramid, it also says how many patches this one's
    grid has. If images keep numbers of their own, it names the most that any image keeps.
    """
    where = f"after block {patch_map.block}: "
    if patch_map.waiting:
        return where + f"{patch_map.slow} slow, {patch_map.waiting} wait"
    left = f"{patch_map.left} of {len(patch_map.into)}" if several else str(patch_map.left)
    if patch_map.most is None or patch_map.most >= len(patch_map.into):
        return where + f"{left} left"
    return where + f"{left} (cap {patch_map.most})"


def _fit_font(caption: str, width: int) -> FreeTypeFont | ImageFont:
    """Returns a font in which the caption is no wider than its panel."""
    from PIL import ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    length = font.getlength(caption)
    return font if length <= width else ImageFont.load_default(FONT_SIZE * width / length)


def _draw_panel(pixels: Pixels, patch_map: PatchMap) -> Pixels:
    """Returns the image with every patch shown by its fate."""
    grid = patch_map.grid
    cell = _cell_of_pixels(pixels.shape, grid)
    fate = np.array(patch_map.fate)[cell]
    group = np.array(patch_map.into)[cell]
    shown = pixels.astype(np.float32)
    merged, fused = fate == Fate.MERGED, fate == Fate.FUSED
    tints = _cell_tints(grid)[group[merged]]
    shown[merged] = (1 - GROUP_TINT) * shown[merged] + GROUP_TINT * tints
    faded = 0.2 * shown + 0.8 * _group_means(shown, group, grid)
    shown[fused] = FUSED_BRIGHTNESS * faded[fused]
    shown[fate == Fate.DROPPED] *= DROPPED_BRIGHTNESS
    _draw_waiting(shown, fate == Fate.WAITING)
    edge = _find_edges(group) & _grow_mask(merged)
    shown[edge] = 0.45 * shown[edge] + 0.55 * np.array(EDGE_COLOUR, np.float32)
    _draw_dots(shown, merged & (group == cell), grid)
    panel: Pixels = shown.clip(0, 255).astype(np.uint8)
    return panel


def _draw_heat_panel(pixels: Pixels, grid: tuple[int, int], heat: Sequence[float]) -> Pixels:
    """Returns the image in grey, under the colours of its heat."""
    values = np.array(heat, np.float32)
    share = (values - values.min()) / max(float(np.ptp(values)), 1e-30)
    colours = _heat_to_colour(share)[_cell_of_pixels(pixels.shape, grid)]
    mixed = HEAT_OPACITY * colours + (1 - HEAT_OPACITY) * _brightness(pixels)[:, :, None]
    panel: Pixels = mixed.round().astype(np.uint8)
    return panel


def _draw_heat_scale(height: int, width: int) -> Pixels:
    """Returns a panel with a bar of all the colours of heat, from the least to the most."""
    panel = np.full((height, width, 3), BACKGROUND, np.uint8)
    margin = width // 8
    bar = _heat_to_colour(np.linspace(0, 1, width - 2 * margin, dtype=np.float32))
    panel[-3 * CAPTION_HEIGHT // 4 :, margin : margin + len(bar)] = bar
    return panel


def _heat_to_colour(share: Shades) -> Shades:
    """Returns the colours (..., 3) of shares from 0 (least heat) to 1 (most)."""
    positions = np.linspace(0, 1, len(HEAT_COLOURS))
    anchors = np.array(HEAT_COLOURS, np.float32)
    channels = [np.interp(share, positions, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _draw_waiting(shown: Shades, waiting: npt.NDArray[np.bool_]) -> None:
    """Colours waiting patches blue, in place, under stripes that run on from patch to patch."""
    dark, light = (np.array(blue, np.float32) for blue in WAITING_BLUES)
    share = _brightness(shown)[waiting][:, None] / 255
    shown[waiting] = (1 - share) * dark + share * light
    down, across = np.indices(waiting.shape)
    striped = waiting & ((down + across) % STRIPE_SPACING == 0)
    shown[striped] = (1 - STRIPE_OPACITY) * shown[striped] + STRIPE_OPACITY * np.array(
        STRIPE_COLOUR, np.float32
    )


def _brightness(pixels: Pixels | Shades) -> Shades:
    """Returns how bright each pixel is, from 0 to 255."""
    weights = np.array((0.299, 0.587, 0.114), np.float32)
    bright: Shades = pixels.astype(np.float32) @ weights
    return bright


def _cell_of_pixels(shape: tuple[int, ...], grid: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Returns the grid cell of each pixel."""
    rows, columns = (np.arange(shape[axis]) * grid[axis] // shape[axis] for axis in range(2))
    cell: npt.NDArray[np.int64] = rows[:, None] * grid[1] + columns[None, :]
    return cell


def _cell_tints(grid: tuple[int, int]) -> Shades:
    """Returns a colour for each cell, by which the group merged into it is tinted.

    It depends on the cell alone, so a group has the same colour after every block.
    """
    down, across = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    hues = (down * HUE_STEPS[0] + across * HUE_STEPS[1]) % 1
    return np.array([colorsys.hls_to_rgb(hue, 0.5, 1.0) for hue in hues], np.float32) * 255


def _draw_dots(shown: Shades, cells: npt.NDArray[np.bool_], grid: tuple[int, int]) -> None:
    """Draws a dot in the middle of each of `cells`, in place; none if cells are too small.

    Args:
        shown: the panel (H, W, 3).
        cells: the pixels (H, W) of the cells that get a dot.
        grid: height and width of the grid.
    """
    sides = [pixels / count for pixels, count in zip(cells.shape, grid, strict=True)]
    radius = DOT_RADIUS * min(sides)
    if radius < 1:
        return
    down, across = (
        np.abs((np.arange(pixels) + 0.5) % side - side / 2)
        for pixels, side in zip(cells.shape, sides, strict=True)
    )
    distance = np.hypot(down[:, None], across[None, :]).astype(np.float32)
    shown[cells & (distance <= radius + DOT_RIM)] = TEXT_COLOUR
    shown[cells & (distance <= radius)] = EDGE_COLOUR


def _group_means(pixels: Shades, group: npt.NDArray[np.int64], grid: tuple[int, int]) -> Shades:
    """Returns for each pixel the mean colour of its group."""
    index = group.ravel() + 1  # dropped cells are group -1
    count = np.bincount(index, minlength=grid[0] * grid[1] + 1).clip(min=1)
    sums = [np.bincount(index, pixels[:, :, c].ravel(), count.size) for c in range(3)]
    means: Shades = (np.stack(sums, axis=1) / count[:, None])[index].reshape(pixels.shape)
    return means.astype(np.float32)


def _find_edges(group: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Returns the pixels whose right or lower neighbour is of another group."""
    edge = np.zeros(group.shape, bool)
    edge[:, :-1] |= group[:, :-1] != group[:, 1:]
    edge[:-1] |= group[:-1] != group[1:]
    return edge


def _grow_mask(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Grows the mask by a pixel to the left and upwards, where `_find_edges` puts edges."""
    grown = mask.copy()
    grown[:, :-1] |= mask[:, 1:]
    grown[:-1] |= mask[1:]
    return grown
