"""`export`: the verb that writes a slimmed model for another runtime, if it is the same there."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchslim.deployment.artefact import Artefact, open_artefact
from patchslim.deployment.card import make_card
from patchslim.deployment.checking import check_answers, check_graph
from patchslim.deployment.drift import Drift, Limits, Reference
from patchslim.deployment.graph import Graph, Outputs
from patchslim.deployment.int8 import check_images, in_batches, measure_drift, quantise
from patchslim.deployment.registry import find_target, target_names, target_of_path
from patchslim.deployment.target import FLOAT32, INT8, Target
from patchslim.errors import (
    BadFile,
    BadSetting,
    PatchslimError,
    UnknownName,
    UnsupportedModel,
    WrongExport,
)
from patchslim.files import (
    check_replaceable,
    check_writable,
    replace_file,
    replace_folder,
    resolve_path,
)
from patchslim.model.images import check_readable, show_images
from patchslim.model.model import SlimModel
from patchslim.settings import BATCH, Range, check_type, check_value, show_value

RANDOM_IMAGES = 4  # compared beside those that are given
MOST_IMAGES = 64  # of those that are given
MOST_CALIBRATION = 512  # of those, for int8
KL, SHARE = Range(0, 1e6), Range(0, 1)
GIVE_IMAGES = "Give a float tensor (B, C, H, W), or batches of such, with or without labels."


def export(  # noqa: PLR0913 (one word for each thing that an artefact is made of)
    model: SlimModel,
    path: str | Path,
    to: str | None = None,
    *,
    precision: str = FLOAT32,
    images: Any = None,
    max_kl: float | None = None,
    max_drop: float | None = None,
    batch: int | None = None,
    labels: Sequence[str] | None = None,
) -> Artefact:
    """Writes the slimmed model for another runtime, and returns it as `load` would.

    Before anything is written, the result is run on random images, and on yours, against the model:
    it has to keep the same tokens in every block and to answer the same.

    Args:
        model: the slimmed model in float32. It is exported in evaluation mode.
        path: the file to write, or the folder for a target that is one.
        to: the target: "aoti", "executorch", "onnx", "openvino" or "pt2"; by default the one that
            the path ends with.
        precision: "float32", "bfloat16", "float16" or "int8", as far as the target can. What the
            model decides stays in float32.
        images: images to check with, besides random ones: a batch, or an iterable of batches with
            or without labels, of which the first 64 images count. For int8 the first 512 do:
            half of them find ranges, the other half judge.
        max_kl: how far a lower precision may be from float32 at most, as mean KL divergence.
        max_drop: share of the images whose first answer a lower precision may change at most.
        batch: how many images the artefact takes in a call; by default any number, and one for
            "executorch", which needs a fixed number.
        labels: names of the classes, to travel with it; by default those that the host knows.

    Raises:
        WrongExport: if the runtime cannot hold the model, or holds another one, or if a lower
            precision changes more than is allowed. Nothing is written.
    """
    path = resolve_path(path).resolve()
    target = _find_target(to, path)
    _check_place(target, path)
    if not isinstance(model, SlimModel):
        raise UnsupportedModel(
            f"export() takes a slimmed model, not {type(model).__name__}: slim it first, with "
            "method 'identity' and keep=1.0 if it is to keep all its patches."
        )
    batch = _check_batch_size(target, batch)
    _check_precision(target, precision)
    limits = _limits(max_kl, max_drop)
    target.check_installed(precision)
    graph = _make_graph(model, batch)
    given = None if images is None else _given_images(images, graph, precision)
    if precision == INT8:
        check_images(given)  # before the minutes that a conversion takes
    batches = _batches(graph, given)
    card = make_card(graph, target.name, precision, target.distributions(precision), labels)
    with _tell_refused(target, graph):
        converted = target.convert(graph)
        run = target.witness(converted)
    found = check_graph(run, graph, batches)
    if precision != FLOAT32:
        with _tell_refused(target, graph):
            converted, reference, drift = _lower(target, converted, graph, precision, given, limits)
        found = replace(found, drift=drift)
    with _replace(target, path) as fresh:
        card |= {**target.describe(converted), "checked": found.to_json()}
        _write(target, converted, graph, json.dumps(card), fresh)
        opened = target.open(fresh)[1]
        if found.drift is None:
            found = check_answers(opened, graph, batches, graph.outputs, found)
        else:
            reference.check_file(opened, found.drift, limits)
    written = open_artefact(path, is_own=True)
    if written is None:
        raise BadFile(f"{path} was written and is gone. Another process may have moved it.")
    written.check = found
    return written


def _find_target(to: str | None, path: Path) -> Target:
    """The target that is named, or the one that the ending of the path tells."""
    if to is not None:
        check_type("to", to, str, f"Give one of {', '.join(target_names())}.")
        target = find_target(to)
        if target.suffix and target_of_path(path) is not target:
            other = target_of_path(path)
            stem = path.name.removesuffix(other.suffix) if other else path.stem
            raise BadSetting(
                f"{path}: a file for {target.name} ends in {target.suffix}, by which it is known "
                f"again. Give {path.with_name(stem + target.suffix)}."
            )
        return target
    found = target_of_path(path)
    if found is None:
        raise BadSetting(
            f"{path} does not tell what it is for. Give to= (--to): {', '.join(target_names())}."
        )
    return found


def _check_place(target: Target, path: Path) -> None:
    """Refuses a place that cannot be written, or that holds something else."""
    check_writable(path, folder=not target.suffix)
    if not target.suffix:
        check_replaceable(path, target.files)


def _check_batch_size(target: Target, batch: Any) -> int | None:
    """The number of images of a call; None for any, if the target can take any."""
    if batch is None:
        return None if target.any_batch else 1
    number: int = check_value("batch", batch, int, BATCH, cure="None is any number.")
    return number


def _check_precision(target: Target, precision: Any) -> None:
    """Refuses a precision that the target cannot be written in, and says which can."""
    if precision in target.precisions:
        return
    able = {name: [*find_target(name).precisions] for name in target_names()}
    others = [name for name, precisions in able.items() if precision in precisions]
    if precision not in target.refusals and not others:
        known = dict.fromkeys(each for precisions in able.values() for each in precisions)
        shown = precision if isinstance(precision, str) else show_value(precision)
        raise UnknownName.of("precision", shown, [*known])
    reason = target.refusals.get(precision, "nothing writes that yet")
    cure = [f"precision={' or '.join(map(repr, target.precisions))}"]
    cure += [f"to={' or '.join(map(repr, others))}"] if others else []
    raise WrongExport(f"{target.name} has no {precision}: {reason}. Give {', or '.join(cure)}.")


def _limits(max_kl: Any, max_drop: Any) -> Limits:
    """What a lower precision may change at most."""
    kl = None if max_kl is None else check_value("max_kl", max_kl, float, KL)
    drop = None if max_drop is None else check_value("max_drop", max_drop, float, SHARE)
    return Limits(kl, drop)


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


def _make_graph(model: SlimModel, batch: int | None) -> Graph:
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


def _given_images(images: Any, graph: Graph, precision: str) -> Tensor:
    """The first images of a batch, or of batches with or without labels."""
    most = MOST_CALIBRATION if precision == INT8 else MOST_IMAGES
    if isinstance(images, Tensor):
        images = [images]
    check_type("images", images, Iterable, GIVE_IMAGES)
    some: list[Tensor] = []
    for each in islice(images, most):  # batches of no images may go on for ever
        pixels = _check_batch(each[0] if isinstance(each, list | tuple) and each else each)
        if tuple(pixels.shape[1:]) != graph.image_shape:
            raise BadSetting(
                f"images= has a batch of shape {tuple(pixels.shape)}, and this model is exported "
                f"for images of shape {graph.image_shape}."
            )
        some.append(pixels[: most - sum(map(len, some))].to("cpu", torch.float32))
        if sum(map(len, some)) >= most:
            break
    whole = torch.cat([torch.zeros(0, *graph.image_shape), *some])
    if not bool(whole.isfinite().all()):
        raise BadSetting(f"images= has NaN or infinity in it. {GIVE_IMAGES}")
    return whole


def _check_batch(images: Any) -> Tensor:
    """The images, if they are a batch that can be compared."""
    check_type("images", images, Tensor, GIVE_IMAGES)
    check_readable(images, GIVE_IMAGES)
    if images.ndim != 4 or not images.is_floating_point():
        raise BadSetting(f"images=: {show_images(images)}. {GIVE_IMAGES}")
    given: Tensor = images.detach()
    return given


def _write(target: Target, converted: Any, graph: Graph, card: str, path: Path) -> None:
    """Writes the artefact; whatever a runtime raises on a full disk is an error of the disk."""
    try:
        target.write(converted, graph, card, path)
    except (OSError, PatchslimError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {str(error)[:200]}") from error


@contextlib.contextmanager
def _replace(target: Target, path: Path) -> Iterator[Path]:
    """A file or a folder to write, which takes the place of `path` if nothing fails."""
    try:
        if target.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as fresh:
                yield fresh
        else:
            with replace_folder(path, target.files) as fresh:
                yield fresh
    except OSError as error:
        raise BadFile(
            f"Could not write {path}: {error}. What was there before is as it was."
        ) from error


@contextlib.contextmanager
def _tell_refused(target: Target, graph: Graph) -> Iterator[None]:
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
        f"{type(reason).__name__}: {said}. Nothing was written. Try another target "
        f"({', '.join(target_names())}), the method 'similarity' or 'topk', or batch=1."
    )
