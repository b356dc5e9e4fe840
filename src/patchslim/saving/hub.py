"""The Hugging Face Hub: a saved folder up, a saved folder down."""

from __future__ import annotations

from pathlib import Path

from patchslim.errors import BadFile
from patchslim.saving.folder import RECIPE_FILE, WEIGHTS_FILE

PREFIX = "hf-hub:"  # marks the name of a repository, as in timm


def download(repository: str) -> Path:
    """The folder with the files of a Hub repository, from the client's cache where they are."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[WEIGHTS_FILE, RECIPE_FILE]))
    except _hub_errors() as error:
        raise BadFile(f"{repository!r} cannot be fetched from the Hub: {error}") from error


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Uploads a saved folder to a Hub repository, made if need be; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="A model slimmed by patchslim",
        )
    except _hub_errors() as error:
        raise BadFile(
            f"Could not upload to {repository!r}: {error}. Log in with `hf auth login`, or "
            "save to a folder with .save(path)."
        ) from error
    return str(address)


def _hub_errors() -> tuple[type[BaseException], ...]:
    """All that the Hub's client raises: no network, no such repository, no right, no such name.

    Its transport library has changed from version to version; its own error names the base.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)
