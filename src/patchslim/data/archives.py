"""Reads files out of folders and of zip and tar archives, one at a time.

`open_files` opens whatever holds the files. Any number of processes may read at once.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

# All errors that Pillow and the archive readers raise for a damaged file.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile,
    tarfile.TarError, zlib.error, KeyError, IndexError)  # fmt: skip


# The first bytes of files that gzip, bzip2, xz and zstd write.
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
TAR_BLOCK = 512  # bytes of a header in a tar
ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


class Files(Protocol):
    """Files in a folder or in an archive."""

    def names(self) -> list[str]:
        """Lists the names of all files, with the folders they are in."""

    def read(self, name: str) -> bytes:
        """Reads one file."""


def open_files(path: Path) -> Files:
    """Opens a folder or an archive; treats any other file as the only one."""
    name = path.name.lower()
    if path.is_dir():
        return Folder(path)
    if name.endswith(ZIP_SUFFIXES):
        return Zip(path)
    if name.endswith(TAR_SUFFIXES):
        return CompressedTar(path) if is_compressed(path) else Tar(path)
    return SingleFile(path)


class Folder:
    """Files below a folder, at any depth."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """Lists the paths of all files, relative to the folder."""
        files = (file for file in self._path.rglob("*") if file.is_file())
        return [file.relative_to(self._path).as_posix() for file in files]

    def read(self, name: str) -> bytes:
        """Reads one file."""
        return (self._path / name).read_bytes()


class SingleFile(Folder):
    """One file by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self._name = path.name

    def names(self) -> list[str]:
        """Lists the one name."""
        return [self._name]


class Closeable(Protocol):
    """Anything with a `close` method, such as an open archive."""

    def close(self) -> object:
        """Closes the file."""


Archive = TypeVar("Archive", bound=Closeable)


class ProcessLocal(Generic[Archive]):
    """An archive that every process opens for itself, when it first reads from it.

    A file that is open during a fork has one position for both processes, and each would move it
    for the other. So a fork or a pickled copy opens the archive again.
    """

    def __init__(self, path: Path, open_archive: Callable[[Path], Archive]) -> None:
        self._path, self._open_archive = path, open_archive
        self._opened: tuple[int, Archive] | None = None  # by which process, and what

    def __call__(self) -> Archive:
        """Returns the archive, opened by this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            self.close()
            self._opened = os.getpid(), self._open_archive(self._path)
        return self._opened[1]

    def close(self) -> None:
        """Closes the archive if it is open."""
        if self._opened is not None:
            self._opened[1].close()
        self._opened = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class Zip:
    """Files in a zip."""

    def __init__(self, path: Path) -> None:
        self._archive = ProcessLocal(path, zipfile.ZipFile)

    def names(self) -> list[str]:
        """Lists all files, without the folders."""
        return [name for name in self._archive().namelist() if not name.endswith("/")]

    def read(self, name: str) -> bytes:
        """Reads one file."""
        return self._archive().read(name)


class Tar:
    """Files in an uncompressed tar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members = {member.name: member for member in list_members(path)}

    def names(self) -> list[str]:
        """Lists all files."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """Reads one file."""
        _, offset, size = self._members[name]
        return read_slice(self._path, offset, size)


class OpenTar:
    """An open tar with an index of its files by name."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path)  # noqa: SIM115 (closed below, or by its owner)
        try:
            self.members = {info.name: info for info in self._tar.getmembers() if info.isfile()}
        except READ_ERRORS:
            self._tar.close()
            raise

    def read(self, name: str) -> bytes:
        """Reads one file."""
        file = self._tar.extractfile(self.members[name])
        return b"" if file is None else file.read()

    def close(self) -> None:
        """Closes the tar."""
        self._tar.close()


class CompressedTar:
    """Files in a compressed tar; to read one, all that come before it are unpacked."""

    def __init__(self, path: Path) -> None:
        self._archive = ProcessLocal(path, OpenTar)

    def names(self) -> list[str]:
        """Lists all files."""
        return list(self._archive().members)

    def read(self, name: str) -> bytes:
        """Reads one file."""
        return self._archive().read(name)


class Member(NamedTuple):
    """Name of a file in an uncompressed tar, and where its bytes are."""

    name: str
    offset: int
    size: int


def list_members(tar: Path) -> list[Member]:
    """Lists the files in an uncompressed tar; raises one of READ_ERRORS if it is damaged."""
    with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        members = [
            Member(info.name, info.offset_data, info.size) for info in archive if info.isfile()
        ]
        # tarfile stops without an error at a header that it cannot read, as if the archive ended
        # there. A real end is a block of zeros.
        file.seek(archive.offset)
        if file.read(TAR_BLOCK).strip(b"\0"):
            raise tarfile.ReadError(f"bad header at byte {archive.offset}")
    return members


def read_slice(file: Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes from `offset`. Each call opens the file, so processes share nothing."""
    with file.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{file.name} ends before it")
    return data


def is_compressed(file: Path) -> bool:
    """Tells whether a file was written by gzip, bzip2, xz or zstd, by its first bytes."""
    with file.open("rb") as stream:
        return stream.read(max(map(len, COMPRESSED_MAGIC))).startswith(COMPRESSED_MAGIC)
