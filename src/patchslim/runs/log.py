"""`Log`: the numbers of a training run, one row for each logged step, as CSV and for TensorBoard.

It does not know what the numbers mean. When a run is resumed, rows after its checkpoint are cut off
first. So the finished log is the same as that of a run without an interruption.
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
    """An open log in a folder. Use it in a `with` statement, which closes it.

    Args:
        folder: where `log.csv` and the folder `tensorboard` are written.
        columns: the names of the numbers, in order. A row may leave some out.
        tensorboard: whether to write event files for TensorBoard too.
        after: the step of the checkpoint that is resumed; 0 for a new run. Later rows are cut off.

    Raises:
        MissingExtra: TensorBoard is asked for and not installed.
        BadFile: the log cannot be written, or an existing one has other columns.
    """

    def __init__(
        self, folder: Path, columns: Sequence[str], *, tensorboard: bool, after: int
    ) -> None:
        self._columns = tuple(columns)
        self._path = folder / LOG_FILE
        writer = _event_writer() if tensorboard else None
        with _report_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and not self._path.is_file():  # a pipe would be waited for
                raise BadFile(f"{self._path} is not a file. Delete it, or give another folder.")
            _truncate(self._path, ("step", *columns), after)
            # Unbuffered: when `write` returns, the row is in the file, or an error was raised.
            self._file = self._path.open("ab", buffering=0)
            # purge_step makes TensorBoard drop the steps after the checkpoint.
            self._events = writer and writer(str(folder / EVENTS_FOLDER), purge_step=after + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the row of one step. A column without a value stays empty."""
        unknown = sorted(set(values) - set(self._columns))
        if unknown:
            raise ValueError(f"The log has no column {unknown[0]!r}: {', '.join(self._columns)}.")
        # repr keeps every digit, so that two logs can be compared bit by bit.
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
        """Closes the files of the log."""
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
    """Reads the rows of a `log.csv`. A number that a step did not log is None.

    The last row is left out if it was only half written.

    Raises:
        BadFile: the file cannot be read, or is not a log.
    """
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
    """Reads the names of the columns, and the lines below that are complete."""
    text = path.read_text(encoding="utf-8", errors="replace")
    header, *lines = text[: text.rfind("\n") + 1].split("\n")
    return header.split(","), lines[:-1]


def _truncate(path: Path, header: Sequence[str], after: int) -> None:
    """Keeps the header and the rows up to the step `after`, and drops the rest of the file."""
    kept: list[str] = []
    if after and path.exists():
        columns, lines = _read_lines(path)
        if columns != list(header):
            raise BadFile(
                f"{path} has the columns {', '.join(columns)}; this run logs {', '.join(header)}. "
                "Go on with the settings that the run began with, or move the file away."
            )
        kept = [line for line in lines if _step_number(line) <= after]
    with replace_file(path) as fresh:
        fresh.write_bytes("".join(f"{line}\n" for line in [",".join(header), *kept]).encode())


def _step_number(line: str) -> float:
    """Returns the step of a row, or infinity for a line that is not a row."""
    start = line.partition(",")[0]
    return int(start) if start.isdecimal() else float("inf")


def _event_writer() -> Any:
    """Imports and returns the class that writes event files for TensorBoard."""
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
    """Turns an OSError into a BadFile that names the log and the cure."""
    try:
        yield
    except OSError as error:
        raise BadFile(
            f"Could not write the log {path}: {error.strerror or error}. "
            "Make room or give another folder, then go on from the last checkpoint."
        ) from error
