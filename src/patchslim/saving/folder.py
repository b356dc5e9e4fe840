"""A saved model on disk: a folder with `model.safetensors` and `recipe.json`.

Nothing in the folder is code, and nothing in it is unpickled. This file knows tensors, JSON and
digests; what a recipe means is the business of `model/recipe.py` and `model/load.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from patchslim.errors import BadFile, UnsupportedModel
from patchslim.files import find_complete, replace_folder
from patchslim.versions import installed_version

FORMAT_VERSION = 1
RECIPE_FILE = "recipe.json"
WEIGHTS_FILE = "model.safetensors"

Recipe: TypeAlias = dict[str, Any]

# What a recipe holds, and of which type each entry is.
ENTRY_TYPES: dict[str, tuple[type, ...]] = {
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
TAILS = ("exact", "full")


def write_folder(path: str | Path, state: Mapping[str, Any], recipe: Recipe) -> None:
    """Writes weights and recipe to the folder `path`: all of it, or nothing.

    An older save there stays readable until the new one is complete.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path).expanduser().resolve()
    tensors, shared = _drop_shared_tensors(state)
    recipe = {**recipe, "shared": shared}
    try:
        with replace_folder(path, {WEIGHTS_FILE, RECIPE_FILE}) as fresh:
            save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
            recipe |= {
                "bytes": (fresh / WEIGHTS_FILE).stat().st_size,
                "sha256": file_sha256(fresh / WEIGHTS_FILE),
            }
            (fresh / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
            # safetensors makes files that only their owner can read.
            (fresh / WEIGHTS_FILE).chmod((fresh / RECIPE_FILE).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise BadFile(
            f"Could not save to {path}: {error}. What was there before is as it was."
        ) from error


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a saved folder, checked for its version and the type of every entry."""
    path = saved_folder(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "is not there"
        raise BadFile(
            f"{path} {found}. A saved model is a folder with {WEIGHTS_FILE} and {RECIPE_FILE}."
        )
    if not (path / RECIPE_FILE).is_file():
        raise BadFile(f"{path} was not saved by patchslim: it has no {RECIPE_FILE}.")
    try:
        recipe = json.loads((path / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path / RECIPE_FILE} is not readable as JSON: {error}") from error
    version = recipe.get("patchslim") if isinstance(recipe, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise BadFile(f"{path / RECIPE_FILE} is not a patchslim recipe: it has no format version.")
    if version > FORMAT_VERSION:
        raise BadFile(
            f"{path} has format {version}, written by patchslim {recipe.get('package')}; this one, "
            f"{installed_version('patchslim')}, reads formats up to {FORMAT_VERSION}: "
            f"pip install -U 'patchslim>={recipe.get('package')}'"
        )
    recipe = {"trained": None, "calibrated": None, **recipe}  # older files do not have them
    wrong = [
        name for name, kinds in ENTRY_TYPES.items() if not isinstance(recipe.get(name, ...), kinds)
    ]
    if wrong:
        raise BadFile(f"{path / RECIPE_FILE} was edited or cut short; look at: {', '.join(wrong)}.")
    if recipe["tail"] not in TAILS:
        raise BadFile(f"{path / RECIPE_FILE}: tail is 'exact' or 'full', not {recipe['tail']!r}.")
    checked: Recipe = recipe
    return checked


def read_saved_weights(path: Path, recipe: Recipe) -> dict[str, Tensor]:
    """The saved tensors, after making sure that they are the ones the recipe was written with."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / WEIGHTS_FILE
    if not file.is_file():
        raise BadFile(
            f"{path} has no {WEIGHTS_FILE}. Copy the folder again, or save the model again."
        )
    size = file.stat().st_size
    if size < recipe["bytes"]:
        raise BadFile(
            f"{file} is truncated: {size:,} of {recipe['bytes']:,} bytes. Copy it again, or save "
            "the model again."
        )
    if file_sha256(file) != recipe["sha256"]:
        raise BadFile(
            f"{file} is not the file that {RECIPE_FILE} was written with (its SHA-256 "
            "differs). Copy "
            "the folder again, or save the model again."
        )
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise BadFile(f"{file} is not a safetensors file: {error}") from error
    return state | {name: state[first] for name, first in recipe["shared"].items()}


def is_saved(path: str | Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    return (saved_folder(path) / RECIPE_FILE).is_file()


def saved_folder(path: str | Path) -> Path:
    """The folder to read, even if a later save to it was cut short."""
    return find_complete(Path(path).expanduser().resolve())


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_shared_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
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
