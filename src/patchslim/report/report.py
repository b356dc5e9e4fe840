"""`Report`: measured results, which cannot exist without their birth certificate.

It holds numbers and shows them as text. It does not know how they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile
from patchslim.files import write_atomically
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.report.csv import csv_text
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles, Row

FORMAT_VERSION = 1
COLUMNS = (
    "model",
    "left",
    "MACs",
    "accuracy %",
    "vs dense",
    "vs random",
    "agree %",
    "KL (nats)",
    "ms an image",
    "speed-up",
    "conv.",
    "peak MB",
)


@dataclass(frozen=True)
class Report:
    """Measured rows, the dense model's first, and the certificate they cannot do without.

    `prepared` is how the images were prepared, where what they came from says so.
    """

    rows: tuple[Row, ...]
    birth: Provenance
    title: str
    prepared: Preprocessing | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.birth, Provenance):
            raise TypeError("A Report needs its birth certificate: Birth.now(host, ...).")
        if not self.rows or self.rows[0].method != "dense":
            raise ValueError("The first row of a Report is the dense model's.")

    @property
    def dense(self) -> Row:
        """The row of the untouched host."""
        return self.rows[0]

    def baseline(self, row: Row) -> Row | None:
        """The row of `random` at the same counts, or None where it was not measured."""
        lots = [each for each in self.rows if each.method == "random"]
        if row.spent is None:
            lots = [each for each in lots if each.tokens == row.tokens]
        else:  # at the mean of its counts
            lots = [each for each in lots if each.name == f"random/{row.name}"]
        if row.method in ("dense", "random") or not lots:
            return None
        return min(lots, key=lambda each: abs(each.macs - row.macs))

    def gain(self, row: Row) -> float | None:
        """Accuracy above `random` at the same counts; agreement where there were no labels."""
        other = self.baseline(row)
        if other is None:
            return None
        if row.accuracy is not None and other.accuracy is not None:
            return row.accuracy.value - other.accuracy.value
        if row.agreement is not None and other.agreement is not None:
            return row.agreement.value - other.agreement.value
        return None

    def cells(self, row: Row) -> tuple[str, ...]:
        """The row as text, one entry for each of COLUMNS."""
        gain = self.gain(row)
        return (
            row.name,
            str(row.tokens[-1]),
            f"{row.macs_share:.3f}" if row.spent is None else row.spent.show(),
            "-" if row.accuracy is None else row.accuracy.show(percent=True),
            "-" if row.change is None else row.change.show(percent=True, signed=True),
            "-" if gain is None else f"{100 * gain:+.1f}",
            "-" if row.agreement is None else row.agreement.show(percent=True),
            "-" if row.kl is None else row.kl.show(),
            _format_quartiles(row.latency),
            _format_quartiles(row.speedup),
            "-" if row.conversion is None else f"{row.conversion:.2f}",
            "-" if row.memory is None else f"{row.memory / 1e6:.1f}",
        )

    def table(self) -> str:
        """The report as aligned plain text."""
        grid = [COLUMNS, *map(self.cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if not place else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in grid
        ]
        lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
        facts = [f"{label}: {value}" for label, value in self.birth.lines()]
        return "\n".join([self.title, "", *lines, "", self.column_notes(), *facts])

    def markdown(self) -> str:
        """The report as a table for a README, its certificate beneath it."""
        grid = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *map(self.cells, self.rows)]
        lines = ["| " + " | ".join(_escape_cell(cell) for cell in cells) + " |" for cells in grid]
        facts = "; ".join(f"{label} {_escape_cell(value)}" for label, value in self.birth.lines())
        return "\n".join(
            [f"**{self.title}**", "", *lines, "", f"{self.column_notes()} {facts}.", ""]
        )

    def column_notes(self) -> str:
        """What the columns of the table mean."""
        return (
            f"left: tokens after the last block; MACs: share of the dense model's "
            f"{self.dense.macs / 1e9:.4g} GMACs an image; ± one standard error; [quartiles]; "
            "conv.: speed-up times MACs."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` turns back into an equal report."""
        return {"format": FORMAT_VERSION, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        """The report that `to_json` wrote."""
        if data.get("format") != FORMAT_VERSION:
            raise BadFile(
                f"This report is of format {data.get('format')!r}, and {FORMAT_VERSION} is known. "
                "Read it with the version of patchslim that wrote it."
            )
        try:
            birth = dict(data["birth"])
            birth["image_size"] = tuple(birth["image_size"])
            birth["load"] = tuple(birth["load"])
            rows = tuple(map(Row.from_json, data["rows"]))
            prepared = Preprocessing.from_json(data["prepared"]) if data.get("prepared") else None
            return Report(rows, Provenance(**birth), str(data["title"]), prepared)
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"This is not a whole report: {error!r}. Measure again.") from error

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON: all of it, or nothing."""
        write_atomically(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def csv(self) -> str:
        """One line a model, in the columns of timm's own result files and some of ours."""
        return csv_text(self.rows, self.birth, self.prepared)

    def save_csv(self, path: str | Path) -> None:
        """Writes `csv` to a file: all of it, or nothing."""
        write_atomically(path, self.csv())

    @staticmethod
    def load(path: str | Path) -> Report:
        """The report that `save` wrote."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadFile(f"{path} is not a saved report: {error}") from error
        if not isinstance(data, dict):
            raise BadFile(f"{path} is not a saved report: it holds a {type(data).__name__}.")
        return Report.from_json(data)


def _format_quartiles(spread: Quartiles | None) -> str:
    """The median with its quartiles, as text."""
    if spread is None:
        return "-"
    return f"{spread.median:.2f} [{spread.low:.2f} {spread.high:.2f}]"


def _escape_cell(text: str) -> str:
    """The text as it stands in a cell of a Markdown table."""
    return text.replace("|", "\\|")
