"""Duplicates of the input on pages and screens: ten of them, on DeiT-Ti at 224 and 448 px.

    python benchmarks/documents.py --shared ../shared
    python benchmarks/documents.py --pages pages      # writes the images there, and stops

The images are drawn here: text, a table, a form, windows, an editor, a chart, a scan, a picture
between black bars, a slide. For each setting of `duplicates`: patches left, operations, speed-up
over the dense model in the same run, and how far the answer is from the dense one, on the host as
it is and without its positions. `tome` is measured beside them, at the cost of two of the windows.
Writes benchmarks/results/documents.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

import patchslim
from patchslim.hosts._preprocessing import find_preprocessing
from patchslim.measurement.latency import latency
from patchslim.measurement.score import kl_divergence
from patchslim.methods.duplicates import Duplicates
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles

RESULT = Path(__file__).parent / "results" / "documents.json"
SIZES = (224, 448)
SETTINGS = {
    "whole image": Duplicates(),
    "window=8": Duplicates(window=8),
    "window=4": Duplicates(window=4),
    "window=2": Duplicates(window=2),
    "tolerance=0.05": Duplicates(tolerance=0.05),
    "tolerance=0.2": Duplicates(tolerance=0.2),
}
BESIDE = ("window=4", "window=2")  # whose cost `tome` is given
WARMUP = 1
WORDS = (
    "the of patch token page which and each image block mean size keep near row head value query "
    "order same count before after between window answer weight table figure"
).split()
Colour = tuple[int, int, int]
WHITE, BLACK, GREY, BLUE = (255, 255, 255), (20, 20, 20), (205, 208, 212), (37, 99, 235)
GREEN, RED, DARK, PALE = (5, 150, 105), (220, 60, 50), (30, 31, 38), (243, 244, 246)


class Sheet:
    """Picture of 224 units a side, drawn with `scale` pixels a unit."""

    def __init__(self, scale: int, ground: Colour, seed: int) -> None:
        self.scale = scale
        self.image = Image.new("RGB", (224 * scale, 224 * scale), ground)
        self.pen = ImageDraw.Draw(self.image)
        self.lots = random.Random(seed)

    def box(
        self, at: tuple[float, float, float, float], fill: Colour | None, line: Colour | None = None
    ) -> None:
        """Draws a rectangle of left, top, right, bottom."""
        left, top, right, bottom = (round(each * self.scale) for each in at)
        self.pen.rectangle((left, top, right - 1, bottom - 1), fill, line, width=self.scale)

    def line(self, points: list[tuple[float, float]], colour: Colour) -> None:
        """Draws a line through points."""
        whole = [(round(x * self.scale), round(y * self.scale)) for x, y in points]
        self.pen.line(whole, colour, width=self.scale)

    def text(
        self, at: tuple[float, float], words: str, colour: Colour = BLACK, size: int = 7
    ) -> None:
        """Writes words, with their upper left corner at a point."""
        font = ImageFont.load_default(size * self.scale)
        self.pen.text((at[0] * self.scale, at[1] * self.scale), words, colour, font)

    def words(self, many: int) -> str:
        """Draws so many words at random."""
        return " ".join(self.lots.choices(WORDS, k=many))

    def lines(self, at: tuple[float, float], many: int, words: int, colour: Colour = BLACK) -> None:
        """Writes lines of words, the last one short."""
        for number in range(many):
            count = words if number < many - 1 else words // 2
            self.text((at[0], at[1] + 9 * number), self.words(count), colour)


def letter(scale: int) -> Sheet:
    """Draws a page of text with margins."""
    sheet = Sheet(scale, WHITE, 0)
    sheet.text((24, 20), "Patches and pages", size=12)
    sheet.lines((24, 48), 5, 7)
    sheet.lines((24, 102), 6, 7)
    sheet.text((24, 172), "Yours, a reader")
    return sheet


def paper(scale: int) -> Sheet:
    """Draws two columns with a figure."""
    sheet = Sheet(scale, WHITE, 1)
    sheet.text((40, 10), "On the sameness of paper", size=11)
    sheet.lines((14, 34), 19, 4)
    sheet.lines((118, 34), 8, 4)
    sheet.box((118, 112, 210, 176), PALE, BLACK)
    sheet.line([(126, 168), (150, 140), (176, 150), (202, 120)], BLUE)
    sheet.lines((118, 182), 2, 4)
    return sheet


def table(scale: int) -> Sheet:
    """Draws numbers in cells."""
    sheet = Sheet(scale, WHITE, 2)
    sheet.box((12, 16, 212, 32), GREY)
    for row in range(13):
        top = 16 + 14 * row
        sheet.line([(12, top), (212, top)], BLACK)
        for column in range(5):
            number = f"{sheet.lots.uniform(0, 100):.1f}" if row else f"col {column}"
            if row < 12:
                sheet.text((18 + 40 * column, top + 3), number)
    for column in range(6):
        sheet.line([(12 + 40 * column, 16), (12 + 40 * column, 184)], BLACK)
    return sheet


def form(scale: int) -> Sheet:
    """Draws labels and empty fields."""
    sheet = Sheet(scale, PALE, 3)
    sheet.box((16, 12, 208, 212), WHITE)
    for row, label in enumerate(("Name", "Street", "Town", "Country", "Telephone")):
        sheet.text((28, 26 + 30 * row), label)
        sheet.box((92, 22 + 30 * row, 196, 40 + 30 * row), WHITE, GREY)
    sheet.box((28, 178, 36, 186), WHITE, BLACK)
    sheet.text((42, 177), "I agree")
    sheet.box((148, 184, 196, 202), BLUE)
    sheet.text((160, 189), "Send", WHITE)
    return sheet


def windows(scale: int) -> Sheet:
    """Draws a desktop with flat windows and buttons."""
    sheet = Sheet(scale, (16, 94, 124), 4)
    sheet.box((0, 208, 224, 224), DARK)
    sheet.text((6, 212), "start", WHITE)
    for left, top, right, bottom in ((20, 20, 140, 120), (90, 70, 212, 190)):
        sheet.box((left, top, right, bottom), PALE, GREY)
        sheet.box((left, top, right, top + 12), BLUE)
        sheet.text((left + 4, top + 2), sheet.words(2), WHITE)
        sheet.box((right - 10, top + 2, right - 2, top + 10), RED)
        for row in range(3):
            sheet.text((left + 10, top + 22 + 12 * row), sheet.words(3))
        for button in (0, 1):
            at = left + 20 + 46 * button
            sheet.box((at, bottom - 20, at + 38, bottom - 8), GREY)
            sheet.text((at + 8, bottom - 18), ("yes", "no")[button])
    return sheet


def editor(scale: int) -> Sheet:
    """Draws code on a dark ground."""
    sheet = Sheet(scale, DARK, 5)
    sheet.box((0, 0, 40, 224), (24, 24, 30))
    sheet.box((0, 214, 224, 224), BLUE)
    for row in range(5):
        sheet.text((4, 8 + 10 * row), sheet.words(1), GREY, size=6)
    colours = (GREEN, GREY, (200, 160, 90), (150, 140, 230))
    for row in range(21):
        sheet.text((46, 6 + 9 * row), f"{row + 1:2}", (90, 92, 100), size=6)
        left = 60 + 10 * sheet.lots.randrange(4)
        for _ in range(sheet.lots.randrange(4)):
            sheet.text((left, 6 + 9 * row), sheet.words(1), sheet.lots.choice(colours), size=6)
            left += 32
    return sheet


def chart(scale: int) -> Sheet:
    """Draws bars, and a line over them."""
    sheet = Sheet(scale, WHITE, 6)
    sheet.text((60, 8), "tokens a page", size=10)
    sheet.line([(28, 24), (28, 196), (212, 196)], BLACK)
    tops = [sheet.lots.uniform(40, 170) for _ in range(7)]
    for bar, top in enumerate(tops):
        sheet.box((36 + 25 * bar, top, 52 + 25 * bar, 196), (BLUE, GREEN)[bar % 2])
        sheet.text((40 + 25 * bar, 202), str(bar))
        sheet.text((6, 188 - 24 * bar), str(20 * bar), size=6)
    sheet.line([(44 + 25 * bar, top - 10) for bar, top in enumerate(tops)], RED)
    return sheet


def scan(scale: int) -> Sheet:
    """Draws a page on a scanner's black lid; the sensor errs by a level or two."""
    sheet = Sheet(scale, (12, 12, 12), 7)
    sheet.box((18, 10, 206, 214), (246, 244, 238))
    sheet.lines((36, 30), 9, 6)
    sheet.lines((36, 124), 7, 6)
    return _noisy(sheet, 1.0)


def picture(scale: int) -> Sheet:
    """Draws something like a photograph between black bars."""
    sheet = Sheet(scale, (0, 0, 0), 8)
    side = 224 * scale
    across = np.linspace(0, 1, side)[None, :, None]
    down = np.linspace(0, 1, side)[:, None, None]
    waves = np.sin(9 * across + 5 * down) * np.cos(7 * down - 3 * across)
    levels = 128 + 60 * waves + np.array([40, 0, -40]) * (across - down)
    noise = np.random.default_rng(8).normal(0, 6, (side, side, 1))
    photo = Image.fromarray((levels + noise).clip(0, 255).astype(np.uint8))
    top, bottom = 48 * scale, 176 * scale
    sheet.image.paste(photo.crop((0, top, side, bottom)), (0, top))
    return sheet


def slide(scale: int) -> Sheet:
    """Draws a title and three points on a coloured ground."""
    sheet = Sheet(scale, (238, 242, 255), 9)
    sheet.box((0, 0, 224, 40), (49, 46, 129))
    sheet.text((12, 10), "Fewer patches", WHITE, size=16)
    for row in range(3):
        sheet.box((16, 66 + 36 * row, 22, 72 + 36 * row), RED)
        sheet.text((30, 62 + 36 * row), sheet.words(4), size=10)
    sheet.text((196, 208), "9", size=8)
    return sheet


PAGES: tuple[Callable[[int], Sheet], ...] = (
    letter,
    paper,
    table,
    form,
    windows,
    editor,
    chart,
    scan,
    picture,
    slide,
)


def _noisy(sheet: Sheet, levels: float) -> Sheet:
    """Adds an error of so many levels (standard deviation) to every pixel."""
    pixels = np.asarray(sheet.image, dtype=np.float64)
    noise = np.random.default_rng(7).normal(0, levels, pixels.shape)
    noisy = (pixels + noise).round().clip(0, 255).astype(np.uint8)
    sheet.image.paste(Image.fromarray(noisy))
    return sheet


def drawn(size: int) -> dict[str, Image.Image]:
    """Draws the ten images by name, `size` pixels a side."""
    return {page.__name__: page(size // 224).image for page in PAGES}


def prepared(pictures: dict[str, Image.Image], host: nn.Module) -> Tensor:
    """Normalises the pixels as the host needs them, at the size at which they were drawn."""
    recipe = find_preprocessing(host, patchslim.find_adapter(host))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (recipe.mean, recipe.std))
    pixels = [torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in pictures.values()]
    return (torch.stack(pixels).float() / 255 - mean) / std


def loaded(data: Path, size: int) -> nn.Module:
    """Loads DeiT-Ti with its weights; resamples its positions to this size as timm does."""
    host: nn.Module = timm.create_model("deit_tiny_patch16_224", img_size=size).eval()
    file = data / "deit_tiny_patch16_224.safetensors"
    timm.models.load_checkpoint(host, str(file), filter_fn=checkpoint_filter_fn)
    return host


def without_positions(host: nn.Module) -> nn.Module:
    """Copies the host with all positions zero."""
    bare = copy.deepcopy(host)
    with torch.no_grad():
        bare.get_parameter("pos_embed").zero_()
    return bare


def one_by_one(model: nn.Module, images: Tensor) -> list[Any]:
    """Computes the answers to the images, each alone."""
    return [model(image) for image in images.split(1)]


def answers(model: SlimModel, images: Tensor) -> dict[str, Any]:
    """Measures how far the answers are from those of the host."""
    dense, got = model.host(images), model(images)
    return {
        "largest_difference": float((dense - got).abs().max()),
        "largest_logit": float(dense.abs().max()),
        "kl": float(kl_divergence(dense, got).mean()),
        "same_top1": int((dense.argmax(dim=1) == got.argmax(dim=1)).sum()),
    }


def costs(model: SlimModel, images: Tensor) -> dict[str, Any]:
    """Counts patches left of each image, and operations as a share of the host's."""
    spent = model.macs_of(images)
    left = [cost.rows[-1] - model.plan.shape.prefix for cost in spent]
    dense = model.dense_macs().total
    return {
        "patches": model.plan.shape.entering - model.plan.shape.prefix,
        "left": left,
        "macs_share": statistics.mean(cost.total for cost in spent) / dense,
        "choosing_share": statistics.mean(cost.choosing for cost in spent) / dense,
    }


def speeds(models: dict[str, SlimModel], images: Tensor, repeats: int) -> dict[str, Any]:
    """Measures the speed-up of each model over the dense host: images alone, and in one batch."""
    dense = next(iter(models.values())).host
    calls: dict[str, nn.Module] = {"dense": dense, **models}
    alone = {name: partial(one_by_one, model) for name, model in calls.items()}
    taken = {
        "alone": latency(alone, images, repeats, WARMUP, progress=_said),
        "batch": latency(calls, images, repeats, WARMUP, progress=_said),
    }
    return {
        name: {
            how: vars(Quartiles.of([d / s for d, s in zip(each["dense"], each[name], strict=True)]))
            for how, each in taken.items()
        }
        for name in models
    }


def _said(line: str) -> None:
    print(line, end="\r", flush=True)


@torch.inference_mode()
def rows_of(host: nn.Module, images: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Makes one row for each setting, and for `tome` at the cost of some of them."""
    models = {name: patchslim.slim(host, method) for name, method in SETTINGS.items()}
    spent = {name: costs(model, images) for name, model in models.items()}
    for name in BESIDE:
        beside = f"`tome` at the MACs of {name}"
        share = spent[name]["macs_share"]
        models[beside] = patchslim.slim(host, "tome", macs=share, tail="full")
        spent[beside] = costs(models[beside], images)
    bare = without_positions(host)
    speedup = speeds(models, images, repeats)
    rows = []
    for name, model in models.items():
        twin = SlimModel(
            bare,
            plan_schedule(bare, model.plan.adapter, model.method, model.schedule, model.plan.tail),
        )
        row = {
            "name": name,
            "size": images.shape[-1],
            **spent[name],
            "speedup": speedup[name],
            "positions": answers(model, images),
            "no_positions": answers(twin, images),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Draws, measures both sizes and writes one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pages", type=Path, help="a folder: write the images there, and stop")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.pages is not None:
        options.pages.mkdir(parents=True, exist_ok=True)
        for size in SIZES:
            for name, image in drawn(size).items():
                image.save(options.pages / f"{name}_{size}.png")
        return
    rows, provenances = [], []
    for size in SIZES:
        host = loaded(options.shared / "data", size)
        images = prepared(drawn(size), host)
        rows += rows_of(host, images, options.repeats)
        count = len(images)
        provenance = Provenance.now(
            host, batch=count, image_size=(size, size), images=count, seed=0
        )
        provenances.append(asdict(provenance))
    names = [page.__name__ for page in PAGES]
    data = {"pages": names, "repeats": options.repeats, "rows": rows, "births": provenances}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
