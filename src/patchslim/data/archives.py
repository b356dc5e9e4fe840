"""Reads files out of zip and tar archives, one at a time, and never writes one to the disk.

`open_files` opens whatever holds the files. Any number of processes may read at once.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Protocol, TypeVar

from patchslim.data.files import Files, Folder, SingleFile, check_regular
from patchslim.data.limits import Limits
from patchslim.data.tars import Member, TarStream, is_compressed, list_members, read_slice

ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# Others need memory that no header tells, and images hardly shrink anyway.
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MADE_BY_DOS = 0


def open_files(path: Path, limits: Limits) -> Files:
    """Opens a folder or an archive; treats any other file as the only one."""
    name = path.name.lower()
    if path.is_dir():
        return Folder(path, limits)
    check_regular(path)
    if name.endswith(ZIP_SUFFIXES):
        return Zip(path, limits)
    if name.endswith(TAR_SUFFIXES):
        return CompressedTar(path, limits) if is_compressed(path) else Tar(path, limits)
    return SingleFile(path, limits)


class Closeable(Protocol):
    """Anything with a `close` method, such as an open archive."""

    def close(self) -> object:
        """Closes the file."""


Archive = TypeVar("Archive", bound=Closeable)


class ProcessLocal(Generic[Archive]):
    """An archive that every process opens for itself, when it first reads from it.

    A file that is open during a fork has one position for both processes: each would move the
    other's. So a fork or a pickled copy opens the archive again.
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


class Index:
    """The members of an archive by their names, each of which stands for one file.

    Of several members with one name the last is read, as whoever unpacks the archive gets it.
    """

    def __init__(self, path: Path, members: Iterable[Member], limits: Limits) -> None:
        self._limits = limits
        self.members: dict[str, Member] = {}
        copies: Counter[str] = Counter()
        links = []
        for member in members:
            name = PurePosixPath(member.name).as_posix()
            copies[name] += 1
            self.members[name] = member
            links += [name] if member.is_link else []
        self.notices: list[str] = []
        several = [name for name, count in copies.items() if count > 1]
        if several:
            self.notices.append(
                f"{path} has {len(several)} names that stand for several files each, such as "
                f"{min(several)}: of each the last file is read"
            )
        if links:
            self.notices.append(
                f"{path} has {len(links)} links, such as {min(links)}, which are not followed"
            )

    def find(self, name: str) -> Member:
        """Returns a member that can be read; raises a ValueError for any other."""
        member = self.members[name]
        if member.problem:
            raise ValueError(member.problem)
        self._limits.check_file(member.size)
        return member


class Zip:
    """Files in a zip."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._archive = ProcessLocal(path, zipfile.ZipFile)
        infos = self._archive().infolist()
        limits.check_members(len(infos), path)
        unpacked = sum(info.file_size for info in infos)
        limits.check_unpacked(unpacked, path.stat().st_size, path)
        places = enumerate(infos)
        members = [_zip_member(info, place) for place, info in places if not info.is_dir()]
        self._index = Index(path, members, limits)
        self.notices = self._index.notices

    def names(self) -> list[str]:
        """Lists all files, without the folders."""
        return list(self._index.members)

    def read(self, name: str) -> bytes:
        """Reads one file."""
        member = self._index.find(name)
        archive = self._archive()
        with archive.open(archive.infolist()[member.offset]) as file:
            # With its size it unpacks no more than that, whatever follows in the archive.
            data = file.read(member.size)
        if len(data) < member.size:
            raise EOFError("the archive holds only a part of it")
        return data


def _zip_member(info: zipfile.ZipInfo, place: int) -> Member:
    """Makes a member of a zip; its offset is its place in the list of all."""
    name = info.filename
    if info.create_system == MADE_BY_DOS:
        name = name.replace("\\", "/")
    kind = stat.S_IFMT(info.external_attr >> 16)
    is_link = kind == stat.S_IFLNK
    problem = escape_problem(name)
    if info.compress_type not in ZIP_METHODS:
        problem = f"it is packed by method {info.compress_type}; stored and deflated files are read"
    elif kind not in (0, stat.S_IFREG):
        problem = "it is a link" if is_link else "it is no regular file"
    return Member(name, place, info.file_size, problem, is_link)


class Tar:
    """Files in an uncompressed tar."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self._index = _index_tar(path, limits)
        self.notices = self._index.notices

    def names(self) -> list[str]:
        """Lists all files."""
        return list(self._index.members)

    def read(self, name: str) -> bytes:
        """Reads one file."""
        member = self._index.find(name)
        return read_slice(self._path, member.offset, member.size)


class CompressedTar:
    """Files in a compressed tar; to read one, all that come before it are unpacked."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._index = _index_tar(path, limits)
        self.notices = self._index.notices
        self._stream = ProcessLocal(path, _Opener(limits))

    def names(self) -> list[str]:
        """Lists all files."""
        return list(self._index.members)

    def read(self, name: str) -> bytes:
        """Reads one file."""
        member = self._index.find(name)
        return self._stream().read_at(member.offset, member.size)


class _Opener:
    """Opens a compressed tar within limits; unlike a lambda it can be pickled."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def __call__(self, path: Path) -> TarStream:
        """Opens it."""
        return TarStream(path, self._limits)


def _index_tar(path: Path, limits: Limits) -> Index:
    """Reads all headers of a tar."""
    members = []
    listed, ending = list_members(path, limits)
    for member in listed:
        problem = member.problem or escape_problem(member.name)
        members.append(member._replace(problem=problem))
    index = Index(path, members, limits)
    index.notices += ending
    return index


def escape_problem(name: str) -> str:
    """Says that a name leads out of the archive, where its class folder would mean nothing."""
    path = PurePosixPath(name)
    drive = len(name) > 1 and name[1] == ":" and name[0].isalpha()
    if path.is_absolute() or ".." in path.parts or drive:
        return "its name leads out of the archive"
    return ""
