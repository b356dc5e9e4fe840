"""From a slimmed model to a checked graph of a target, and from that to a checked artefact.

`export` says what is to be written and where; here it is converted, written and judged.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchslim.deployment.card import make_card
from patchslim.deployment.checking import Check, check_answers, check_graph
from patchslim.deployment.drift import Drift, Limits, Reference
from patchslim.deployment.graph import Graph, Outputs
from patchslim.deployment.int8 import check_images, in_batches, measure_drift, quantise
from patchslim.deployment.registry import target_names
from patchslim.deployment.target import FLOAT32, INT8, Target
from patchslim.errors import BadFile, BadSetting, PatchslimError, UnsupportedModel, WrongExport
from patchslim.model.images import check_no_path, check_readable, show_images
from patchslim.model.model import SlimModel
from patchslim.settings import check_type

RANDOM_IMAGES = 4  # compared beside those that are given
MOST_IMAGES = 64  # of those that are given
MOST_CALIBRATION = 512  # of those, for int8
SIMPLE_METHODS = ("similarity", "topk")  # with few kinds of operations
GIVE_IMAGES = "Give a float tensor (B, C, H, W), or batches of such, with or without labels."


@dataclass(frozen=True)
class Order:
    """What is to be written, but for the model and the place.

    Attributes:
        target: the runtime or format.
        precision: one of its precisions.
        batch: how many images a call takes; None for any number.
        images: images to check with; None for random ones alone.
        limits: what a lower precision may change at most.
        labels: names of the classes; None for those that the host knows.
    """

    target: Target
    precision: str
    batch: int | None
    images: Tensor | None
    limits: Limits
    labels: Sequence[str] | None


@dataclass(frozen=True)
class Converted:
    """A model in a target's own form, checked and ready to be written.

    Attributes:
        order: what was asked for.
        graph: the model that it was made of.
        form: the target's own form.
        card: what travels with it.
        found: what the check of the graph found.
        batches: the images that it was checked with.
        reference: for a lower precision, the images that judged it.
    """

    order: Order
    graph: Graph
    form: Any
    card: dict[str, Any]
    found: Check
    batches: list[Tensor]
    reference: Reference | None = None

    def write(self, path: Path) -> None:
        """Writes the artefact at `path`, a file or an empty folder, without looking at it."""
        target = self.order.target
        card = {**self.card, **target.describe(self.form), "checked": self.found.to_json()}
        write_form(target, self.form, self.graph, json.dumps(card), path)

    def check_written(self, path: Path) -> Check:
        """Opens what was written at `path`, runs it beside the model, and returns what was found.

        Raises:
            WrongExport: it answers otherwise.
        """
        run = self.order.target.open(path)[1]
        if self.reference is None or self.found.drift is None:
            return check_answers(run, self.graph, self.batches, self.graph.outputs, self.found)
        self.reference.check_file(run, self.found.drift, self.order.limits)
        return self.found


def convert(model: SlimModel, order: Order) -> Converted:
    """Converts the model and compares it block by block, in float32 and then in its precision.

    Raises:
        WrongExport: the target cannot hold the model, or holds another one, or a lower precision
            changes more than is allowed.
    """
    target, precision = order.target, order.precision
    graph = make_graph(model, order.batch)
    given = order.images
    if precision == INT8:
        check_images(given)  # before the minutes that a conversion takes
    batches = _batches(graph, given)
    card = make_card(graph, target.name, precision, target.distributions(precision), order.labels)
    with tell_refused(target, graph):
        form = target.convert(graph)
        run = target.witness(form)
        found = check_graph(run, graph, batches)
    if precision == FLOAT32:
        return Converted(order, graph, form, card, found, batches)
    with tell_refused(target, graph):
        form, reference, drift = _lower(target, form, graph, precision, given, order.limits)
    found = replace(found, drift=drift)
    return Converted(order, graph, form, card, found, batches, reference)


def _lower(
    target: Target,
    converted: Any,
    graph: Graph,
    precision: str,
    images: Tensor | None,
    limits: Limits,
) -> tuple[Any, Reference, Drift]:
    """The graph in a lower precision, the images that judged it, and what it changes on them."""
    if precision == INT8:
        return quantise(target, converted, graph, check_images(images), limits)
    images = _random_images(graph) if images is None else images
    reference = Reference(graph, in_batches(images, graph.batch, 8))
    converted = target.lower(converted, graph, precision)
    drift = measure_drift(target, converted, reference, precision)
    excess = limits.excess(drift)
    if excess:
        raise WrongExport(
            f"In {drift.precision}, on {drift.images} images, {excess}. Nothing was written. Allow "
            "more, or export in a higher precision."
        )
    return converted, reference, drift


def make_graph(model: SlimModel, batch: int | None) -> Graph:
    """A copy of the model to be converted; refuses weights of other types than float32."""
    other = {str(each.dtype) for each in model.parameters() if each.dtype != torch.float32}
    if other:
        raise UnsupportedModel(
            f"This model has weights of {', '.join(sorted(other))}, and is exported in float32, so "
            "that it keeps the tokens that were measured. Convert it first: model.float()."
        )
    own = copy.deepcopy(model).cpu().eval()
    shape = own.plan.adapter.describe(own.host).image_shape
    with torch.no_grad():
        outputs = Outputs.of(own(torch.zeros(1, *shape)))
    return Graph(own, outputs, batch)


def _random_images(graph: Graph) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.randn(RANDOM_IMAGES, *graph.image_shape, generator=noise)


def _batches(graph: Graph, given: Tensor | None) -> list[Tensor]:
    """Random images and the first of those that are given, in batches that the artefact takes."""
    every = [_random_images(graph), *([] if given is None else [given[:MOST_IMAGES]])]
    whole = torch.cat(every)
    if graph.batch is None:
        # One alone first: a graph may be right for all numbers but that.
        return [whole[:1], *whole[1:].split(8)]
    return in_batches(whole, graph.batch, graph.batch)


def read_images(images: Any, shape: tuple[int, ...], precision: str) -> Tensor:
    """The first images of a batch, or of batches with or without labels.

    `shape` is that of an image of the model.
    """
    most = MOST_CALIBRATION if precision == INT8 else MOST_IMAGES
    if isinstance(images, Tensor):
        images = [images]
    check_no_path("images", images, BadSetting)
    check_type("images", images, Iterable, GIVE_IMAGES)
    some: list[Tensor] = []
    for each in islice(images, most):  # batches of no images may go on for ever
        pixels = _check_batch(each[0] if isinstance(each, list | tuple) and each else each)
        if tuple(pixels.shape[1:]) != shape:
            raise BadSetting(
                f"images= has a batch of shape {tuple(pixels.shape)}, and this model is exported "
                f"for images of shape {shape}."
            )
        some.append(pixels[: most - sum(map(len, some))].to("cpu", torch.float32))
        if sum(map(len, some)) >= most:
            break
    whole = torch.cat([torch.zeros(0, *shape), *some])
    if not bool(whole.isfinite().all()):
        raise BadSetting(f"images= has NaN or infinity in it. {GIVE_IMAGES}")
    return whole


def _check_batch(images: Any) -> Tensor:
    """The images, if they are a batch that can be compared."""
    check_type("images", images, Tensor, GIVE_IMAGES)
    check_readable(images, GIVE_IMAGES)
    if images.ndim < 3 or not images.is_floating_point():
        raise BadSetting(f"images=: {show_images(images)}. {GIVE_IMAGES}")
    given: Tensor = images.detach()
    return given


@contextlib.contextmanager
def tell_unwritable(path: Path) -> Iterator[None]:
    """Says that a place could not be written, and that nothing there has changed."""
    try:
        yield
    except OSError as error:
        raise BadFile(
            f"Could not write {path}: {error}. What was there before is as it was."
        ) from error


def write_form(target: Target, converted: Any, graph: Graph, card: str, path: Path) -> None:
    """Writes the artefact; whatever a runtime raises on a full disk is an error of the disk."""
    try:
        target.write(converted, graph, card, path)
    except (OSError, PatchslimError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {str(error)[:200]}") from error


@contextlib.contextmanager
def tell_refused(target: Target, graph: Graph) -> Iterator[None]:
    """Says why a target does not hold a model, and what to do: a converter raises anything."""
    try:
        yield
    except PatchslimError:
        raise
    except Exception as error:
        raise WrongExport(_say_refused(target, graph, error)) from error


def _say_refused(target: Target, graph: Graph, error: Exception) -> str:
    """Why a target does not hold a model, and what to do."""
    reason: BaseException = error
    while reason.__cause__ is not None:
        reason = reason.__cause__
    said = " ".join(str(reason).split())[:300]
    method = type(graph.model.method).__name__
    return (
        f"{target.name} cannot hold this model of {type(graph.model.host).__name__} with {method}: "
        f"{type(reason).__name__}: {said}. Nothing was written. {_advise(target, graph)}"
    )


def _advise(target: Target, graph: Graph) -> str:
    """What to try where a target does not hold a model: what it is not already."""
    others = ", ".join(name for name in target_names() if name != target.name)
    own = type(graph.model.method).__name__.lower()
    methods = " or ".join(repr(name) for name in SIMPLE_METHODS if name != own)
    alone = "" if graph.batch == 1 else ", or batch=1"
    return f"Try another target ({others}), or the method {methods}{alone}."
