"""`load`: a saved model, from a folder or from the Hugging Face Hub.

A loaded model passed the same identity check as a new one, and its host gives the answers that it
gave when it was saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from patchslim.errors import BadFile, PatchslimError, UnknownName
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import noise_logits, relative_difference
from patchslim.hosts._registry import adapter_names, find_adapter, load_adapter
from patchslim.methods._method import Method, method_settings
from patchslim.methods._registry import find_method
from patchslim.model.check import check_identity
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.model.recipe import to_plain_data
from patchslim.saving.folder import (
    RECIPE_FILE,
    WEIGHTS_FILE,
    Recipe,
    read_recipe,
    read_saved_weights,
    saved_folder,
)
from patchslim.saving.hub import PREFIX, download
from patchslim.schedules.schedule import Schedule

# How far a host's answers may differ between machines and versions of kernels.
LOGIT_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}


def load(
    path: str | Path,
    model: nn.Module | None = None,
    method: Method | None = None,
    *,
    adapter: Adapter | None = None,
) -> SlimModel:
    """Loads the model saved in a folder or a Hub repository, in evaluation mode, on the CPU.

    Args:
        path: the folder that `save` wrote, or `hf-hub:owner/name` for a repository on the Hub.
        model: a host of the same architecture, which takes over the saved weights. Needed only
            if the recipe cannot say how the host was built.
        method: the Method, if it is one of your own.
        adapter: the Adapter, if it is one of your own.

    Raises:
        BadFile: for a folder that is truncated, edited, foreign, or of a newer format.
    """
    text = str(path)
    path = download(text.removeprefix(PREFIX)) if text.startswith(PREFIX) else saved_folder(path)
    recipe = read_recipe(path)
    with wrap_recipe_errors(path, recipe):
        state = read_saved_weights(path, recipe)
        method = _saved_method(recipe, method)
        adapter, host = _build_host(recipe, model, adapter)
        schedule = Schedule.from_json(recipe["schedule"])
        slimmed = SlimModel(host, plan_schedule(host, adapter, method, schedule, recipe["tail"]))
        slimmed.trained, slimmed.calibrated = recipe["trained"], recipe["calibrated"]
        _load_weights(slimmed, state, recipe["buffers"])
        check_identity(slimmed)
        check_noise_logits(recipe, noise_logits(adapter, host))
    return slimmed.eval()


@contextlib.contextmanager
def wrap_recipe_errors(path: Path, recipe: Recipe) -> Iterator[None]:
    """Turns any error of a host library about a recipe into one clear error."""
    try:
        yield
    except PatchslimError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
        raise BadFile(
            f"{path / RECIPE_FILE} cannot be followed: {error}. It was edited, or needs the "
            "versions "
            f"that it was written with: {versions}."
        ) from error


def check_noise_logits(recipe: Recipe, logits: list[float]) -> None:
    """Refuses a host that took the weights but is another one, which no weight's shape shows."""
    saved = torch.tensor(recipe["answers"], dtype=torch.float64)
    off = relative_difference(torch.tensor(logits, dtype=torch.float64), saved)
    if not off <= LOGIT_TOLERANCE.get(recipe["dtype"], 0.1):
        versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
        raise BadFile(
            f"The host takes the saved weights and answers otherwise, by {off:.2g}. Its recipe was "
            f"edited, or its library has changed since: {versions}. Install these, or build the "
            "host as it was and pass it: load(path, model=...)."
        )


def _saved_method(recipe: Recipe, method: Method | None) -> Method:
    """Makes the saved method, or returns the given one if it is the same."""
    if method is None and recipe["method"] is not None:
        return find_method(recipe["method"])(**recipe["settings"])
    saved = f"{recipe['method_class']} with {recipe['settings']}"
    if method is None:
        raise BadFile(f"The method is not one of ours: {saved}. Pass it: load(path, method=...).")
    given = f"{type(method).__module__}.{type(method).__qualname__}"
    if (
        given.rpartition(".")[2] != recipe["method_class"].rpartition(".")[2]
        or to_plain_data(method_settings(method)) != recipe["settings"]
    ):
        raise BadFile(
            f"Saved was {saved}; method= is {given} with {to_plain_data(method_settings(method))}."
        )
    return method


def _build_host(
    recipe: Recipe, model: nn.Module | None, adapter: Adapter | None
) -> tuple[Adapter, nn.Module]:
    """Finds the family and a host of the saved architecture: the given one, or a new one."""
    family = recipe["library"]
    if adapter is None:
        if family is None:
            raise BadFile("The adapter is not one of ours. Pass it: load(path, adapter=...).")
        if family not in adapter_names():
            raise UnknownName.of("family", family, adapter_names())
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


def _load_weights(slimmed: SlimModel, state: dict[str, Tensor], buffers: Mapping[str, str]) -> None:
    """Loads the saved weights, each with the type that it was saved with."""
    own: dict[str, Tensor] = slimmed.state_dict(keep_vars=True)
    for verb, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            raise BadFile(
                f"The weights do not fit the model: {WEIGHTS_FILE} {verb} {_list_names(names)}."
            )
    unlike = {name for name, t in own.items() if t.shape != state[name].shape}
    if unlike:
        raise BadFile(f"The weights do not fit the model: other shapes for {_list_names(unlike)}.")
    for name, t in own.items():
        t.data = t.data.to(state[name].dtype)
    for name, buffer in slimmed.host.named_buffers():
        if name in buffers:
            buffer.data = buffer.data.to(getattr(torch, buffers[name]))
    slimmed.load_state_dict(state, strict=True)


def _list_names(names: set[str]) -> str:
    """Lists the first names of a set, and says how many more there are."""
    first = sorted(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix("host.") for name in first) + more
