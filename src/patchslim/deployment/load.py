"""`load`: whatever this package has written, a saved model as well as an exported one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from patchslim.deployment.artefact import open_artefact
from patchslim.errors import BadSetting
from patchslim.files import find_complete, resolve_path
from patchslim.hosts._adapter import Adapter
from patchslim.methods._method import Method
from patchslim.model.load import load as load_model


def load(
    path: str | Path,
    model: nn.Module | None = None,
    method: Method | None = None,
    *,
    adapter: Adapter | None = None,
) -> Any:
    """The saved or exported model at `path`, ready to be called with images.

    A folder that `save` wrote, or `hf-hub:owner/name`, gives a `SlimModel`. A file or folder that
    `export` wrote gives an `Artefact`, which runs in its own runtime.

    Args:
        path: the folder, the file, or the repository.
        model: for a saved model, a host of the same architecture, which takes over the saved
            weights. Needed only where the recipe cannot tell how the host was built.
        method: for a saved model, the Method, where it is one of your own.
        adapter: for a saved model, the Adapter, where it is one of your own.

    Raises:
        BadFile: for what is truncated, edited, foreign, or of a newer format.
    """
    artefact = open_artefact(find_complete(resolve_path(path)))
    if artefact is not None:
        if any(given is not None for given in (model, method, adapter)):
            raise BadSetting(
                f"{path} is exported and complete in itself: leave out model, method and adapter."
            )
        return artefact
    return load_model(path, model, method, adapter=adapter)
