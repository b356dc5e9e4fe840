"""`Log`: the numbers of a training as they come, one row a step, in a CSV file and for TensorBoard.

It does not know what the numbers mean. A run that is resumed goes on with the file as it was at the
checkpoint, so that what is left at the end is the file of a run that nobody interrupted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from patchslim.errors import BadFile, MissingExtra
from patchslim.files import replace_file

LOG_FILE = "log.csv"
EVENTS_FOLDER = "tensorboard"


class Log:
    """An open log in `folder`; `with` closes it.

    Args:
        folder: where `log.csv` and the folder `tensorboard` are or will be.
        columns: names of the numbers, in their order. A row may leave some out.
        tensorboard: whether TensorBoard's files are written too.
        after: the step of the checkpoint that is resumed, 0 for a new run. Later rows are cut off.

    Raises:
        MissingExtra: where TensorBoard is asked for and not installed.
        BadFile: where the log cannot be written, or has other columns.
    """

    def __init__(
        self, folder: Path, columns: Sequence[str], *, tensorboard: bool, after: int
    ) -> None:
        self._columns = tuple(columns)
        self._path = folder / LOG_FILE
        writer = _event_writer() if tensorboard else None
        with _report_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, ("step", *columns), after)
            # Without a buffer a row is in the file, or reported as lost, when `write` returns.
            self._file = self._path.open("ab", buffering=0)
            # TensorBoard then forgets what the interrupted run wrote of later steps.
            self._events = writer and writer(str(folder / EVENTS_FOLDER), purge_step=after + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the row of a step; a column without a value stays empty."""
        strange = sorted(set(values) - set(self._columns))
        if strange:
            raise ValueError(f"The log has no column {strange[0]!r}: {', '.join(self._columns)}.")
        # repr gives back the very same number, so that two logs can be compared bit by bit.
        cells = [repr(float(values[name])) if name in values else "" for name in self._columns]
        with _report_errors(self._path):
            row = ",".join([str(step), *cells]).encode() + b"\n"
            while row:
                row = row[self._file.write(row) :]
            if self._events:
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)
                self._events.flush()

    def close(self) -> None:
        """Ends the log."""
        self._file.close()
        if self._events:
            with _report_errors(self._path):
                self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_log(path: Path) -> list[dict[str, float | None]]:
    """The rows of a `log.csv`; None is what a step did not log. A half written row is left out."""
    try:
        header, lines = _read_lines(path)
    except OSError as error:
        raise BadFile(f"The log {path} cannot be read: {error.strerror}.") from error
    try:
        return [
            {name: float(cell) if cell else None for name, cell in zip(header, cells, strict=True)}
            for cells in (line.split(",") for line in lines)
        ]
    except ValueError as error:
        raise BadFile(f"{path} is not a log of a training: {error}.") from error


def _read_lines(path: Path) -> tuple[list[str], list[str]]:
    """The names of the columns, and the lines below that were written to their end."""
    text = path.read_text(encoding="utf-8", errors="replace")
    header, *lines = text[: text.rfind("\n") + 1].split("\n")
    return header.split(","), lines[:-1]


def _truncate(path: Path, header: Sequence[str], after: int) -> None:
    """Leaves the rows up to the step `after`, in a file that begins with the header."""
    kept: list[str] = []
    if after and path.exists():
        found, lines = _read_lines(path)
        if found != list(header):
            raise BadFile(
                f"{path} has the columns {', '.join(found)}; this run logs {', '.join(header)}. "
                "Go on with the settings that the run began with, or move the file away."
            )
        kept = [line for line in lines if _step_number(line) <= after]
    with replace_file(path) as fresh:
        fresh.write_bytes("".join(f"{line}\n" for line in [",".join(header), *kept]).encode())


def _step_number(line: str) -> float:
    """The step of a row; of what is no row, one that is after all others."""
    start = line.partition(",")[0]
    return int(start) if start.isdecimal() else float("inf")


def _event_writer() -> Any:
    """The class that writes TensorBoard's files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra(
            "TensorBoard is not installed: pip install 'patchslim[train]', or train without it; "
            f"{LOG_FILE} is written either way."
        ) from error
    return SummaryWriter


@contextlib.contextmanager
def _report_errors(path: Path) -> Iterator[None]:
    """Says where a log could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        raise BadFile(
            f"Could not write the log {path}: {error.strerror or error}. "
            "Make room or give another folder, then go on from the last checkpoint."
        ) from error
