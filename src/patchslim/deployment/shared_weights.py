"""A file in which several artefacts keep their weights in common."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

WEIGHTS_FILE = "weights.bin"
ALIGNED = 64  # bytes; runtimes map the file into memory and read whole vectors


class SharedWeights:
    """Writes tensors into one file, equal ones once.

    It is a context: the file is complete when it ends.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._places: dict[bytes, int] = {}

    def add(self, content: bytes) -> int:
        """Where in the file these bytes stand."""
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNED))
            self._places[key] = self._file.tell()
            self._file.write(content)
        return self._places[key]

    def __enter__(self) -> SharedWeights:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._file.close()


def digest_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
