"""Who owns a folder or file of results: one process at a time, until it ends.

The owner holds a lock of the operating system on a small file, `.patchslim.lock` in a folder of a
run and `.NAME.patchslim.lock` beside what is replaced as a whole. The text in it says who the owner
is. The system releases the lock when its process ends, however that happens, and processes that it
forked do not inherit it. So a lock that a dead process left behind does not hold.

Locks between machines need a file system that has them (NFS 4 does). Where it has none, and where
the text names another machine, a lock counts as held until its file is deleted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile
from patchslim.files import resolve_path

LOCK_FILE = ".patchslim.lock"
MOST_TEXT = 10_000  # bytes of a lock file that are read
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP)

# Owned by this process, for its other threads; and owned already by the call that runs now. Both
# hold the id of the process, since a process that was forked owns nothing.
_Lock = tuple[int, Path]
_in_process: set[_Lock] = set()
_guard = threading.Lock()
# Lock files and folders that this process has made and removes when a block ends.
_traces: list[Path] = []
_in_call: ContextVar[frozenset[_Lock]] = ContextVar("owned", default=frozenset())


@dataclass(frozen=True)
class Owner:
    """A process that owns something.

    Attributes:
        host: the name of its machine.
        process: its id there.
        started: when the process started, in the system's own count. Ids are used again, and two
            processes of one id differ in this.
        since: the time when it took the lock.
        command: its command line.
    """

    host: str
    process: int
    started: str
    since: str
    command: str

    @classmethod
    def this(cls) -> Owner:
        """Returns this process."""
        return cls(
            socket.gethostname(),
            os.getpid(),
            _start_time(os.getpid()),
            time.strftime("%Y-%m-%d %H:%M:%S"),
            shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:500],
        )

    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether the process, of this machine, still runs; True where nobody can tell."""
        if os.name == "nt":  # there `os.kill` would end it
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return True  # it is somebody else's
        return _start_time(self.process) in (self.started, "")

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}: {self.command}"


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Within the block, this call alone writes into a folder, which is made if it is not there.

    A call inside of the block may own the same folder again. If nothing was written, the folder is
    removed again.

    Raises:
        BadFile: another process, or another thread of this one, owns it; or it cannot be written.
    """
    folder = resolve_path(folder).resolve()
    made = _make_folders(folder)
    try:
        with _own(folder / LOCK_FILE, folder):
            yield
    finally:
        _remove_folders(made)


@contextlib.contextmanager
def own_file(path: Path) -> Iterator[None]:
    """Within the block, this call alone writes a file, or a folder that is replaced as a whole.

    Raises:
        BadFile: another process, or another thread of this one, owns it; or it cannot be written.
    """
    path = resolve_path(path).resolve()
    if not path.name:
        raise BadFile(f"{path} is the root of a disk. Give the path of a new file or folder.")
    made = _make_folders(path.parent)
    try:
        with _own(path.with_name(f".{path.name}{LOCK_FILE}"), path):
            yield
    finally:
        _remove_folders(made)


def remove_traces() -> None:
    """Removes the lock files of this process, and the folders that it made and wrote nothing into.

    For a process that is about to end without leaving its blocks.
    """
    for path in reversed(_traces):
        with contextlib.suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def _remove_folders(made: list[Path]) -> None:
    """Removes folders, the innermost first, unless they hold something by now."""
    for each in made:
        _traces.remove(each)
        with contextlib.suppress(OSError):
            each.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder, and returns those that were not there before, the innermost first."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(
            f"Could not make the folder {folder}: {error.strerror}. Give another one."
        ) from error
    _traces.extend(reversed(made))
    return made


@contextlib.contextmanager
def _own(lock: Path, what: Path) -> Iterator[None]:
    """Holds a lock file; `what` is told in messages."""
    own = (os.getpid(), lock)
    if own in _in_call.get():
        yield
        return
    with _guard:
        if own in _in_process:
            raise _refuse(what, lock, Owner.this(), held=True)
        _in_process.add(own)
    try:
        handle = _take(lock, what)
        _traces.append(lock)
        before = _in_call.set(_in_call.get() | {own})
        try:
            yield
        finally:
            _in_call.reset(before)
            # Deleted while the lock is held, so that nobody can have locked the file in between.
            with contextlib.suppress(OSError):
                lock.unlink()
            _traces.remove(lock)
            os.close(handle)
    finally:
        with _guard:
            _in_process.discard(own)


def _take(lock: Path, what: Path) -> int:
    """Opens and locks the lock file, and writes the owner into it."""
    try:
        while True:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                _check_free(handle, lock, what)
                if _is_same_file(handle, lock):
                    _write_owner(handle)
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its owner deleted it just now: lock the next one
    except OSError as error:
        raise BadFile(
            f"Could not write to {what}: {error.strerror}. Give a folder that can be written."
        ) from error


def _check_free(handle: int, lock: Path, what: Path) -> None:
    """Locks the open file, unless another process holds it."""
    locked = _lock(handle, what, lock)
    owner = _read_owner(handle)
    if owner is None and (locked or not os.fstat(handle).st_size):
        return  # it was only just made, or its owner died before writing into it
    if owner is None or not owner.is_here() or (not locked and owner.is_alive()):
        raise _refuse(what, lock, owner)


def _lock(handle: int, what: Path, lock: Path) -> bool:
    """Asks the system for the lock: True with it, False where the system has none."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _refuse(what, lock, _read_owner(handle), held=True) from None
        raise
    return True


def _refuse(what: Path, lock: Path, owner: Owner | None, *, held: bool = False) -> BadFile:
    """Returns the error that names the owner and the cure."""
    who = owner or "another process"
    cure = "Wait until it has ended, or give another place."
    if not held:
        cure = (
            "From here nobody can tell whether it still runs. If it does not, delete the file "
            f"{lock}; if it does, wait until it has ended, or give another place."
        )
    return BadFile(f"{what} is being written by {who}. {cure}")


def _write_owner(handle: int) -> None:
    """Writes this process into the lock file."""
    text = json.dumps(asdict(Owner.this()), indent=1) + "\n"
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text.encode())
    os.fsync(handle)


def _read_owner(handle: int) -> Owner | None:
    """Reads who owns a lock file; None where it says nothing that can be understood."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        found: Any = json.loads(os.read(handle, MOST_TEXT))
        owner = Owner(**found)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = (owner.host, owner.started, owner.since, owner.command)
    plain = isinstance(owner.process, int) and all(isinstance(each, str) for each in texts)
    return owner if plain else None


def _is_same_file(handle: int, lock: Path) -> bool:
    """Whether the file that was locked still stands at its path."""
    try:
        there = lock.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _start_time(process: int) -> str:
    """When a process started, as the system counts it; "" where it does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The name of the program, in parentheses, may hold anything. Field 22 is the start.
    return f"{boot} {status.rpartition(')')[2].split()[19]}"
