"""What every answer to bad input must be, for the tables in `test_bad_input*.py`.

A row is checked through Python or through the command line: one error, all the words of the row
in its message, and nothing left half written.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from child_process import run_in_process
from patchslim.errors import PatchslimError
from patchslim.hosts._registry import load_adapter
from patchslim.versions import installed_version


def check_python(
    act: Callable[[], Any],
    error: type[PatchslimError],
    words: str,
    *,
    stays: Path,
    out: Path,
    leaves: Iterable[str] = (),
) -> None:
    """Checks that the act raises this very error, with these words, which `|` separates.

    The files in `stays` do not change, and `out` holds at most those of `leaves`.
    """
    before = file_sizes(stays)
    with pytest.raises(PatchslimError) as raised:
        act()
    assert type(raised.value) is error
    check_words(words, str(raised.value))
    assert file_sizes(stays) == before
    assert set(file_sizes(out)) <= set(leaves)


def check_command(
    command: str,
    words: str,
    *,
    stays: Path,
    out: Path,
    leaves: Iterable[str] = (),
    progress: bool = True,
) -> None:
    """Checks that the command ends with code 2 and one error with these words.

    In the command {} is the folder `stays`. Notes and warnings come before the error, and lines of
    progress if `progress` allows them. One line of help may follow.
    """
    before = file_sizes(stays)
    ended = run_in_process(*command.replace("{}", str(stays)).split())
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert "Traceback" not in ended.err
    lines = ended.err.splitlines()
    (place,) = [place for place, text in enumerate(lines) if text.startswith("error: ")]
    assert progress or all(text.startswith(("note:", "warning:")) for text in lines[:place])
    assert len(lines) - place == 1 + lines[-1].startswith("help: "), ended.err
    check_words(words, ended.err)
    assert file_sizes(stays) == before
    assert set(file_sizes(out)) <= set(leaves)


def check_words(words: str, message: str) -> None:
    """Checks that all the words, which `|` separates, are in the message."""
    missing = [word for word in words.split(" | ") if word not in message]
    assert not missing, message


def file_sizes(folder: Path) -> dict[str, int]:
    """Lists the size of every file in a folder."""
    files = sorted(folder.rglob("*")) if folder.is_dir() else []
    return {str(file.relative_to(folder)): file.stat().st_size for file in files if file.is_file()}


def link_all_but(library: str, farm: Path) -> Path:
    """Makes a folder of links to all installed packages but one: a real environment without it."""
    farm.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if entry.name != library and not entry.name.startswith(f"{library}-"):
            (farm / entry.name).symlink_to(entry)
    return farm


def lose_library(library: str, farm: Path) -> None:
    """Makes this process one in which `library` is not installed."""
    packages = str(Path(torch.__file__).parents[1])
    sys.path[:] = [str(farm) if entry == packages else entry for entry in sys.path]
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        del sys.modules[name]
    importlib.invalidate_caches()
    installed_version.cache_clear()
    load_adapter.cache_clear()
