"""`export`: the verb that writes a slimmed model for another runtime, if it is the same there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from patchslim.deployment.artefact import Artefact, open_artefact
from patchslim.deployment.budgets import Budgets
from patchslim.deployment.conversion import Order, convert, read_images, tell_unwritable
from patchslim.deployment.drift import Limits
from patchslim.deployment.export_budgets import (
    check_folder,
    check_slimmed,
    export_budgets,
    name_models,
)
from patchslim.deployment.layout import find_layout
from patchslim.deployment.registry import find_target, target_names, target_of_path
from patchslim.deployment.target import FLOAT32, Target
from patchslim.errors import BadFile, BadSetting, UnknownName, WrongExport
from patchslim.files import (
    check_replaceable,
    check_writable,
    replace_file,
    replace_folder,
    resolve_path,
)
from patchslim.model.model import SlimModel
from patchslim.settings import BATCH, Range, check_type, check_value, show_value

KL, SHARE = Range(0, 1e6), Range(0, 1)


@overload
def export(
    model: SlimModel,
    path: str | Path,
    to: str | None = ...,
    *,
    precision: str = ...,
    images: Any = ...,
    max_kl: float | None = ...,
    max_drop: float | None = ...,
    batch: int | None = ...,
    labels: Sequence[str] | None = ...,
    layout: str | None = ...,
) -> Artefact: ...


@overload
def export(
    model: Sequence[SlimModel] | Mapping[str, SlimModel],
    path: str | Path,
    to: str | None = ...,
    *,
    precision: str = ...,
    images: Any = ...,
    max_kl: float | None = ...,
    max_drop: float | None = ...,
    batch: int | None = ...,
    labels: Sequence[str] | None = ...,
    layout: str | None = ...,
) -> Budgets: ...


def export(  # noqa: PLR0913 (one word for each thing that an artefact is made of)
    model: SlimModel | Sequence[SlimModel] | Mapping[str, SlimModel],
    path: str | Path,
    to: str | None = None,
    *,
    precision: str = FLOAT32,
    images: Any = None,
    max_kl: float | None = None,
    max_drop: float | None = None,
    batch: int | None = None,
    labels: Sequence[str] | None = None,
    layout: str | None = None,
) -> Artefact | Budgets:
    """Writes the slimmed model for another runtime, and returns it as `load` would.

    Before anything is written, the result is run on random images, and on yours, against the model:
    it has to keep the same tokens in every block and to answer the same.

    Args:
        model: the slimmed model in float32. It is exported in evaluation mode. Several models of
            the same weights, in a list or by name, are written into one folder that holds the
            weights once.
        path: the file to write, or the folder: for a target that is one, for several models, and
            with a layout.
        to: the target, such as "onnx" or "openvino"; by default the one that the path ends with.
            docs/exporting.md says what each is.
        precision: "float32" or a lower one that the target has, such as "bfloat16" or "int8". What
            the model decides stays in float32.
        images: images to check with, besides random ones: a batch, or an iterable of batches with
            or without labels, of which the first 64 images count. For int8 the first 512 do:
            half of them find ranges, the other half judge.
        max_kl: how far a lower precision may be from float32 at most, as mean KL divergence.
        max_drop: share of the images whose first answer a lower precision may change at most.
        batch: how many images the artefact takes in a call; by default any number, or one where the
            target needs a fixed number.
        labels: names of the classes, to travel with it; by default those that the host knows.
        layout: "ovms" or "triton" for a folder that OpenVINO Model Server or Triton serves, each
            model as a version, the cheapest first.

    Returns:
        The artefact; for several models `Budgets`, which holds one of each.

    Raises:
        WrongExport: if the runtime cannot hold the model, or holds another one, or if a lower
            precision changes more than is allowed. Nothing is written.
    """
    path = resolve_path(path).resolve()
    arrangement = find_layout(layout)
    several = layout is not None or isinstance(model, Mapping | list | tuple)
    target = _find_folder_target(to, path) if several else _find_target(to, path)
    _check_place(target, path, several=several)
    models = name_models(model) if several else {"": check_slimmed(model)}
    batch = _check_batch_size(target, batch)
    _check_precision(target, precision)
    limits = _limits(max_kl, max_drop)
    if several:
        arrangement.check(target, precision)
    target.check_installed(precision)
    first = next(iter(models.values()))
    shape = first.plan.adapter.describe(first.host).image_shape
    given = None if images is None else read_images(images, shape, precision)
    order = Order(target, precision, batch, given, limits, labels)
    if not several:
        return _export_one(first, path, order)
    budgets = export_budgets(models, path, order, arrangement)
    return next(iter(budgets.values())) if isinstance(model, SlimModel) else budgets


def _export_one(model: SlimModel, path: Path, order: Order) -> Artefact:
    """Converts, checks and writes one model."""
    converted = convert(model, order)
    with _replace(order.target, path) as fresh:
        converted.write(fresh)
        found = converted.check_written(fresh)
    written = open_artefact(path, is_own=True)
    if written is None:
        raise BadFile(f"{path} was written and is gone. Another process may have moved it.")
    written.check = found
    return written


def _find_folder_target(to: str | None, path: Path) -> Target:
    """The target that is named, for a path that is to be a folder of several models."""
    if to is None:
        raise BadSetting(
            f"{path}: several models, or a layout, are a folder, which does not tell what it is "
            f"for. Give to= (--to): {', '.join(target_names())}."
        )
    check_type("to", to, str, f"Give one of {', '.join(target_names())}.")
    target, other = find_target(to), target_of_path(path)
    if other is not None:
        raise BadSetting(
            f"{path}: several models, or a layout, are a folder. Give "
            f"{path.with_name(path.name.removesuffix(other.suffix))}."
        )
    return target


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


def _check_place(target: Target, path: Path, *, several: bool) -> None:
    """Refuses a place that cannot be written, or that holds something else."""
    check_writable(path, folder=several or not target.suffix)
    if several:
        check_folder(path)
    elif not target.suffix:
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


@contextlib.contextmanager
def _replace(target: Target, path: Path) -> Iterator[Path]:
    """A file or a folder to write, which takes the place of `path` if nothing fails."""
    with tell_unwritable(path):
        if target.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as fresh:
                yield fresh
        else:
            with replace_folder(path, lambda _: target.files) as fresh:
                yield fresh
