"""Draws the picture in README: which patches of one embedded scene survive, by two methods.

    python benchmarks/picture.py    # writes docs/images/survives.png

The scene and the model are the embedded example, so the picture is ours to ship.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

import patchslim
from patchslim.example import digits
from patchslim.report.patch_maps import trace_patches
from patchslim.report.patch_pictures import draw_patches

OUT = Path(__file__).resolve().parent.parent / "docs" / "images" / "survives.png"
SCENE = 2  # of the test scenes; little noise, so the file is small
METHODS = ("evit", "similarity")
BUDGET = 0.6
COLOURS = 128


def draw_methods(scene: int) -> Image.Image:
    """Draws one line of panels a method: the scene, and what is left of it after three blocks."""
    scenes = digits.scenes("test", scene + 1)
    pixels, images = scenes.images[scene], digits.normalise(scenes.images[scene:])
    lines = []
    for method in METHODS:
        slimmed = patchslim.slim(digits.host(), method, macs=BUDGET)
        lines.append(draw_patches(pixels, trace_patches(slimmed, images)[0]))
    sheet = Image.new("RGB", (lines[0].width, sum(line.height for line in lines)))
    for index, line in enumerate(lines):
        sheet.paste(line, (0, index * line.height))
    return sheet


def main() -> None:
    """Writes the picture with few colours, so that it stays small."""
    OUT.parent.mkdir(parents=True, exist_ok=True)
    draw_methods(SCENE).quantize(COLOURS, dither=Image.Dither.NONE).save(OUT, optimize=True)
    print(f"wrote {OUT.name}, {OUT.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
