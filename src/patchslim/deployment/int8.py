"""Finds an int8 graph that is close enough to the slimmed model in float32.

The images that are given need no labels. Every second one is used to find ranges, and the others to
judge: recipes are tried while the KL divergence falls there. If that is more than is
allowed, activations are left in float where rounding them costs most, as few as will do. Where
nothing is asked for, the aim is a small divergence, and few are left in float for it: they cost
time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchslim.deployment.drift import Drift, Limits, Reference
from patchslim.deployment.graph import Graph
from patchslim.deployment.quantiser import Quantiser
from patchslim.deployment.target import INT8, Target
from patchslim.errors import BadSetting, WrongExport

LEAST_IMAGES = 2
RANKING_IMAGES = 16  # of those that judge, to rank the places by what they cost
PARTS, CLOSER = 12, 2  # of the graph, to rank the places: in all, and looked at place by place
AIM = Limits(kl=0.01)  # where no limit is given
FEW = 0.1  # share of the places that may stay in float for the aim


def check_images(images: Tensor | None) -> Tensor:
    """Refuses to go on with too few images."""
    if images is None or len(images) < LEAST_IMAGES:
        raise BadSetting(
            "int8 needs images= (--data) to find the ranges of activations. Give about 200 of the "
            "kind that the model will see; labels are not needed."
        )
    return images


def quantise(
    target: Target, converted: Any, graph: Graph, images: Tensor, limits: Limits
) -> tuple[Any, Reference, Drift]:
    """The graph in int8, the images that judged it, and what it changes on them.

    Raises:
        WrongExport: if it changes more than is allowed, however many activations stay in float.
    """
    quantiser = target.quantiser
    assert quantiser is not None  # noqa: S101 (a target with int8 among its precisions has one)
    reference = Reference(graph, in_batches(images[1::2], graph.batch, 8))
    calibration = in_batches(images[::2], graph.batch, 1)
    best: tuple[Any, Drift] | None = None
    for recipe in quantiser.recipes:
        made = quantiser.quantise(converted, graph, calibration, recipe)
        drift = measure_drift(target, made, reference, INT8, recipe)
        if best is not None and best[1].kl <= drift.kl:
            break
        best = made, drift
    assert best is not None  # noqa: S101 (there is a recipe)
    if not (limits if limits.given else AIM).excess(best[1]):
        return best[0], reference, best[1]
    if not quantiser.list_places(best[0]):
        if limits.given:
            raise WrongExport(
                f"In int8, on {best[1].images} images, {limits.excess(best[1])}. Nothing was "
                "written. Allow more, or export in float32."
            )
        return best[0], reference, best[1]
    ranked = _rank_places(target, quantiser, best[0], reference)
    if not limits.given:
        fewer = _leave_as_few(target, best, reference, ranked[: _few(ranked)], AIM)
        made, drift = min(best, fewer, key=lambda each: each[1].kl)
        return made, reference, drift
    made, drift = _leave_as_few(target, best, reference, ranked, limits)
    if limits.excess(drift):
        raise WrongExport(
            f"In int8, on {drift.images} images, {limits.excess(best[1])}; with every activation "
            f"in float32 and the weights alone in int8, {limits.excess(drift)}. Nothing was "
            "written. Allow more, or export in bfloat16 or float32."
        )
    return made, reference, drift


def _few(places: Sequence[str]) -> int:
    """How many places may stay in float for the aim."""
    return math.ceil(FEW * len(places))


def measure_drift(
    target: Target, lowered: Any, reference: Reference, precision: str, recipe: str = ""
) -> Drift:
    """What a lower precision changes: tokens as the graph tells them, answers as it is written."""
    drift = reference.measure(target.witness(lowered), precision, recipe)
    return reference.judge(target.witness(target.strip(lowered, reference.graph)), drift)


def in_batches(images: Tensor, batch: int | None, usual: int) -> list[Tensor]:
    """Images in batches that a graph takes; the last one is filled up with the first image."""
    if batch is None:
        return [*images.split(usual)]
    missing = -len(images) % batch
    return [*torch.cat([images, images[:1].expand(missing, -1, -1, -1)]).split(batch)]


def _leave_as_few(
    target: Target,
    quantised: tuple[Any, Drift],
    reference: Reference,
    ranked: Sequence[str],
    limits: Limits,
) -> tuple[Any, Drift]:
    """Leaves the first of these places in float, as few as the limits need; all if none will do."""
    quantiser = target.quantiser
    assert quantiser is not None  # noqa: S101 (it made the graph)
    whole, first = quantised
    of = len(quantiser.list_places(whole))

    def leave(count: int) -> tuple[Any, Drift]:
        made = quantiser.leave_float(whole, ranked[:count])
        recipe = f"{first.recipe}, {count} of {of} activations in float32"
        return made, measure_drift(target, made, reference, INT8, recipe)

    low, high, found = 0, len(ranked), leave(len(ranked))
    if limits.excess(found[1]):
        return found
    while high - low > 1:  # `low` are too few, `high` are enough
        middle = (low + high) // 2
        tried = leave(middle)
        if limits.excess(tried[1]):
            low = middle
        else:
            high, found = middle, tried
    return found


def _rank_places(
    target: Target, quantiser: Quantiser, quantised: Any, reference: Reference
) -> Sequence[str]:
    """The places by what leaving them in float gains, most first.

    First neighbours are left in float together, then each place alone in those parts that gain
    most. To try every place of a model alone would take minutes, and most gain nothing.
    """
    few = reference.part(RANKING_IMAGES)

    def rank(parts: list[list[str]]) -> list[list[str]]:
        """These parts, by the KL that is left when each of them is in float."""
        kl = [
            few.measure(target.witness(quantiser.leave_float(quantised, part)), INT8).kl
            for part in parts
        ]
        return [parts[number] for number in sorted(range(len(parts)), key=kl.__getitem__)]

    places = quantiser.list_places(quantised)
    size = math.ceil(len(places) / PARTS)
    parts = rank([places[begin : begin + size] for begin in range(0, len(places), size or 1)])
    first = rank([[place] for part in parts[:CLOSER] for place in part])
    return [place for part in [*first, *parts[CLOSER:]] for place in part]
