"""`export`: the verb that writes a slimmed model for another runtime, if it is the same there."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchslim.deployment.artefact import Artefact, open_artefact
from patchslim.deployment.card import make_card
from patchslim.deployment.checking import check_answers, check_graph
from patchslim.deployment.graph import Graph, Outputs
from patchslim.deployment.registry import find_target, target_names, target_of_path
from patchslim.deployment.target import Target
from patchslim.errors import BadFile, BadSetting, PatchslimError, UnsupportedModel, WrongExport
from patchslim.files import (
    check_replaceable,
    check_writable,
    replace_file,
    replace_folder,
    resolve_path,
)
from patchslim.model.images import check_readable, show_images
from patchslim.model.model import SlimModel
from patchslim.settings import BATCH, check_type, check_value

RANDOM_IMAGES = 4  # compared beside those that are given
MOST_IMAGES = 64  # of those that are given
GIVE_IMAGES = "Give a float tensor (B, C, H, W), or batches of such, with or without labels."


def export(
    model: SlimModel,
    path: str | Path,
    to: str | None = None,
    *,
    images: Any = None,
    batch: int | None = None,
    labels: Sequence[str] | None = None,
) -> Artefact:
    """Writes the slimmed model for another runtime, and returns it as `load` would.

    Before anything is written, the result is run on random images, and on yours, against the model:
    it has to keep the same tokens in every block and to answer the same.

    Args:
        model: the slimmed model. It is exported in float32 and in evaluation mode.
        path: the file to write, or the folder for a target that is one.
        to: the target: "aoti", "executorch", "onnx", "openvino" or "pt2"; by default the one that
            the path ends with.
        images: images to check with, besides random ones: a batch, or an iterable of batches with
            or without labels, of which the first 64 images count.
        batch: how many images the artefact takes in a call; by default any number, and one for
            "executorch", which needs a fixed number.
        labels: names of the classes, to travel with it; by default those that the host knows.

    Raises:
        WrongExport: if the runtime cannot hold the model, or holds another one. Nothing is written.
    """
    path = resolve_path(path).resolve()
    target = _find_target(to, path)
    check_writable(path, folder=not target.suffix)
    if not target.suffix:
        check_replaceable(path, target.files)
    if not isinstance(model, SlimModel):
        raise UnsupportedModel(
            f"export() takes a slimmed model, not {type(model).__name__}: slim it first, with "
            "method 'identity' and keep=1.0 if it is to keep all its patches."
        )
    if batch is not None:
        batch = check_value("batch", batch, int, BATCH, cure="None is any number.")
    elif not target.any_batch:
        batch = 1
    target.check_installed()
    graph = _make_graph(model, batch)
    batches = _batches(graph, images)
    card = make_card(graph, target.name, [*target.needs], labels)
    try:
        converted = target.convert(graph)
        run = target.witness(converted)
    except PatchslimError:
        raise
    except Exception as error:  # a converter raises whatever it meets
        raise WrongExport(_say_refused(target, graph, error)) from error
    found = check_graph(run, graph, batches)
    with _replace(target, path) as fresh:
        card |= {**target.describe(converted), "checked": found.to_json()}
        _write(target, converted, graph, json.dumps(card), fresh)
        found = check_answers(target.open(fresh)[1], graph, batches, graph.outputs, found)
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


def _batches(graph: Graph, images: Any) -> list[Tensor]:
    """Random images and those that are given, in batches that the artefact takes."""
    noise = torch.Generator().manual_seed(0)
    every = [torch.randn(RANDOM_IMAGES, *graph.image_shape, generator=noise)]
    every += [] if images is None else _given_images(images)
    wrong = [each for each in every if tuple(each.shape[1:]) != graph.image_shape]
    if wrong:
        raise BadSetting(
            f"images= has a batch of shape {tuple(wrong[0].shape)}, and this model is exported for "
            f"images of shape {graph.image_shape}."
        )
    whole = torch.cat([each.to("cpu", torch.float32) for each in every])
    if not bool(whole.isfinite().all()):
        raise BadSetting(f"images= has NaN or infinity in it. {GIVE_IMAGES}")
    if graph.batch is None:
        # One alone first: a graph may be right for all numbers but that.
        return [whole[:1], *whole[1:].split(8)]
    missing = -len(whole) % graph.batch
    return [*torch.cat([whole, whole[:1].expand(missing, -1, -1, -1)]).split(graph.batch)]


def _given_images(images: Any) -> list[Tensor]:
    """The first images of a batch, or of batches with or without labels."""
    if isinstance(images, Tensor):
        return [_check_batch(images)[:MOST_IMAGES]]
    check_type("images", images, Iterable, GIVE_IMAGES)
    some: list[Tensor] = []
    for each in islice(images, MOST_IMAGES):  # batches of no images may go on for ever
        pixels = each[0] if isinstance(each, list | tuple) and each else each
        some.append(_check_batch(pixels)[: MOST_IMAGES - sum(map(len, some))])
        if sum(map(len, some)) >= MOST_IMAGES:
            break
    return some


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
