"""The recipe of a saved model: all that its weights do not tell, as plain data.

It names a family, a method and settings, never code. It also holds a few answers of the host, by
which a host that takes the weights and is another one is found out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

import torch
from torch import nn

from patchslim.adapter import Adapter
from patchslim.errors import BadFile, PatchslimError
from patchslim.folder import whole
from patchslim.preparation import find_preparation
from patchslim.reducer import reducer_name
from patchslim.schedule import Tail
from patchslim.slim import difference, evaluating
from patchslim.versions import OLDEST, installed

if TYPE_CHECKING:
    from patchslim.model import SlimModel

FORMAT = 1
RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"

# How far a host's answers may move between machines and versions of kernels.
SLACK = {"float64": 1e-6, "float32": 1e-3}

Recipe: TypeAlias = dict[str, Any]

# What a recipe holds, and of which type each entry is.
ENTRIES: dict[str, tuple[type, ...]] = {
    "library": (str, type(None)),
    "host": (dict, type(None)),
    "method": (str, type(None)),
    "method_class": (str,),
    "settings": (dict,),
    "schedule": (dict,),
    "tail": (str,),
    "trained": (dict, type(None)),
    "calibrated": (dict, type(None)),
    "images": (dict,),
    "buffers": (dict,),
    "answers": (list,),
    "shared": (dict,),
    "versions": (dict,),
    "bytes": (int,),
    "sha256": (str,),
    "dtype": (str,),
}


def describe(slimmed: SlimModel) -> Recipe:
    """The recipe of a slimmed model, without what only its weights file can tell."""
    host, reducer, adapter = slimmed.host, slimmed.reducer, slimmed.adapter
    package, _, family = type(adapter).__module__.rpartition(".")
    persistent = host.state_dict().keys()
    return {
        "patchslim": FORMAT,
        "package": installed("patchslim"),
        "library": family if package == "patchslim.adapters" else None,
        "host": adapter.recipe(host),
        "method": reducer_name(reducer),
        "method_class": f"{type(reducer).__module__}.{type(reducer).__qualname__}",
        "settings": plain(reducer.settings()),
        "schedule": plain(slimmed.schedule.to_json()),
        "tail": slimmed.tail,
        "trained": plain(slimmed.trained),
        "calibrated": plain(slimmed.calibrated),
        "images": plain(find_preparation(host, adapter).to_json()),
        "dtype": _name(next(host.parameters()).dtype),
        # Tables that are rebuilt with the host, not stored; their type decides how they round.
        "buffers": {
            name: _name(buffer.dtype)
            for name, buffer in host.named_buffers()
            if name not in persistent and buffer.is_floating_point()
        },
        "answers": answers_of(adapter, host),
        "versions": {name: installed(name) for name in OLDEST if installed(name) is not None},
    }


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a saved folder, checked for its version and the type of every entry."""
    path = place_of(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "is not there"
        raise BadFile(f"{path} {found}. A saved model is a folder with {WEIGHTS} and {RECIPE}.")
    if not (path / RECIPE).is_file():
        raise BadFile(f"{path} was not saved by patchslim: it has no {RECIPE}.")
    try:
        recipe = json.loads((path / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path / RECIPE} is not readable as JSON: {error}") from error
    version = recipe.get("patchslim") if isinstance(recipe, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise BadFile(f"{path / RECIPE} is not a patchslim recipe: it has no format version.")
    if version > FORMAT:
        raise BadFile(
            f"{path} has format {version}, written by patchslim {recipe.get('package')}; this one, "
            f"{installed('patchslim')}, reads formats up to {FORMAT}: "
            f"pip install -U 'patchslim>={recipe.get('package')}'"
        )
    recipe = {"trained": None, "calibrated": None, **recipe}  # older files do not have them
    wrong = [
        name for name, kinds in ENTRIES.items() if not isinstance(recipe.get(name, ...), kinds)
    ]
    if wrong:
        raise BadFile(f"{path / RECIPE} was edited or cut short; look at: {', '.join(wrong)}.")
    if recipe["tail"] not in get_args(Tail):
        raise BadFile(f"{path / RECIPE}: tail is 'exact' or 'full', not {recipe['tail']!r}.")
    checked: Recipe = recipe
    return checked


def is_saved(path: str | Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return (place_of(path) / RECIPE).is_file()


def place_of(path: str | Path) -> Path:
    """The folder to read, even if a later save to it was cut short."""
    return whole(Path(path).expanduser().resolve())


@contextlib.contextmanager
def following(path: Path, recipe: Recipe) -> Iterator[None]:
    """Turns whatever a host library says to a recipe that it cannot follow into one clear error."""
    try:
        yield
    except PatchslimError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
        raise BadFile(
            f"{path / RECIPE} cannot be followed: {error}. It was edited, or needs the versions "
            f"that it was written with: {versions}."
        ) from error


def answers_of(adapter: Adapter, host: nn.Module, like: nn.Module | None = None) -> list[float]:
    """The first of the host's answers to one fixed image of noise, with all its tokens.

    A model of another family, such as a teacher, is asked about images for the host `like`.
    """
    noise = torch.Generator().manual_seed(0)
    images = torch.randn((1, *adapter.image_shape(like or host)), generator=noise)
    parameter = next(host.parameters())
    with evaluating(host), torch.no_grad():
        output = host(images.to(parameter.device, parameter.dtype))
    logits = adapter.logits(output) if like is None else getattr(output, "logits", output)
    answers: list[float] = logits.flatten()[:16].double().tolist()
    return answers


def check_answers(recipe: Recipe, found: list[float]) -> None:
    """Refuses a host that took the weights and is another one: no shape of a weight tells that."""
    saved = torch.tensor(recipe["answers"], dtype=torch.float64)
    off = difference(torch.tensor(found, dtype=torch.float64), saved)
    if not off <= SLACK.get(recipe["dtype"], 0.1):
        versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
        raise BadFile(
            f"The host takes the saved weights and answers otherwise, by {off:.2g}. Its recipe was "
            f"edited, or its library has changed since: {versions}. Install these, or build the "
            "host as it was and pass it: load(path, model=...)."
        )


def plain(data: Any) -> Any:
    """The data as JSON gives it back."""
    return json.loads(json.dumps(data, default=repr))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
