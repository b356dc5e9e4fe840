"""Reads files of a folder, and only those: never a pipe, a socket or a device under such a name."""

from __future__ import annotations

import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from patchslim import files
from patchslim.data.limits import Limits
from patchslim.errors import BadData, BadFile

# All errors that Pillow and the archive readers raise for a damaged file.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile,
    tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, KeyError, IndexError,
    OverflowError, MemoryError)  # fmt: skip
MOST_LINKED_FOLDERS = 30_000  # links in circles make paths without end
KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class Files(Protocol):
    """Files in a folder or in an archive.

    Attributes:
        notices: what the reader should be told of files that are not read, found by `names`.
    """

    notices: list[str]

    def names(self) -> list[str]:
        """Lists the names of all files, with the folders they are in."""

    def read(self, name: str) -> bytes:
        """Reads one file; raises one of READ_ERRORS if it cannot."""


class Folder:
    """The files below a folder, at any depth. Links are followed, as in torchvision."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits
        self.notices: list[str] = []

    def names(self) -> list[str]:
        """Lists the paths of all files, relative to the folder."""
        walk = FolderWalk(self._limits)
        found = list(walk.files(self._path))
        self.notices = walk.notices()
        return found

    def read(self, name: str) -> bytes:
        """Reads one file."""
        return read_regular(self._path / name, self._limits)


class SingleFile(Folder):
    """One file by itself."""

    def __init__(self, path: Path, limits: Limits) -> None:
        super().__init__(path.parent, limits)
        self._name = path.name

    def names(self) -> list[str]:
        """Lists the one name."""
        return [self._name]


class FolderWalk:
    """One walk through a folder; it notes the folders that it could not read or did not enter."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._count = self._linked = 0
        self._circles: list[str] = []
        self._closed: list[str] = []

    def files(self, root: Path) -> Iterator[str]:
        """Yields what is no folder: files, and whatever else is there under a name."""
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]
        while waiting:
            inside, above = waiting.pop()
            try:
                there = (root / inside).stat()
                entries = list(os.scandir(root / inside))
            except OSError:
                self._closed.append(inside or ".")
                continue
            here = (*above, (there.st_dev, there.st_ino))
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                self._count += 1
                self._limits.check_members(self._count, root)
                if not is_folder(entry):
                    yield name
                elif not entry.is_symlink() or self._may_follow(entry, here, name, root):
                    waiting.append((name, here))

    def _may_follow(
        self, entry: os.DirEntry[str], here: tuple[tuple[int, int], ...], name: str, root: Path
    ) -> bool:
        """Whether a link leads to a folder that is not one of those it lies in."""
        target = Path(entry.path).stat()
        if (target.st_dev, target.st_ino) in here:
            self._circles.append(name)
            return False
        self._linked += 1
        if self._linked > MOST_LINKED_FOLDERS:
            raise BadData(
                f"{root} leads through more than {MOST_LINKED_FOLDERS:,} links to folders. Do they "
                "lead to each other?"
            )
        return True

    def notices(self) -> list[str]:
        """A line for each kind of folder that was left out."""
        found = []
        for names, why in (
            (self._circles, "lead back to a folder that they lie in, and are not followed"),
            (self._closed, "cannot be read, and are left out"),
        ):
            if names:
                found.append(f"{len(names)} folders {why}, such as {min(names)}")
        return found


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a broken link is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def describe_kind(mode: int) -> str:
    """Says what a path is that is no regular file."""
    return KINDS.get(stat.S_IFMT(mode), "no regular file")


def check_regular(path: Path) -> None:
    """Refuses a path that is no regular file, without opening it."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise BadData(f"{shorten(path)} cannot be read: {shorten(error)}") from error
    if not stat.S_ISREG(mode):
        raise BadData(f"{shorten(path)} is {describe_kind(mode)}, and a file is needed.")


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file; opening anything else could wait for ever, or do something."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
        mode = os.fstat(descriptor).st_mode  # it may have been replaced since
        if stat.S_ISREG(mode):
            return os.fdopen(descriptor, "rb", buffering=0)
        os.close(descriptor)
    raise ValueError(f"it is {describe_kind(mode)}, not a file")


def read_regular(path: Path, limits: Limits) -> bytes:
    """Reads a regular file within the limits."""
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        limits.check_file(size)
        data = stream.read(size + 1)
    # Files of the kernel say that they are empty, and hold something or wait for something.
    if data is None or len(data) != size:
        raise ValueError("it changes while it is read")
    return data


def resolve_path(path: str | Path) -> Path:
    """Returns the absolute path of data that somebody named, `~` expanded.

    Raises:
        BadData: it can be no path.
    """
    try:
        return files.resolve_path(path)
    except BadFile as error:
        raise BadData(str(error)) from error


def shorten(text: object, most: int = 200) -> str:
    """The text in one line, cut if it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else f"{line[:most]}..."
