"""`Report`: measured results, which cannot exist without their `Provenance`.

A report holds numbers and shows them as text. It does not know how they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile
from patchslim.files import read_json, write_atomically
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.report.csv import csv_text
from patchslim.report.field_types import check_field_types
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles, Row

FORMAT_VERSION = 1
# The key of the provenance in a saved report. Up to 0.6.1 the field had this name; the key stays,
# so that every version reads the reports of every other.
PROVENANCE_KEY = "birth"
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
    """Measured rows, and where, when and how they were measured.

    Attributes:
        rows: one for each model, the dense host first.
        provenance: what the numbers were measured on, when, and by which command.
        title: the headline of a printed report.
        prepared: how the images were prepared; None if their source does not say.
    """

    rows: tuple[Row, ...]
    provenance: Provenance
    title: str
    prepared: Preprocessing | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.provenance, Provenance):
            raise TypeError("A Report needs its provenance: Provenance.now(host, ...).")
        if not self.rows or self.rows[0].method != "dense":
            raise ValueError("The first row of a Report is the dense model's.")

    @property
    def dense(self) -> Row:
        """Row of the untouched host."""
        return self.rows[0]

    def baseline(self, row: Row) -> Row | None:
        """Finds the row of `random` at the same token counts; None if it was not measured."""
        if row.method in ("dense", "random"):
            return None
        random_rows = [other for other in self.rows if other.method == "random"]
        if row.spent is None:
            matches = [other for other in random_rows if other.tokens == row.tokens]
        else:
            # Each image keeps a number of its own. `measure` ran random at the mean of these.
            matches = [other for other in random_rows if other.name == f"random/{row.name}"]
        return min(matches, key=lambda other: abs(other.macs - row.macs), default=None)

    def gain(self, row: Row) -> float | None:
        """Returns accuracy less that of `random` at the same counts; without labels, agreement."""
        other = self.baseline(row)
        if other is None:
            return None
        if row.accuracy is not None and other.accuracy is not None:
            return row.accuracy.value - other.accuracy.value
        if row.agreement is not None and other.agreement is not None:
            return row.agreement.value - other.agreement.value
        return None

    def cells(self, row: Row) -> tuple[str, ...]:
        """Writes the row as text, one entry for each of COLUMNS."""
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
        """Returns the report as aligned plain text."""
        grid = [COLUMNS, *map(self.cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = []
        for name, *numbers in grid:
            aligned = [name.ljust(widths[0])]
            aligned += [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join(aligned).rstrip())
        lines.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
        facts = [f"{label}: {value}" for label, value in self.provenance.lines()]
        return "\n".join([self.title, "", *lines, "", self.column_notes(), *facts])

    def markdown(self) -> str:
        """Returns the report as a Markdown table with its provenance beneath it."""
        grid = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *map(self.cells, self.rows)]
        lines = ["| " + " | ".join(_escape_cell(cell) for cell in cells) + " |" for cells in grid]
        facts = "; ".join(
            f"{label} {_escape_cell(value)}" for label, value in self.provenance.lines()
        )
        return "\n".join(
            [f"**{self.title}**", "", *lines, "", f"{self.column_notes()} {facts}.", ""]
        )

    def column_notes(self) -> str:
        """Says in a sentence what the columns of the table mean."""
        return (
            f"left: tokens after the last block; MACs: share of the dense model's "
            f"{self.dense.macs / 1e9:.4g} GMACs an image; ± one standard error; [quartiles]; "
            "conv.: speed-up times MACs."
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data from which `from_json` makes an equal report."""
        fields = asdict(self)
        return {
            "format": FORMAT_VERSION,
            "rows": fields["rows"],
            PROVENANCE_KEY: fields["provenance"],
            "title": fields["title"],
            "prepared": fields["prepared"],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Report:
        """Makes a report from the data that `to_json` returned."""
        if data.get("format") != FORMAT_VERSION:
            raise BadFile(
                f"This report is of format {data.get('format')!r}, and {FORMAT_VERSION} is known. "
                "Read it with the version of patchslim that wrote it."
            )
        try:
            origin = dict(data[PROVENANCE_KEY])
            origin["image_size"] = tuple(origin["image_size"])
            origin["load"] = tuple(origin["load"])
            rows = tuple(map(Row.from_json, data["rows"]))
            prepared = Preprocessing.from_json(data["prepared"]) if data.get("prepared") else None
            report = Report(rows, Provenance(**origin), str(data["title"]), prepared)
            for part in (*rows, report.provenance):
                check_field_types(part)
            if not all(row.tokens for row in rows):
                raise ValueError("a row without tokens")
            return report
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadFile(f"This is not a whole report: {error!r}. Measure again.") from error

    def save(self, path: str | Path) -> None:
        """Writes the report to a JSON file: all of it, or nothing."""
        write_atomically(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def csv(self) -> str:
        """Returns a line for each model, in the columns of timm's result files and some of ours."""
        return csv_text(self.rows, self.provenance, self.prepared)

    def save_csv(self, path: str | Path) -> None:
        """Writes the CSV to a file: all of it, or nothing."""
        write_atomically(path, self.csv())

    @staticmethod
    def load(path: str | Path) -> Report:
        """Reads a report that `save` wrote."""
        try:
            data = read_json(Path(path))
        except BadFile as error:
            raise BadFile(f"{path} is not a saved report: {error}") from error
        if not isinstance(data, dict):
            raise BadFile(f"{path} is not a saved report: it holds a {type(data).__name__}.")
        return Report.from_json(data)


def _format_quartiles(quartiles: Quartiles | None) -> str:
    """Writes the median with the quartiles; a dash for None."""
    if quartiles is None:
        return "-"
    return f"{quartiles.median:.2f} [{quartiles.low:.2f} {quartiles.high:.2f}]"


def _escape_cell(text: str) -> str:
    """Escapes what would end a cell of a Markdown table."""
    return text.replace("|", "\\|")
