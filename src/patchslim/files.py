"""A file, or a folder of files, that is replaced whole or not at all, whatever is in it.

The new one is written to a hidden place beside the target, and then changes places with it. A
process that dies on the way leaves at most `.NAME.new` and, of a folder, `.NAME.old`; the next one
clears them away, and reading finds the old content until then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from patchslim.errors import BadFile


@contextlib.contextmanager
def replace_folder(path: Path, holds: Collection[str]) -> Iterator[Path]:
    """An empty folder to fill with the files `holds`; it becomes `path` when the block succeeds."""
    fresh, old = _hidden_sibling(path, "new"), _hidden_sibling(path, "old")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_folder(path.parent):
        _finish_interrupted(path)
        _check_nothing_lost(path, holds)
        fresh.mkdir()
        try:
            yield fresh
            for written in [*fresh.iterdir(), fresh]:
                _sync_to_disk(written)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        _sync_to_disk(path.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """The path of a file to write; it becomes `path` when the block succeeds."""
    fresh = _hidden_sibling(path, "new")
    with _lock_folder(path.parent):
        try:
            yield fresh
            _sync_to_disk(fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
        _sync_to_disk(path.parent)


def find_complete(path: Path) -> Path:
    """Where the content of `path` is to be read: there, or aside if a replacement was cut short."""
    old = _hidden_sibling(path, "old")
    return old if old.exists() and not path.exists() else path


def _hidden_sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _finish_interrupted(path: Path) -> None:
    """Ends what an interrupted process began. Only safe while nobody else writes here."""
    fresh, old = _hidden_sibling(path, "new"), _hidden_sibling(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def _check_nothing_lost(path: Path, holds: Collection[str]) -> None:
    """Replacing a folder deletes what is in it, so it may hold nothing but what is replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise BadFile(f"{path} is a file, and a folder is to be saved. Give another path.")
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in holds)
    if others:
        raise BadFile(
            f"{path} holds other things ({', '.join(others[:3])}), which saving there would "
            "delete. Give the path of a new folder, or move them away."
        )


@contextlib.contextmanager
def _lock_folder(parent: Path) -> Iterator[None]:
    """One writer at a time in `parent`, if the system can say so; the lock dies with its owner."""
    if os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(parent, os.O_RDONLY)
    try:
        # Some network file systems cannot lock a folder. One writer is still safe there.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync_to_disk(path: Path) -> None:
    """Has the disk hold what was written, so that a rename cannot come before it."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: str | Path, text: str) -> None:
    """Writes `text` to `path` so that an interruption leaves the old file whole."""
    with replace_file(Path(path)) as fresh:
        fresh.write_text(text, encoding="utf-8")
