"""`load`: a saved model, from a folder or from the Hugging Face Hub.

A loaded model passed the same identity check as a new one, and its host gives the answers that it
gave when it was saved.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from patchslim.errors import BadFile, BadSetting, PatchslimError, UnknownName
from patchslim.hosts._adapter import Adapter, HostFacts
from patchslim.hosts._answers import noise_logits, relative_difference
from patchslim.hosts._building import MOST_PIXELS, limit_building
from patchslim.hosts._library import first_line
from patchslim.hosts._preprocessing import Preprocessing, keep_preprocessing
from patchslim.hosts._registry import adapter_names, find_adapter, load_adapter
from patchslim.hosts._weights import FLOATS, WEIGHTS_FILE, check_finite, check_fit
from patchslim.methods._method import Method, method_settings
from patchslim.methods._registry import find_method
from patchslim.model.check import check_identity
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.model.recipe import to_plain_data
from patchslim.saving.folder import (
    RECIPE_FILE,
    Recipe,
    read_recipe,
    read_saved_weights,
    saved_folder,
)
from patchslim.saving.hub import PREFIX, download
from patchslim.schedules.schedule import Schedule

# How far a host's answers may differ between machines and versions of kernels.
LOGIT_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}
FLOAT_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
# A host has tables beside its weights, such as rotary positions: as many times their elements, and
# so many more, are built before a recipe is refused.
TABLES, SLACK = 4, 1 << 24


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
        adapter, host = _build_host(recipe, state, model, adapter)
        keep_preprocessing(host, check_images(recipe, adapter.describe(host)), path)
        schedule = Schedule.from_json(recipe["schedule"])
        slimmed = SlimModel(host, plan_schedule(host, adapter, method, schedule, recipe["tail"]))
        slimmed.trained, slimmed.calibrated = recipe["trained"], recipe["calibrated"]
        _load_weights(slimmed, path / WEIGHTS_FILE, state, recipe)
        check_identity(slimmed)
        check_noise_logits(recipe, noise_logits(adapter, host), slimmed)
        slimmed.eval()
        check_runs(slimmed)
    return slimmed


@contextlib.contextmanager
def wrap_recipe_errors(path: Path, recipe: Recipe) -> Iterator[None]:
    """Turns any error of a host library about a recipe into one clear error."""
    try:
        yield
    except PatchslimError:
        raise
    except Exception as error:  # a library may raise anything at a recipe from somewhere
        raise BadFile(
            f"{path / RECIPE_FILE} cannot be followed: {first_line(error)[:500]}. It was edited, "
            f"or needs the versions that it was written with: {_list_versions(recipe)}."
        ) from error


def check_images(recipe: Recipe, facts: HostFacts) -> Preprocessing:
    """Reads how images are prepared; refuses what makes no sense or is for another image size."""
    height, width = facts.image_size
    if not 0 < height * width <= MOST_PIXELS:
        raise BadFile(
            f"The recipe describes a host for {height}x{width} pixels. At most {MOST_PIXELS:,} are "
            "loaded."
        )
    prepared = Preprocessing.from_json(recipe["images"])
    if prepared.image_size != (height, width):
        raise BadFile(
            f"The recipe prepares images of {prepared.image_size}, and its host sees "
            f"{(height, width)}. It was edited: copy it again, or save the model again."
        )
    return prepared


def check_runs(slimmed: SlimModel) -> None:
    """Runs the loaded model once: settings of a method may be of the right types and not work."""
    shape = slimmed.plan.adapter.describe(slimmed.host).image_shape
    noise = torch.Generator().manual_seed(0)
    images = torch.randn((1, *shape), generator=noise)
    with torch.no_grad():
        output = slimmed(images.to(next(slimmed.host.parameters()).dtype))
    if not bool(slimmed.plan.adapter.logits(output).isfinite().all()):
        raise BadFile(
            "The model answers noise with NaN or infinity. It was damaged before it was saved, or "
            "its recipe was edited: take an older one."
        )


def check_noise_logits(recipe: Recipe, found: list[float], slimmed: SlimModel) -> None:
    """Refuses a host that took the weights and is another one: no shape of a weight tells that."""
    dtype = str(next(slimmed.host.parameters()).dtype).removeprefix("torch.")
    answers = recipe["answers"]
    plain = all(isinstance(each, int | float) and abs(each) < sys.maxsize for each in answers)
    if not plain or len(answers) != len(found) or recipe["dtype"] != dtype:
        raise BadFile(
            f"The recipe's answers are not those of this host, which gives {len(found)} numbers in "
            f"{dtype}. It was edited: copy it again, or save the model again."
        )
    saved = torch.tensor(answers, dtype=torch.float64)
    off = relative_difference(torch.tensor(found, dtype=torch.float64), saved)
    if not off <= LOGIT_TOLERANCE.get(dtype, 0.1):
        raise BadFile(
            f"The host takes the saved weights and answers otherwise, by {off:.2g}. Its recipe was "
            f"edited, or its library has changed since: {_list_versions(recipe)}. Install these, "
            "or build the host as it was and pass it: load(path, model=...)."
        )


def _list_versions(recipe: Recipe) -> str:
    """The versions that a recipe was written with."""
    return ", ".join(f"{name} {version}"[:100] for name, version in recipe["versions"].items())


def _saved_method(recipe: Recipe, method: Method | None) -> Method:
    """Makes the saved method, or returns the given one if it is the same."""
    if method is None and recipe["method"] is not None:
        kind = find_method(recipe["method"])
        try:
            return kind(**recipe["settings"])
        except BadSetting as error:
            raise BadFile(
                f"The recipe cannot be followed: {error} It was edited, or saved by a later "
                f"version ({_list_versions(recipe)})."
            ) from error
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
    recipe: Recipe, state: Mapping[str, Tensor], model: nn.Module | None, adapter: Adapter | None
) -> tuple[Adapter, nn.Module]:
    """Finds the family and a host of the saved architecture: the given one, or a new one.

    It is built without memory first, so that a recipe cannot ask for more than it has weights for.
    """
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
        if family is not None:
            saved = sum(t.numel() for t in state.values())
            with torch.device("meta"), limit_building(saved * TABLES + SLACK):
                adapter.rebuild(recipe["host"])
        model = adapter.rebuild(recipe["host"])
    if family is not None and type(find_adapter(model)) is not type(adapter):
        raise BadFile(f"Saved was a model of {adapter.family}; model= is a {type(model).__name__}.")
    return adapter, model


def _load_weights(slimmed: SlimModel, file: Path, state: dict[str, Tensor], recipe: Recipe) -> None:
    """Loads the saved weights, each with the type that it was saved with."""
    own: dict[str, Tensor] = slimmed.state_dict(keep_vars=True)
    if any(".base_layer." in name and name not in own for name in state):
        raise BadFile(
            f"{file} has low-rank updates of PEFT beside the weights, and the recipe cannot say "
            "how they were made. Give the same model with its updates, model=; or merge them "
            "before the model is saved: merge_and_unload() of the PEFT model."
        )
    check_fit(file, own, state, "the model")
    check_finite(file, own, state, keep=True)
    buffers = recipe["buffers"]
    unknown = sorted({str(each)[:100] for each in buffers.values() if each not in FLOAT_NAMES})
    if unknown:
        raise BadFile(f"The recipe has buffers of type {', '.join(unknown)}. It was edited.")
    for name, t in own.items():
        t.data = t.data.to(state[name].dtype)
    for name, buffer in slimmed.host.named_buffers():
        if name in buffers:
            buffer.data = buffer.data.to(FLOAT_NAMES[buffers[name]])
    slimmed.load_state_dict(state, strict=True)
    _tie_weights(slimmed, own, recipe)


def _tie_weights(slimmed: SlimModel, own: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Makes weights one again that were one when they were saved, and shares their memory again."""
    for name, first in recipe["shared"].items():
        if type(own[name]) is not type(own[first]) or name == first:
            raise BadFile(
                f"The recipe ties {name} and {first}, which are not alike. It was edited."
            )
        if name not in recipe["tied"]:
            own[name].data = own[first].data
            continue
        owner, _, last = name.rpartition(".")
        module = slimmed.get_submodule(owner)
        setattr(module, last, own[first])
