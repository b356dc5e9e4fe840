"""Uploads a saved folder or a file to the Hugging Face Hub, and downloads what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from patchslim.errors import BadFile, UnknownName, warn_caller
from patchslim.hosts._weights import WEIGHTS_FILE
from patchslim.saving.folder import CARD_FILE, RECIPE_FILE, written_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hf-hub:"  # stands before the name of a repository, as in timm
MESSAGE = "A model slimmed by patchslim"


class Upload(TypedDict, total=False):
    """How to upload, by the names of the Hub's own client.

    Attributes:
        private: whether a repository that is made is private.
        commit_message: what the commit says.
        revision: the branch, made if need be; by default the main one.
        token: who uploads; by default who is logged in.
    """

    private: bool
    commit_message: str
    revision: str
    token: str


def download(
    repository: str,
    names: Sequence[str] = (WEIGHTS_FILE, RECIPE_FILE),
    *,
    nested: bool = False,
) -> Path:
    """Downloads files of a Hub repository into the Hub client's cache; returns the folder there.

    Args:
        repository: its owner and name, and perhaps `@` and a branch, tag or commit, as in timm.
        names: names or patterns of files at the top of the repository, by default those of a saved
            model. Nothing else is fetched.
        nested: whether names may also be of files in folders.
    """
    from huggingface_hub import snapshot_download

    try:
        ignored = None if nested else ["*/*"]
        name, _, revision = repository.partition("@")
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*names],
                ignore_patterns=ignored,
            )
        )
    except _hub_errors() as error:
        raise BadFile(
            f"{repository!r} cannot be fetched from the Hub: {error} Without a network, give the "
            "path of a folder that was downloaded before."
        ) from error


def upload(path: Path, repository: str, **how: Unpack[Upload]) -> str:
    """Uploads a folder or a file to a Hub repository, made if need be, and returns its address."""
    from huggingface_hub import HfApi

    unknown = sorted(how.keys() - Upload.__annotations__.keys())
    if unknown:
        raise UnknownName.of("setting of push_to_hub", unknown[0], [*Upload.__annotations__])
    api = HfApi(token=how.get("token"))
    message, revision = how.get("commit_message", MESSAGE), how.get("revision")
    try:
        address = api.create_repo(repository, private=how.get("private", False), exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        if path.is_dir():
            keeps_card = _has_own_card(api, repository, revision)
            api.upload_folder(
                repo_id=repository,
                folder_path=path,
                ignore_patterns=[CARD_FILE] if keeps_card else None,
                commit_message=message,
                revision=revision,
            )
        else:
            api.upload_file(
                repo_id=repository,
                path_or_fileobj=path,
                path_in_repo=path.name,
                commit_message=message,
                revision=revision,
            )
    except _hub_errors() as error:
        raise BadFile(
            f"Could not upload to {repository!r}: {error}. Log in with `hf auth login`, or "
            "save to a folder with .save(path)."
        ) from error
    return str(address)


def _has_own_card(api: HfApi, repository: str, revision: str | None) -> bool:
    """Tells whether a repository has a card that somebody wrote or edited, which then stays."""
    if not api.file_exists(repository, CARD_FILE, revision=revision):
        return False
    files = [CARD_FILE]
    if api.file_exists(repository, RECIPE_FILE, revision=revision):
        files.append(RECIPE_FILE)
    folders = {
        Path(api.hf_hub_download(repository, each, revision=revision)).parent for each in files
    }
    if CARD_FILE in written_files(folders.pop()):
        return False
    warn_caller(
        f"{repository} has a card that was written or edited by hand, so {CARD_FILE} was not "
        "uploaded, with the results in it. Put into that card what it should say.",
        UserWarning,
    )
    return True


def _hub_errors() -> tuple[type[BaseException], ...]:
    """Returns the errors that the Hub's client raises for network, repository, rights or name.

    The client builds on another library in another version, so its base error differs, too. It
    is looked up as the base class of the client's own error.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)
