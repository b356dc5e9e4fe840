"""Measures what slimmed models lose in accuracy and gain in time, next to dense and `random`.

This file does not know where the images come from, nor how a report is shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from patchslim.errors import WrongInput
from patchslim.hosts._answers import eval_mode
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.measurement.latency import latency
from patchslim.measurement.memory import peak_memory
from patchslim.measurement.models import add_random, check_models, mean_counts
from patchslim.measurement.rows import (
    Measurements,
    dense_costs,
    make_row,
    report_title,
    slim_costs,
)
from patchslim.measurement.sample import (
    count_images,
    draw_sample,
    fill_batch,
    move_to_host,
    open_batches,
)
from patchslim.measurement.score import Batch, Forward, check_batches, score
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Provenance
from patchslim.report.report import Report
from patchslim.runs.progress import Progress, check_progress
from patchslim.settings import BATCH, SEED, Range, check_type, check_value

ROUNDS = Range(0, 1e6)  # of timing
WARMUP = 2  # rounds before timing begins: the first calls allocate memory and select kernels


def measure(  # noqa: PLR0913 (what is measured, beside what, and how)
    model: SlimModel | Mapping[str, SlimModel],
    images: Iterable[Batch] | None = None,
    *,
    dense: nn.Module | None = None,
    batch: int = 8,
    repeats: int = 20,
    seed: int = 0,
    baseline: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Measures accuracy, agreement, MACs, time and memory of models beside their dense host.

    Args:
        model: a slimmed model, or several of one host by name.
        images: batches of float images (B, 3, H, W) with their labels (B,) or None; read once.
            Without images only costs are measured, on noise. If the iterable has an attribute
            `prepared`, as `Images` has, the report says how the images were prepared.
        dense: the model to compare with, if that is not the host of the slimmed models. For
            trained models, give the host as it was before training.
        batch: how many images are timed at a time; memory is measured on as many.
        repeats: rounds of timing; 0 for no timing.
        seed: seed of the random baseline and of the noise.
        baseline: whether to run `random` at the token counts of each model, too.
        progress: is called with one line of text at a time.
    """
    batch = check_value("batch", batch, int, BATCH, WrongInput)
    repeats = check_value("repeats", repeats, int, ROUNDS, WrongInput)
    seed = check_value("seed", seed, int, SEED, WrongInput)
    check_type("baseline", baseline, bool, "Give True or False.")
    if images is not None:
        check_batches("images", images)
    show = check_progress(progress)
    models = check_models(model, dense)
    first = next(iter(models.values()))
    # This reads some of `images` once more, so it comes before the batches are opened.
    adaptive = any(slimmed.method.adaptive for slimmed in models.values())
    sample = draw_sample(images) if adaptive else None
    opening, batches = open_batches(images, first, seed)
    sample = opening if sample is None else sample
    with contextlib.ExitStack() as stack:
        for slimmed in models.values():
            stack.enter_context(eval_mode(slimmed))
        stack.enter_context(torch.inference_mode())
        # The model refuses a wrong image size by name, before token counts are asked for it.
        first(move_to_host(opening[:1], first.host))
        size = (opening.shape[2], opening.shape[3])
        if baseline:
            models = add_random(models, sample, seed)
        if dense is not None:
            stack.enter_context(eval_mode(dense))
        calls: dict[str, nn.Module] = {"dense": dense or first.host, **models}
        spent: dict[str, list[int]] = {name: [] for name in models}
        forwards = {
            name: _make_forward(first, call, spent.get(name)) for name, call in calls.items()
        }
        total = count_images(images)
        scores = score(forwards, batches, total=total, progress=show) if batches else {}
        timed_images = move_to_host(fill_batch(opening, batch), first.host)
        measured = Measurements(
            scores=scores,
            spent=spent,
            timed={name: _macs_per_image(each, timed_images) for name, each in models.items()},
            tokens={name: mean_counts(each, sample) for name, each in models.items()},
            seconds=latency(calls, timed_images, repeats, WARMUP, progress=show) if repeats else {},
            memory=_measure_memory(calls, timed_images, show),
            batch=batch,
        )
    rows = [make_row("dense", dense_costs(first, size), measured)]
    rows += [
        make_row(name, slim_costs(name, slimmed, size, measured), measured)
        for name, slimmed in models.items()
    ]
    scored = scores["dense"].images if scores else 0
    provenance = Provenance.now(first.host, batch=batch, image_size=size, images=scored, seed=seed)
    prepared = getattr(images, "prepared", None)
    if not isinstance(prepared, Preprocessing):
        prepared = None
    return Report(tuple(rows), provenance, report_title(first.host), prepared)


def _make_forward(first: SlimModel, call: nn.Module, spent: list[int] | None) -> Forward:
    """Returns a function from images on any device to logits.

    If `call` is an adaptive model, the MACs that each image costs are appended to `spent`.
    """

    def run(images: Tensor) -> Tensor:
        images = move_to_host(images, first.host)
        if not isinstance(call, SlimModel) or spent is None or not call.method.adaptive:
            return first.plan.adapter.logits(call(images))
        output, costs = call.forward_with_costs(images)
        spent.extend(cost.total for cost in costs)
        return first.plan.adapter.logits(output)

    return run


def _macs_per_image(model: SlimModel, images: Tensor) -> list[int]:
    """Returns the MACs of each image; a single number if the method is not adaptive."""
    if not model.method.adaptive:
        return [model.macs((images.shape[-2], images.shape[-1])).total]
    return [cost.total for cost in model.macs_of(images)]


def _measure_memory(
    calls: Mapping[str, nn.Module], images: Tensor, progress: Progress
) -> dict[str, int]:
    """Measures the peak bytes of one forward pass of each model."""
    peaks: dict[str, int] = {}
    for number, (name, call) in enumerate(calls.items()):
        progress(f"memory: model {number + 1}/{len(calls)}")
        peaks[name] = peak_memory(partial(call, images))
    return peaks
