"""The Hugging Face Hub: a saved model up, a saved model down.

What a saved model consists of is the business of `io.py`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from patchslim.errors import BadFile
from patchslim.io import load, save
from patchslim.recipe import RECIPE, WEIGHTS
from patchslim.reducer import Reducer

if TYPE_CHECKING:
    from patchslim.model import SlimModel


def from_pretrained(
    name: str | Path, model: nn.Module | None = None, method: Reducer | None = None
) -> SlimModel:
    """The model saved in the folder `name`, or in the Hub repository of that name."""
    if Path(name).expanduser().exists():
        return load(name, model, method)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(name), allow_patterns=[WEIGHTS, RECIPE])
    except _refusals() as error:
        raise BadFile(
            f"{name!r} is neither a folder nor a Hub repository that can be fetched: {error}"
        ) from error
    return load(folder, model, method)


def push_to_hub(slimmed: SlimModel, repository: str, *, private: bool = False) -> str:
    """Uploads weights and recipe to a Hub repository, made if need be; returns its address."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        save(slimmed, Path(folder) / "model")
        api = HfApi()
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=Path(folder) / "model",
                commit_message="A model slimmed by patchslim",
            )
        except _refusals() as error:
            raise BadFile(
                f"Could not upload to {repository!r}: {error}. Log in with `hf auth login`, or "
                "save to a folder with .save(path)."
            ) from error
    return str(address)


def _refusals() -> tuple[type[BaseException], ...]:
    """All that the Hub's client raises: no network, no such repository, no right, no such name.

    Its transport library has changed from version to version; its own error names the base.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)
