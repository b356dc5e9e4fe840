"""Reads the headers of a tar, and the bytes of one member, within limits.

It lists what is no regular file, too, so that nothing vanishes. No member is written to the disk.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from patchslim.data.files import open_regular, shorten
from patchslim.data.limits import Limits
from patchslim.errors import BadData

TAR_BLOCK = 512  # bytes of a header in a tar
MOST_HEADER = 1 << 20  # bytes of a name or a pax header, beyond any path
ZSTD = b"\x28\xb5\x2f\xfd"
# The first bytes of files that gzip, bzip2 and xz write, and what unpacks them.
UNPACKERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
}
COMPRESSED_MAGIC = (*UNPACKERS, ZSTD)


class Member(NamedTuple):
    """A file in an archive: where its bytes are, or why it cannot be read."""

    name: str
    offset: int
    size: int
    problem: str = ""
    is_link: bool = False


class TarStream:
    """An open tar, unpacked as it is read; it refuses to unpack more than the limits allow."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits
        self._packed = path.stat().st_size
        self._raw: Any = open_regular(path)
        magic = self._raw.read(max(map(len, COMPRESSED_MAGIC)))
        self._raw.seek(0)
        if magic.startswith(ZSTD):
            self._raw.close()
            raise BadData(f"{path} is packed by zstd, which is not read here. Unpack it (unzstd).")
        unpack = next((made for start, made in UNPACKERS.items() if magic.startswith(start)), None)
        self._is_packed = unpack is not None
        # Reading ahead spares a call to the system for each header.
        buffered: Any = io.BufferedReader(self._raw)
        self._stream: Any = unpack(buffered) if unpack else buffered

    def read(self, size: int = -1) -> bytes:
        """Reads a header; tarfile asks for as many bytes as the one before it says."""
        if not 0 <= size <= MOST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        data: bytes = self._stream.read(size)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a place, within the limits; `whence` is always 0."""
        if self._is_packed:
            self._limits.check_unpacked(offset, self._packed, self._path)
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        """The place of the next byte."""
        return int(self._stream.tell())

    def read_at(self, offset: int, size: int) -> bytes:
        """Reads the bytes of a member, whose size is within the limits."""
        self.seek(offset)
        data: bytes = self._stream.read(size)
        if len(data) < size:
            raise EOFError(f"{self._path.name} ends before it")
        return data

    def close(self) -> None:
        """Closes the tar."""
        self._stream.close()
        self._raw.close()


def iterate_members(path: Path, limits: Limits) -> Iterator[Member]:
    """Yields what is in a tar, folders left out; the last one may be NO_END.

    Raises one of READ_ERRORS if the tar is damaged.
    """
    stream: Any = TarStream(path, limits)
    try:
        archive: Any
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            known: dict[str, Member] = {}
            count = 0
            while (info := archive.next()) is not None:
                archive.members.clear()  # tarfile keeps them all, a kilobyte each
                count += 1
                limits.check_members(count, path)
                if info.isdir():
                    continue
                member = _make_member(info, known)
                known[PurePosixPath(info.name).as_posix()] = member
                yield member
            # tarfile stops without an error at a header that it cannot read, as if the archive
            # ended there. A real end is a block of zeros.
            stream.seek(archive.offset)
            block = stream.read(TAR_BLOCK)
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"bad header at byte {archive.offset}")
            if not block:
                yield NO_END
    finally:
        stream.close()


NO_END = Member("", 0, 0, "the tar has no end")


def _make_member(info: tarfile.TarInfo, known: dict[str, Member]) -> Member:
    """Makes a member; a hard link is the file of that name before it."""
    name, kind = info.name, info.type
    target = known.get(PurePosixPath(info.linkname).as_posix()) if info.islnk() else None
    if target is not None:
        return target._replace(name=name)
    if info.issym() or info.islnk():
        return Member(name, 0, 0, f"it is a link to {shorten(info.linkname, 80)!r}", is_link=True)
    if info.issparse():
        return Member(name, 0, 0, "it is stored as a sparse file")
    if not info.isreg():
        return Member(name, 0, 0, f"it is no regular file, but of type {kind!r}")
    if info.size < 0:
        return Member(name, 0, 0, f"it has {info.size} bytes")
    return Member(name, info.offset_data, info.size)


def list_members(path: Path, limits: Limits) -> tuple[list[Member], list[str]]:
    """Lists what is in a tar, and says if its end may be missing."""
    members = list(iterate_members(path, limits))
    if members and members[-1] is NO_END:
        return members[:-1], [f"{path} has no mark at its end, and may have been cut there"]
    return members, []


def read_slice(file: Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes from `offset`. Each call opens the file, so processes share nothing."""
    with file.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{file.name} ends before it")
    return data


def is_compressed(file: Path) -> bool:
    """Whether a file was written by gzip, bzip2, xz or zstd, by its first bytes."""
    with open_regular(file) as stream:
        return stream.read(max(map(len, COMPRESSED_MAGIC))).startswith(COMPRESSED_MAGIC)
