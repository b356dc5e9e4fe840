"""A saved model on disk: a folder with `model.safetensors` and `recipe.json`.

Nothing in the folder is code, and nothing in it is unpickled. This file knows tensors, JSON and
checksums. `model/recipe.py` and `model/load.py` know what a recipe means. Beside the two stand
texts for people and for other libraries (`model/card.py`), which are never read here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from patchslim.errors import BadFile, UnsupportedModel
from patchslim.files import (
    check_replaceable,
    check_writable,
    find_complete,
    read_json,
    replace_folder,
    resolve_path,
)
from patchslim.hosts._weights import WEIGHTS_FILE, advise_on_bare_weights, read_safetensors
from patchslim.saving.old_names import rename_old_weights
from patchslim.saving.seal import check_seal, seal_recipe
from patchslim.versions import installed_version, say_upgrade

FORMAT_VERSION = 1
RECIPE_FILE = "recipe.json"
CARD_FILE = "README.md"  # which the Hub shows

Recipe: TypeAlias = dict[str, Any]

# The entries of a recipe and their types in JSON.
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
    "tied": (list,),
    "versions": (dict,),
    "bytes": (int,),
    "sha256": (str,),
    "beside": (dict,),
    "dtype": (str,),
}
TAILS = ("exact", "full")


def write_folder(
    path: str | Path, state: Mapping[str, Any], recipe: Recipe, beside: Mapping[str, str]
) -> None:
    """Writes weights, recipe and the texts beside them to the folder `path`: all, or nothing.

    If an older model is saved there, it stays readable until the new one is complete.

    Args:
        path: the folder.
        state: tensors by name. Those that are the same object are tied, and are so when loaded.
        recipe: all other entries of the recipe.
        beside: texts by file name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = resolve_path(path).resolve()
    check_writable(path.parent, folder=True)
    tensors, shared = _drop_shared_tensors(state)
    tied = [name for name, first in shared.items() if state[name] is state[first]]
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in beside.items()}
    recipe = {**recipe, "shared": shared, "tied": tied, "beside": digests}
    try:
        with replace_folder(path, written_files) as fresh:
            save_file(tensors, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
            recipe |= {
                "bytes": (fresh / WEIGHTS_FILE).stat().st_size,
                "sha256": file_sha256(fresh / WEIGHTS_FILE),
            }
            text = json.dumps(seal_recipe(recipe), indent=2, allow_nan=False) + "\n"
            for name, content in {**beside, RECIPE_FILE: text}.items():
                (fresh / name).write_text(content, encoding="utf-8", newline="")
            # safetensors makes files that only their owner can read.
            (fresh / WEIGHTS_FILE).chmod((fresh / RECIPE_FILE).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise BadFile(
            f"Could not save to {path}: {error}. What was there before is as it was."
        ) from error


def read_recipe(path: str | Path) -> Recipe:
    """Reads the recipe in a saved folder; checks its version and the type of every entry."""
    path = saved_folder(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "is not there"
        raise BadFile(
            f"{path} {problem}. A saved model is a folder with {WEIGHTS_FILE} and {RECIPE_FILE}, "
            "or a name on the Hub with hf-hub: before it."
        )
    if not (path / RECIPE_FILE).is_file():
        raise BadFile(
            f"{path} was not saved by patchslim: it has no {RECIPE_FILE}.{_advise_on_weights(path)}"
        )
    recipe = read_json(path / RECIPE_FILE)
    version = recipe.get("patchslim") if isinstance(recipe, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise BadFile(f"{path / RECIPE_FILE} is not a patchslim recipe: it has no format version.")
    if version > FORMAT_VERSION:
        raise BadFile(
            f"{path} has format {version}, written by patchslim {recipe.get('package')}; this one, "
            f"{installed_version('patchslim')}, reads formats up to {FORMAT_VERSION}: "
            f"{say_upgrade(recipe.get('package'))}"
        )
    check_seal(path / RECIPE_FILE, recipe)
    # Older files lack these. In them, whatever is shared is taken to be tied.
    shared = recipe.get("shared")
    tied = [*shared] if isinstance(shared, dict) else []
    recipe = {"trained": None, "calibrated": None, "tied": tied, "beside": {}, **recipe}
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
    """Reads the tensors, once size and checksum say that they belong to the recipe."""
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
    if size > recipe["bytes"]:
        raise BadFile(
            f"{file} is longer than it was: {size:,} bytes and not {recipe['bytes']:,}. Copy it "
            "again, or save the model again."
        )
    if file_sha256(file) != recipe["sha256"]:
        raise BadFile(
            f"{file} is not the file that {RECIPE_FILE} was written with (its SHA-256 differs). "
            "Copy the folder again, or save the model again."
        )
    state = read_safetensors(file)
    state |= {name: state[first] for name, first in recipe["shared"].items()}
    renamed: dict[str, Tensor] = rename_old_weights(state)
    return renamed


def _advise_on_weights(path: Path) -> str:
    """Says what to call if the folder holds weights that another library saved; else ""."""
    if (path / WEIGHTS_FILE).is_file() and (path / "config.json").is_file():
        return (
            " It holds a model of Hugging Face: load it there, by from_pretrained, and slim it by "
            "patchslim.slim."
        )
    return advise_on_bare_weights(path)


def is_saved(path: str | Path) -> bool:
    """Whether `path` is a folder that `save` wrote."""
    try:
        return (saved_folder(path) / RECIPE_FILE).is_file()
    except BadFile:  # it cannot be a path at all
        return False


def saved_folder(path: str | Path) -> Path:
    """Returns the folder to read; if a save was cut short, the one that holds the older model."""
    return find_complete(resolve_path(path).resolve())


def file_sha256(path: Path) -> str:
    """Computes the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_saveable(path: str | Path) -> None:
    """Refuses a folder that `write_folder` would refuse. Called before anything takes long."""
    path = check_writable(path, folder=True).resolve()
    check_replaceable(path, written_files(path))


def written_files(path: Path) -> set[str]:
    """Names the files in the folder that `write_folder` wrote, but for texts changed since then.

    Those, and anything else, are somebody's work, and saving there again would delete it.
    """
    try:
        beside = dict(read_json(path / RECIPE_FILE)["beside"])
    except (BadFile, TypeError, ValueError, KeyError):  # an older version wrote it, or nobody did
        beside = {}
    texts = (
        [each for each in path.iterdir() if each.name in beside and each.is_file()]
        if beside
        else []
    )
    same = {each.name for each in texts if file_sha256(each) == beside[each.name]}
    return {WEIGHTS_FILE, RECIPE_FILE} | same


def _drop_shared_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns tensors that share no memory, and the names of those that were left out.

    safetensors refuses tensors that share memory, as tied weights do. Of equal tensors only the
    first is kept; the second dictionary maps each name left out to the name of the kept one.
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first_names: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UnsupportedModel(
                f"{name} in the state of this model is a {type(tensor).__name__}; only tensors can "
                "be saved."
            )
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in first_names:
            shared[name] = first_names[view]
            continue
        first_names[view] = name
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.detach().cpu().contiguous()
        # Another part of the same memory is copied: tensors may overlap without being equal.
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors, shared
