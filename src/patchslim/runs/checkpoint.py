"""Checkpoints: files with the state of a run, written atomically and verified when they are read.

A state is tensors, numbers and text in dictionaries, lists and tuples; this file knows neither
models nor optimisers. A checkpoint is what torch.save writes, followed by one line: the version of
the format, and the SHA-256 of everything before it. torch itself does not notice a changed bit.
Reading a checkpoint never runs code from it.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from patchslim.errors import BadFile
from patchslim.files import replace_file
from patchslim.hosts._weights import check_not_compressed
from patchslim.runs.interrupts import defer_interrupts

FORMAT = 1
SEAL = re.compile(rb"\npatchslim checkpoint (\d{4}) ([0-9a-f]{64})\n")
SEAL_LENGTH = len("\npatchslim checkpoint 0000 \n") + 64
CURE = "Give another checkpoint, or train from the start."


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint. An older one at `path` is replaced only once the new one is complete.

    Raises:
        BadFile: the disk is full or cannot be written. The older checkpoint is untouched.
    """
    state = _to_plain(state, "state")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as fresh, fresh.open("wb") as file:
            stream = _HashingFile(file)
            _write_state(state, stream)
            file.write(
                f"\npatchslim checkpoint {FORMAT:04d} {stream.sha256.hexdigest()}\n".encode()
            )
    except OSError as error:
        raise BadFile(
            f"Could not write the checkpoint {path}: {_explain_failure(error, path, state)}. "
            "What was there before is as it was."
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Reads the state that `write` wrote. All tensors are on the CPU.

    Raises:
        BadFile: the file is missing, truncated, changed, of another kind, or of a newer format.
    """
    try:
        _check_seal(path)
        check_not_compressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadFile(
            f"The checkpoint {path} cannot be read: {error.strerror or error}. {CURE}"
        ) from error
    except Exception as error:  # unpickling a foreign file can raise anything
        if isinstance(error, BadFile):
            raise
        raise BadFile(
            f"{path} holds other things than tensors and plain values, and none of it was run. "
            f"It is no checkpoint of patchslim. {CURE}"
        ) from error
    if not isinstance(state, dict):
        raise BadFile(f"{path} holds a {type(state).__name__}, not a state of training. {CURE}")
    return state


class _HashingFile:
    """A file for torch.save that hashes what is written, and keeps the error of a failed write."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _write_state(state: Mapping[str, Any], stream: _HashingFile) -> None:
    """Writes the state with torch.save. Errors of the disk are raised as the OSError they were."""
    try:
        with defer_interrupts():
            torch.save(state, cast("IO[bytes]", stream))
    except RuntimeError:
        # torch hides a failed write behind a message about positions in the file.
        if stream.error is None:
            raise
        raise stream.error from None


def _check_seal(path: Path) -> None:
    """Refuses a file that differs in any bit from what `write` wrote."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise BadFile(f"{path} is not a file, so it is no checkpoint. {CURE}")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            raise BadFile(f"The checkpoint {path} is empty. {CURE}")
        file.seek(max(0, size - SEAL_LENGTH))
        seal = SEAL.fullmatch(file.read())
        if seal is None:
            raise BadFile(f"{path} is truncated, or is no checkpoint of patchslim. {CURE}")
        if int(seal[1]) > FORMAT:
            raise BadFile(
                f"The checkpoint {path} is of format {int(seal[1])}, and this version reads up to "
                f"{FORMAT}. Go on with the version that wrote it: pip install -U patchslim"
            )
        sha256 = _sha256(file, size - SEAL_LENGTH)
    if sha256 != seal[2].decode():
        raise BadFile(f"The checkpoint {path} was changed or damaged: its SHA-256 differs. {CURE}")


def _sha256(file: BinaryIO, size: int) -> str:
    """Returns the SHA-256 of the first `size` bytes."""
    sha256 = hashlib.sha256()
    file.seek(0)
    while size > 0 and (part := file.read(min(size, 1 << 20))):
        sha256.update(part)
        size -= len(part)
    return sha256.hexdigest()


def _to_plain(value: Any, name: str) -> Any:
    """Copies a value into plain containers, which can be read back without running code."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _to_plain(each, f"{name}[{key!r}]") for key, each in value.items()}
    if isinstance(value, list | tuple):
        parts = [_to_plain(each, f"{name}[{place}]") for place, each in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    raise TypeError(
        f"{name} is a {type(value).__name__}. A checkpoint holds tensors, numbers and text."
    )


def _count_bytes(value: Any) -> int:
    """Returns how many bytes the tensors of a state take."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(map(_count_bytes, value.values()))
    return sum(map(_count_bytes, value)) if isinstance(value, list | tuple) else 0


def _explain_failure(error: OSError, path: Path, state: Mapping[str, Any]) -> str:
    """Says why writing failed; if the disk is full, also how much space is needed."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error.strerror or str(error)
    free = shutil.disk_usage(path.parent).free / 1e6
    return (
        f"the disk is full. {_count_bytes(state) / 1e6:,.1f} MB are needed beside the old one, and "
        f"{free:,.1f} MB are free. Make room, then go on from the old one"
    )
