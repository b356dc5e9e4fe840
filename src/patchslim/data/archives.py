"""Zip and tar archives of images, read member by member."""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

# All that Pillow and the archive readers raise for a file that is not what it says.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile,
    tarfile.TarError, zlib.error, KeyError, IndexError)  # fmt: skip


COMPRESSED_MAGIC = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ\x00",
    b"\x28\xb5\x2f\xfd",
)  # gzip, bzip2, xz, zstd


TAR_BLOCK = 512  # bytes of a header in a tar


class Closeable(Protocol):
    """What can be closed."""

    def close(self) -> object:
        """Gives the file back."""


Archive = TypeVar("Archive", bound=Closeable)


class ProcessLocal(Generic[Archive]):
    """An open archive that no two processes share: each opens it at its own first read.

    A handle that lives on in a forked process has one position for both, and they would read from
    each other's places.
    """

    def __init__(self, path: Path, opening: Callable[[Path], Archive]) -> None:
        self._path, self._opening = path, opening
        self._held: tuple[int, Archive] | None = None

    def __call__(self) -> Archive:
        """The archive, open in this process."""
        if self._held is None or self._held[0] != os.getpid():
            self.close()
            self._held = os.getpid(), self._opening(self._path)
        return self._held[1]

    def close(self) -> None:
        """Closes this process's copy, if there is one."""
        if self._held is not None:
            self._held[1].close()
        self._held = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}


class Member(NamedTuple):
    """One file in an uncompressed tar, and where its bytes lie."""

    name: str
    offset: int
    size: int


def list_members(tar: Path) -> list[Member]:
    """The files in an uncompressed tar, by its headers; one of UNREADABLE where it is damaged."""
    with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as opened:
        found = [Member(each.name, each.offset_data, each.size) for each in opened if each.isfile()]
        # tarfile takes a header that it cannot read for the end; the end is a block of zeros.
        file.seek(opened.offset)
        if file.read(TAR_BLOCK).strip(b"\0"):
            raise tarfile.ReadError(f"bad header at byte {opened.offset}")
    return found


def read_slice(file: Path, offset: int, size: int) -> bytes:
    """So many bytes of a file from an offset; the file is opened anew, so nothing is shared."""
    with file.open("rb") as opened:
        opened.seek(offset)
        data = opened.read(size)
    if len(data) < size:
        raise EOFError(f"{file.name} ends before it")
    return data


def is_compressed(file: Path) -> bool:
    """Whether a file begins as gzip, bzip2, xz or zstd write it."""
    with file.open("rb") as opened:
        return opened.read(max(map(len, COMPRESSED_MAGIC))).startswith(COMPRESSED_MAGIC)
