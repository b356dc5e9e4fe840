"""`load`: whatever this package has written, a saved model as well as an exported one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from patchslim.deployment.artefact import open_artefact
from patchslim.deployment.budgets import INDEX_FILE, list_files, open_budgets
from patchslim.deployment.registry import find_target, target_names
from patchslim.errors import BadFile, BadSetting
from patchslim.files import find_complete, resolve_path
from patchslim.hosts._adapter import Adapter
from patchslim.methods._method import Method
from patchslim.model.load import load as load_model
from patchslim.saving.folder import RECIPE_FILE
from patchslim.saving.hub import PREFIX, download


def load(
    path: str | Path,
    model: nn.Module | None = None,
    method: Method | None = None,
    *,
    adapter: Adapter | None = None,
) -> Any:
    """The saved or exported model at `path`, ready to be called with images.

    A folder that `save` wrote gives a `SlimModel`. A file or folder that `export` wrote gives an
    `Artefact`, which runs in its own runtime; a folder with several of one set of weights gives
    `Budgets`. `hf-hub:owner/name` is a repository with any of these.

    Args:
        path: the folder, the file, or the repository.
        model: for a saved model, a host of the same architecture, which takes over the saved
            weights. Needed only where the recipe cannot tell how the host was built.
        method: for a saved model, the Method, where it is one of your own.
        adapter: for a saved model, the Adapter, where it is one of your own.

    Raises:
        BadFile: for what is truncated, edited, foreign, or of a newer format.
    """
    text = str(path)
    if text.startswith(PREFIX):
        path = fetch(text.removeprefix(PREFIX))
    whole = find_complete(resolve_path(path))
    artefact = open_budgets(whole) or open_artefact(whole)
    if artefact is not None:
        if any(given is not None for given in (model, method, adapter)):
            raise BadSetting(
                f"{path} is exported and complete in itself: leave out model, method and adapter."
            )
        return artefact
    return load_model(path, model, method, adapter=adapter)


def fetch(repository: str) -> Path:
    """Downloads the model in a Hub repository, and returns the saved folder or the artefact.

    Only files that a saved model or an artefact consists of are fetched.
    """
    folder = download(repository)
    if (folder / RECIPE_FILE).is_file():
        return folder
    targets = [each for each in map(find_target, target_names()) if not each.runs_code]
    names = [name for each in targets for name in (each.files or (f"*{each.suffix}",))]
    folder = download(repository, [*names, INDEX_FILE])
    if (folder / INDEX_FILE).is_file():
        return download(repository, [INDEX_FILE, *list_files(folder)], nested=True)
    there = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    found = [each for each in there if any(target.looks_written(each) for target in targets)]
    if len(found) > 1:
        listed = ", ".join(each.name for each in found[:5])
        raise BadFile(
            f"{repository!r} has several exported models: {listed}. Download the one that you want "
            "and give its path."
        )
    return found[0] if found else folder
