"""Writes slimmed models of one set of weights into one folder, each checked like a single one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patchslim.deployment.artefact import open_artefact
from patchslim.deployment.budgets import INDEX_FILE, Budgets, is_name, open_budgets, write_index
from patchslim.deployment.checking import Check
from patchslim.deployment.conversion import Converted, Order, convert, tell_unwritable
from patchslim.deployment.layout import LAYOUTS, Layout
from patchslim.deployment.registry import find_target, target_names
from patchslim.deployment.shared_weights import WEIGHTS_FILE
from patchslim.errors import BadFile, BadSetting, UnsupportedModel
from patchslim.files import check_replaceable, replace_folder
from patchslim.hosts._weights import check_plain
from patchslim.model.model import SlimModel, name_slimmed_part
from patchslim.settings import show_value

NAMES_CURE = "Give names of letters, digits, '.', '_' and '-', such as {'fast': ..., 'good': ...}."


def name_models(models: Any) -> dict[str, SlimModel]:
    """The models by name, from the cheapest on; in a list, names are shares of the operations."""
    named: Mapping[Any, Any] = models if isinstance(models, Mapping) else {}
    if not isinstance(models, Mapping):
        listed: Sequence[Any] = models if isinstance(models, list | tuple) else [models]
        shares = [_share(each) for each in listed]
        twice = next((share for share in shares if shares.count(share) > 1), None)
        if twice is not None:
            raise BadSetting(
                f"Two of the models take {twice} of the operations, by which they are named. "
                f"{NAMES_CURE}"
            )
        named = dict(zip(shares, listed, strict=True))
    if not named:
        raise BadSetting("There is no model in what export() was given. Give at least one.")
    wrong = next((name for name in named if not is_name(name)), None)
    if wrong is not None:
        raise BadSetting(f"{show_value(wrong)} is no name for a model. {NAMES_CURE}")
    for each in named.values():
        check_slimmed(each)
    return dict(sorted(named.items(), key=lambda each: int(each[1].plan.cost.total)))


def check_slimmed(model: Any) -> SlimModel:
    """Refuses what is no slimmed model."""
    if not isinstance(model, SlimModel):
        inner = name_slimmed_part(model)
        cure = "slim it first, with method 'identity' and keep=1.0 if it is to keep all its patches"
        if inner:
            cure = f"give {inner}"
        raise UnsupportedModel(
            f"export() takes a slimmed model, not {type(model).__name__}: {cure}."
        )
    check_plain(model, "exported")
    return model


def check_folder(path: Path) -> None:
    """Refuses to replace a folder that holds anything but what an export of several writes."""
    check_replaceable(path, _replaceable(path))


def export_budgets(
    models: Mapping[str, SlimModel], path: Path, order: Order, layout: Layout
) -> Budgets:
    """Writes the models, in the order of their operations, and returns them as `load` would.

    Raises:
        UnsupportedModel: the models do not have the same weights.
        WrongExport: the runtime holds one of them otherwise. Nothing is written.
    """
    _check_same_weights(models)
    if layout.files and not is_name(path.name):
        raise BadSetting(
            f"{path}: the server calls the model {path.name!r}, as its folder. Give a folder whose "
            "name has letters, digits, '.', '_' and '-' only."
        )
    places = layout.places(order.target, [*models])
    with tell_unwritable(path), replace_folder(path, _replaceable) as fresh:
        written = {name: fresh / place for name, place in places.items()}
        made = {name: _write(models[name], order, place) for name, place in written.items()}
        bytes_apart = sum(each.stat().st_size for each in fresh.rglob("*") if each.is_file())
        if layout.shares:
            order.target.share_weights([*written.values()], fresh / WEIGHTS_FILE)
        found = {name: each.check_written(written[name]) for name, each in made.items()}
        if layout.files:
            opened = [open_artefact(place) for place in written.values()]
            layout.write(fresh, path.name, [each for each in opened if each is not None])
        write_index(fresh, order.target, [*models], layout, bytes_apart)
    return _open(path, found)


def _open(path: Path, found: Mapping[str, Check]) -> Budgets:
    """What was written, with what was found."""
    budgets = open_budgets(path)
    if budgets is None:
        raise BadFile(f"{path} was written and is gone. Another process may have moved it.")
    for name, check in found.items():
        budgets[name].check = check
    return budgets


def _write(model: SlimModel, order: Order, place: Path) -> Converted:
    """Converts, checks and writes one model; returns what is needed to check the file."""
    (place.parent if order.target.suffix else place).mkdir(parents=True, exist_ok=True)
    converted = convert(model, order)
    converted.write(place)
    return replace(converted, form=None)


def _share(model: Any) -> str:
    """A model's share of the dense operations, as a name."""
    model = check_slimmed(model)
    return f"{model.plan.cost.total / model.plan.dense_cost.total:.2g}"


def _check_same_weights(models: Mapping[str, SlimModel]) -> None:
    """Refuses models that were not made of the same host with the same weights."""
    (name, first), *others = models.items()
    for other, model in others:
        difference = _find_difference(first, model)
        if difference is not None:
            raise UnsupportedModel(
                f"{name!r} and {other!r} are not of one set of weights: {difference}. Models that "
                "were trained, or calibrated with tuning, have weights of their own: export each "
                "by itself."
            )


def _find_difference(first: SlimModel, other: SlimModel) -> str | None:
    """What the hosts of two models do not have in common; None if they are the same."""
    if type(first.host) is not type(other.host):
        return f"one is a {type(first.host).__name__}, one a {type(other.host).__name__}"
    shapes = [each.plan.adapter.describe(each.host).image_shape for each in (first, other)]
    if shapes[0] != shapes[1]:
        return f"one takes images of shape {shapes[0]}, one of {shapes[1]}"
    if first.host is other.host:
        return None
    ours, theirs = first.host.state_dict(), other.host.state_dict()
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            return f"only one has {name}"
        one, two = ours[name].cpu(), theirs[name].cpu()
        if one.dtype != two.dtype or not torch.equal(one, two):
            return f"{name} differs"
    return None


def _replaceable(path: Path) -> list[str]:
    """Names of what is in a folder and was written by an export of several models.

    A folder in it counts if it holds nothing but files of artefacts.
    """
    if not (path / INDEX_FILE).is_file():
        return []
    files = {INDEX_FILE, WEIGHTS_FILE, *(name for each in LAYOUTS.values() for name in each.files)}
    return [each.name for each in path.iterdir() if each.name in files or _is_artefact(each)]


def _is_artefact(path: Path) -> bool:
    """Whether a path looks like an artefact, or a folder that holds nothing else."""
    if path.is_dir():
        return all(each.is_file() and _is_artefact(each) for each in path.iterdir())
    targets = map(find_target, target_names())
    return any(
        path.name in each.files or (each.suffix and path.name.endswith(each.suffix))
        for each in targets
    )
