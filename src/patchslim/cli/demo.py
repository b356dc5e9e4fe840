"""`demo`: the embedded example, halved by every method, measured and shown.

It combines the public functions on data that ships with the package; it computes nothing itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from patchslim.calibration.calibrate import calibrate, must_be_calibrated
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.cli.demo_runtimes import RuntimeRow, compare_runtimes, write_note
from patchslim.errors import BadSchedule, DeepCut, NeedsClassToken, Untrained
from patchslim.example import digits
from patchslim.files import check_writable, write_atomically
from patchslim.measurement.latency import use_threads
from patchslim.measurement.measure import measure
from patchslim.measurement.score import Batch
from patchslim.methods._method import needs_no_budget
from patchslim.methods._registry import find_method, method_names
from patchslim.model.model import SlimModel
from patchslim.model.slim import slim
from patchslim.report.html import Picture, render_page
from patchslim.report.patch_maps import trace_patches
from patchslim.report.patch_pictures import draw_patches, encode_png
from patchslim.report.report import Report
from patchslim.runs.progress import Progress, ignore_progress

BUDGETS = (0.5,)
PICTURED_SCENES = 2  # scenes drawn for each method
REPEATS = 5
SCORING_BATCH = 50  # scenes per batch when accuracy is measured
# Few images, so that calibration takes a quarter of the time of measuring. More would help
# patch_slimming, which keeps the same positions in all scenes, but not patch_slimming_dynamic.
SEARCH = PatchSlimmingConfig(mode="free", images=16, probe=4, batch=16)
STATIC = "patch_slimming"
EXPORTED_METHOD = "similarity"  # shown on other runtimes, beside dense
TIMED_SCENES = 8  # in a call, there
TITLE = "Reading a digit in clutter with fewer patch tokens"


@dataclass(frozen=True)
class Demo:
    """What the demo has measured.

    Attributes:
        report: every method at every budget.
        runtimes: one method and the dense model, exported, on every runtime that is installed.
        missing: a line for each runtime that is not.
    """

    report: Report
    runtimes: list[RuntimeRow]
    missing: list[str]


def demo(out: Path, *, scenes: int = 100, progress: Progress | None = None) -> Demo:
    """Measures the example and writes `report.html` and `report.json` into the folder `out`."""
    # The example is too small to gain much from more threads. On a busy machine, threads that wait
    # for each other make it several times slower.
    with use_threads(1):
        return write_demo_report(
            digits.host(), digits.scenes("test", scenes), out, progress=progress
        )


def write_demo_report(
    host: nn.Module,
    scenes: digits.Scenes,
    out: Path,
    *,
    budgets: Sequence[float] = BUDGETS,
    repeats: int = REPEATS,
    progress: Progress | None = None,
) -> Demo:
    """Slims `host` by every method that fits it, at `budgets`, and writes a report on all."""
    say = progress or ignore_progress
    out = check_writable(out, folder=True)
    models, skipped = slim_all(host, budgets, say)
    report = measure(models, make_batches(scenes), repeats=repeats, progress=say)
    report = replace(report, title=TITLE)
    say("drawing which patches survive")
    budget = budgets[-1]
    pictures = draw_pictures(models, scenes, budget)
    exported_name = f"{EXPORTED_METHOD} {budget:g}"
    exported = {"dense": slim(host, "identity", keep=1.0)}
    if exported_name in models:
        exported[exported_name] = models[exported_name]
    images = digits.normalise(scenes.images[:TIMED_SCENES])
    runtimes, missing = compare_runtimes(exported, images, say)
    notes = [OWN_MODEL, UNTRAINED, EXACT_TAIL, write_note(runtimes), *missing, *skipped]
    text = render_page(report, pictures, intro=INTRO, notes=notes)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.html", text)
    report.save(out / "report.json")
    say(f"wrote {out / 'report.html'} and report.json")
    return Demo(report, runtimes, missing)


def slim_all(
    host: nn.Module, budgets: Sequence[float], say: Progress
) -> tuple[dict[str, SlimModel], list[str]]:
    """Slims the host by every method at every budget; also returns a line for each that fails."""
    models: dict[str, SlimModel] = {}
    skipped: list[str] = []
    for method in method_names():
        if method == "identity":
            continue
        if needs_no_budget(find_method(method)):
            models[method] = slim(host, method)
            continue
        for budget in budgets:
            name = f"{method} {budget:g}"
            say(f"slimming: {name}")
            try:
                with warnings.catch_warnings():
                    # The page warns once for all rows.
                    warnings.simplefilter("ignore", DeepCut)
                    warnings.simplefilter("error", Untrained)  # its choice means nothing yet
                    models[name] = _slim_or_calibrate(host, method, budget, models)
            except Untrained:
                skipped.append(f"{method} is missing: {NEEDS_TRAINING}")
                say(skipped[-1])
                break
            except (BadSchedule, NeedsClassToken) as error:
                skipped.append(f"{name} is missing: {error}")
                say(skipped[-1])
    return models, skipped


def _slim_or_calibrate(
    host: nn.Module, method: str, budget: float, models: Mapping[str, SlimModel]
) -> SlimModel:
    """Slims the host to a budget, with calibration if the method needs it."""
    if not must_be_calibrated(find_method(method)()):
        return slim(host, method, macs=budget)
    unlabelled = [
        (images, None) for images, _ in make_batches(digits.scenes("train", SEARCH.images))
    ]
    searched = models.get(f"{STATIC} {budget:g}")
    if searched is None:
        return calibrate(host, unlabelled, method, macs=budget, config=SEARCH).model
    # The dynamic method uses the counts that the static one found: no need to search twice.
    return calibrate(host, unlabelled, method, schedule=searched.schedule, config=SEARCH).model


def make_batches(scenes: digits.Scenes) -> list[Batch]:
    """Splits scenes into batches of images and labels."""
    return [
        (
            digits.normalise(scenes.images[start : start + SCORING_BATCH]),
            torch.from_numpy(scenes.labels[start : start + SCORING_BATCH]),
        )
        for start in range(0, len(scenes), SCORING_BATCH)
    ]


def draw_pictures(
    models: dict[str, SlimModel], scenes: digits.Scenes, budget: float
) -> list[Picture]:
    """Draws the first scenes as each method sees them at one budget, or without a budget."""
    ends = (f" {budget:g}", *method_names())
    chosen = {name: each for name, each in models.items() if name.endswith(ends)}
    images = scenes.images[:PICTURED_SCENES]
    traced = {name: trace_patches(each, digits.normalise(images)) for name, each in chosen.items()}
    return [
        Picture(
            f"{name} (scene {place}, a {int(scenes.labels[place])})",
            encode_png(draw_patches(images[place], traced[name][place])),
        )
        for place in range(len(images))
        for name in chosen
    ]


INTRO = (
    "A small vision transformer, trained to find and read one handwritten digit in a cluttered "
    "scene of 96x96 pixels (144 patches), was given fewer patch tokens by every method in "
    "patchslim that needs no training, at half of the operations, and measured beside the "
    "untouched (dense) model in one run. Those that are calibrated first looked at "
    f"{SEARCH.images} other scenes, without labels and without changing a weight. Random keeps "
    "patches drawn by lot at the very token counts of each method: a method that does not beat it "
    "has chosen nothing."
)
OWN_MODEL = (
    "The model and its weights were made for this example, on drawn scenes; on photographs, the "
    "ranks of methods and their losses will differ. Measure on your own model and images. A digit "
    "may be anywhere in its scene, which is hard on patch_slimming: it keeps the same positions in "
    "all of them."
)
NEEDS_TRAINING = "it learns what to keep, and has to be trained first (patchslim train)."
UNTRAINED = (
    "No row was trained after the cut. At half of the operations and below that is not how one "
    "would use a method: fine-tuning wins much of the loss back."
)
EXACT_TAIL = (
    "Budgets are shares of the dense model's operations. In every row but the dense one, the "
    'last block computes only the row that the head reads (tail="exact").'
)
