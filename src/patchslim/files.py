"""The door for files: paths, JSON, and replacing a file or a folder as a whole or not at all.

The new content is written to a hidden sibling of the target, which is then renamed to the target.
A process that dies on the way leaves at most `.NAME.new` and, for a folder, `.NAME.old`. The next
writer clears them away, and until then readers find the old content.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import json
import os
import pkgutil
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile
from patchslim.settings import show_value

JSON_BYTES = 16 << 20  # more than any file of ours, or any configuration of a model, has
JSON_DEPTH = 50  # lists and objects within each other


def list_modules(package: str) -> list[str]:
    """Lists the public modules in a package's folders, sorted; such a folder is a registry."""
    paths = importlib.import_module(package).__path__
    return list(_list_modules(tuple((path, Path(path).stat().st_mtime_ns) for path in paths)))


@functools.cache
def _list_modules(folders: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Reads the folders once for each time at which they were changed."""
    found = pkgutil.iter_modules([path for path, _ in folders])
    return tuple(sorted(each.name for each in found if not each.name.startswith("_")))


@contextlib.contextmanager
def replace_folder(path: Path, holds: Callable[[Path], Collection[str]]) -> Iterator[Path]:
    """Gives an empty folder, which becomes `path` if nothing fails.

    Args:
        path: the folder to replace, or to make.
        holds: names the files in it that may be replaced. It is asked while no other process
            writes there.
    """
    if not path.name:
        raise BadFile(f"{path} is the root of a disk. Give the path of a new folder.")
    fresh, old = _hidden_sibling(path, "new"), _hidden_sibling(path, "old")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock_folder(path.parent):
        _finish_interrupted(path)
        check_replaceable(path, holds(path))
        fresh.mkdir()
        try:
            yield fresh
            for written in [*fresh.rglob("*"), fresh]:
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
    """Gives the path of a file to write; it becomes `path` if nothing fails."""
    fresh = _hidden_sibling(path, "new")
    with _lock_folder(path.parent):
        try:
            yield fresh
            _sync_to_disk(fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
        _sync_to_disk(path.parent)


def resolve_path(path: str | Path) -> Path:
    """The absolute path that somebody named, `~` expanded; one error for what can be no path."""
    if not isinstance(path, str | Path):
        raise BadFile(f"{show_value(path)} is a {type(path).__name__}; a path is a text or a Path.")
    if not str(path):
        raise BadFile("The path is empty. Give the path of a file or a folder.")
    try:
        whole = Path(path).expanduser().absolute()
        whole.resolve()  # links that lead to each other
        os.lstat(whole)
    except (ValueError, RuntimeError) as error:  # NUL, half a character, the home of nobody
        raise BadFile(f"{show_value(str(path))} is no path: {error}. Give another one.") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadFile(f"{show_value(str(path))} is too long for a path.") from error
    return whole


def check_writable(path: str | Path, *, folder: bool) -> Path:
    """The absolute path of a file or folder to write, after really trying to write there.

    Called before anything takes long. It leaves nothing behind, and makes no folder.
    """
    whole = resolve_path(path)
    if folder and whole.exists() and not whole.is_dir():
        raise BadFile(f"{show_value(str(path))} is a file, and a folder is needed. Name another.")
    if not folder and (whole.is_dir() or not whole.name):
        raise BadFile(
            f"{show_value(str(path))} is a folder, and a file is to be written. Name one."
        )
    if not folder and whole.exists() and not whole.is_file():
        raise BadFile(
            f"{show_value(str(path))} is a device, and a file is to be written. Name one."
        )
    place = whole if folder and whole.is_dir() else whole.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".patchslim") as trial:
            (Path(trial) / "trial").write_text("x", encoding="utf-8")
    except OSError as error:
        raise BadFile(
            f"{show_value(str(path))} cannot be written: {error.strerror} ({place}). Give another "
            "place, or make this one writable."
        ) from error
    return whole


def find_complete(path: Path) -> Path:
    """Returns where to read `path`: there, or beside it if replacing it was interrupted."""
    if not path.name:
        return path  # the root of a disk, which nobody replaces
    old = _hidden_sibling(path, "old")
    return old if old.exists() and not path.exists() else path


def _hidden_sibling(path: Path, suffix: str) -> Path:
    """Returns `.NAME.suffix` beside a path."""
    return path.with_name(f".{path.name}.{suffix}")


def _finish_interrupted(path: Path) -> None:
    """Cleans up after an interrupted writer. Safe only while the folder is locked."""
    fresh, old = _hidden_sibling(path, "new"), _hidden_sibling(path, "old")
    if old.exists() and not path.exists():
        old.rename(path)
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def check_replaceable(path: Path, holds: Collection[str]) -> None:
    """Refuses to replace a folder that holds anything but the files that are replaced."""
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
    """Lets one process at a time write in `parent`, if the system has locks for folders.

    The system releases the lock if its owner dies.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    handle = os.open(parent, os.O_RDONLY)
    try:
        # Some network file systems cannot lock a folder. There a single writer is still safe.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync_to_disk(path: Path) -> None:
    """Waits until the content is on the disk, so that a crash cannot keep the rename alone."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: str | Path, text: str) -> None:
    """Writes `text` to `path`; if that is interrupted, the old file is still whole."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all: on a full disk the old file is whole."""
    whole = check_writable(path, folder=False)
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(whole) as fresh:
            fresh.write_bytes(content)
    except OSError as error:
        raise BadFile(
            f"Could not write {whole}: {error.strerror or error}. What was there before is as it "
            "was. Make room, or give another place."
        ) from error


def read_json(path: str | Path) -> Any:
    """Reads a JSON file that anybody may have written.

    Raises:
        BadFile: it cannot be read, is too large, or is not plain JSON (see `parse_json`).
    """
    path = resolve_path(path)
    try:
        if not path.is_file():  # a pipe would be waited for, and a device has no end
            raise BadFile(f"{path} is not a file. Give the path of a JSON file.")
        with path.open("rb") as file:
            data = file.read(JSON_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read: {error}.") from error
    return parse_json(data, path)


def parse_json(data: bytes, source: object) -> Any:
    """Parses JSON strictly: what it returns can be written again, and says only one thing.

    Args:
        data: the text, in UTF-8.
        source: where it stands, for the error message.

    Raises:
        BadFile: it is too large or too deep, has a name twice or a number that is not finite, or is
            not JSON.
    """
    if len(data) > JSON_BYTES:
        raise BadFile(f"{source} has more than {JSON_BYTES >> 20} MB. No file of this kind has.")
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_names,
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
        _check_plain(parsed)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{source} is not readable as JSON: {error}") from error
    return parsed


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, no name of which is there twice: readers would differ in which one counts."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:100]!r} is there twice")
    return made


def _finite_float(text: str) -> float:
    """A number; NaN and infinity, which JSON does not have and Python reads, are refused."""
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{text[:100]} is not a finite number")
    return number


def _check_plain(parsed: Any) -> None:
    """Refuses what is nested too deep to be worked with, and text that cannot be written."""
    level = [parsed]
    for _ in range(JSON_DEPTH):
        for value in level:
            if isinstance(value, str):
                value.encode("utf-8")  # half a character (a lone surrogate) is a ValueError
        level = [
            part
            for value in level
            if isinstance(value, (dict, list))
            for part in ((*value, *value.values()) if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {JSON_DEPTH} levels")
