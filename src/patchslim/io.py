"""Saving and loading: a folder with `model.safetensors` and `recipe.json`.

Nothing in the folder is code and nothing in it is unpickled. The recipe names a family, a method
and plain settings; whoever loads it gets a model that passed the same identity check as a new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchslim.adapter import Adapter, adapter_names, find_adapter, load_adapter
from patchslim.errors import BadFile, UnknownName, UnsupportedModel
from patchslim.folder import replaced
from patchslim.recipe import (
    RECIPE,
    WEIGHTS,
    Recipe,
    answers_of,
    check_answers,
    describe,
    following,
    place_of,
    plain,
    read_recipe,
)
from patchslim.reducer import Reducer, find_reducer
from patchslim.schedule import Schedule
from patchslim.slim import check_identity
from patchslim.versions import check_version

if TYPE_CHECKING:
    from patchslim.model import SlimModel


def save(slimmed: SlimModel, path: str | Path) -> None:
    """Writes weights and recipe to the folder `path`: all of it, or nothing.

    An older save there stays readable until the new one is complete.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path).expanduser().resolve()
    tensors, shared = _separate(slimmed.state_dict())
    recipe = {**describe(slimmed), "shared": shared}
    try:
        with replaced(path, {WEIGHTS, RECIPE}) as fresh:
            save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
            recipe |= {"bytes": (fresh / WEIGHTS).stat().st_size, "sha256": digest(fresh / WEIGHTS)}
            (fresh / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
            # safetensors makes files that only their owner can read.
            (fresh / WEIGHTS).chmod((fresh / RECIPE).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise BadFile(
            f"Could not save to {path}: {error}. What was there before is as it was."
        ) from error


def load(
    path: str | Path,
    model: nn.Module | None = None,
    method: Reducer | None = None,
    *,
    adapter: Adapter | None = None,
) -> SlimModel:
    """The model saved in the folder `path`, in evaluation mode, on the CPU.

    Args:
        path: what `save` wrote.
        model: a host of the same architecture, which takes over the saved weights. Needed only
            where the recipe cannot tell how the host was built.
        method: the Reducer, where it is one of your own.
        adapter: the Adapter, where it is one of your own.

    Raises:
        BadFile: for a folder that is truncated, edited, foreign, or of a newer format.
    """
    from patchslim.model import SlimModel

    path = place_of(path)
    recipe = read_recipe(path)
    with following(path, recipe):
        state = _weights(path, recipe)
        reducer = _reducer(recipe, method)
        adapter, host = _host(recipe, model, adapter)
        schedule = Schedule.from_json(recipe["schedule"])
        slimmed = SlimModel(host, adapter, reducer, schedule, recipe["tail"])
        slimmed.trained, slimmed.calibrated = recipe["trained"], recipe["calibrated"]
        _fill(slimmed, state, recipe["buffers"])
        check_identity(slimmed)
        check_answers(recipe, answers_of(adapter, host))
    return slimmed.eval()


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _separate(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and for each name left out the name of its equal.

    safetensors refuses tensors that alias each other, as tied weights do.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, t in state.items():
        if not isinstance(t, Tensor):
            raise UnsupportedModel(
                f"{name} in the state of this model is a {type(t).__name__}; only tensors can be "
                "saved."
            )
        place = (t.data_ptr(), t.dtype, t.shape, t.stride())
        if t.numel() and place in names:
            shared[name] = names[place]
            continue
        names[place] = name
        storage = t.untyped_storage().data_ptr()
        t = t.detach().cpu().contiguous()
        tensors[name] = t.clone() if storage in storages else t
        storages.add(storage)
    return tensors, shared


def _weights(path: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The saved tensors, after making sure that they are the ones the recipe was written with."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / WEIGHTS
    if not file.is_file():
        raise BadFile(f"{path} has no {WEIGHTS}. Copy the folder again, or save the model again.")
    size = file.stat().st_size
    if size < recipe["bytes"]:
        raise BadFile(
            f"{file} is truncated: {size:,} of {recipe['bytes']:,} bytes. Copy it again, or save "
            "the model again."
        )
    if digest(file) != recipe["sha256"]:
        raise BadFile(
            f"{file} is not the file that {RECIPE} was written with (its SHA-256 differs). Copy "
            "the folder again, or save the model again."
        )
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise BadFile(f"{file} is not a safetensors file: {error}") from error
    return state | {name: state[first] for name, first in recipe["shared"].items()}


def _reducer(recipe: Recipe, method: Reducer | None) -> Reducer:
    """The saved method, or the one that was given if it is the same."""
    if method is None and recipe["method"] is not None:
        return find_reducer(recipe["method"])(**recipe["settings"])
    saved = f"{recipe['method_class']} with {recipe['settings']}"
    if method is None:
        raise BadFile(f"The method is not one of ours: {saved}. Pass it: load(path, method=...).")
    given = f"{type(method).__module__}.{type(method).__qualname__}"
    if (
        given.rpartition(".")[2] != recipe["method_class"].rpartition(".")[2]
        or plain(method.settings()) != recipe["settings"]
    ):
        raise BadFile(f"Saved was {saved}; method= is {given} with {plain(method.settings())}.")
    return method


def _host(
    recipe: Recipe, model: nn.Module | None, adapter: Adapter | None
) -> tuple[Adapter, nn.Module]:
    """The family and a host of the saved architecture: the given one, or one that is built."""
    family = recipe["library"]
    if adapter is None:
        if family is None:
            raise BadFile("The adapter is not one of ours. Pass it: load(path, adapter=...).")
        if family not in adapter_names():
            raise UnknownName.of("family", family, adapter_names())
        check_version(family.partition("_")[0])
        adapter = load_adapter(family)
    if model is None:
        if recipe["host"] is None:
            raise BadFile(
                "The recipe does not tell how the host was built (it was not made by its "
                "library's own factory). Build one and pass it: load(path, model=...)."
            )
        model = adapter.rebuild(recipe["host"])
    if family is not None and type(find_adapter(model)) is not type(adapter):
        raise BadFile(f"Saved was a model of {adapter.family}; model= is a {type(model).__name__}.")
    return adapter, model


def _fill(slimmed: SlimModel, state: dict[str, Tensor], buffers: Mapping[str, str]) -> None:
    """Puts the saved weights in place, each with the type that it was saved with."""
    own: dict[str, Tensor] = slimmed.state_dict(keep_vars=True)
    for verb, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            raise BadFile(f"The weights do not fit the model: {WEIGHTS} {verb} {_some(names)}.")
    unlike = {name for name, t in own.items() if t.shape != state[name].shape}
    if unlike:
        raise BadFile(f"The weights do not fit the model: other shapes for {_some(unlike)}.")
    for name, t in own.items():
        t.data = t.data.to(state[name].dtype)
    for name, buffer in slimmed.host.named_buffers():
        if name in buffers:
            buffer.data = buffer.data.to(getattr(torch, buffers[name]))
    slimmed.load_state_dict(state, strict=True)


def _some(names: set[str]) -> str:
    """The first names of a set, and how many more there are."""
    first = sorted(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix("host.") for name in first) + more
