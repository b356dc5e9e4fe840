"""`Report`: measured results, which cannot exist without their `Provenance`.

A report holds numbers and shows them as text. It does not know how they were measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile
from patchslim.files import read_json, write_atomically
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.report.columns import COLUMNS, gain
from patchslim.report.csv import csv_text
from patchslim.report.field_types import check_field_types
from patchslim.report.provenance import Provenance
from patchslim.report.row import Row
from patchslim.report.text import wrap, write_text_table

FORMAT_VERSION = 1
# The key of the provenance in a saved report. Up to 0.6.1 the field had this name; the key stays,
# so that every version reads the reports of every other.
PROVENANCE_KEY = "birth"
# What rows have since 0.11 is kept beside them, for the same reason.
FURTHER_KEY = "further"
FURTHER = ("lost", "won", "worst", "corrupted", "host", "runtime", "precision", "batch")
SAME_BUDGET = 0.025  # shares of operations that differ by less are of one budget


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

    @property
    def batches(self) -> tuple[int, ...]:
        """The numbers of images in a call that were timed, in rising order."""
        return tuple(sorted({row.batch or self.provenance.batch for row in self.rows}))

    def baseline(self, row: Row) -> Row | None:
        """Finds the row of `random` at the same token counts; None if it was not measured."""
        if row.method in ("dense", "random"):
            return None
        random_rows = [
            other for other in self.rows if other.method == "random" and other.place == row.place
        ]
        own = next((other for other in random_rows if other.name == f"random/{row.name}"), None)
        if own is not None:
            return own
        if row.spent is not None:
            return None  # each image keeps a number of its own
        matches = [other for other in random_rows if other.tokens == row.tokens]
        return min(matches, key=lambda other: abs(other.macs - row.macs), default=None)

    def series(self, row: Row) -> str:
        """Names what is compared over budgets: the method, and where it ran if that differs."""
        places = zip(*(each.place for each in self.rows), strict=True)
        pairs = zip(row.place, places, strict=True)
        said = [str(part) for part, every in pairs if len(set(every)) > 1]
        return f"{row.method} ({', '.join(said)})" if said else row.method

    def gain(self, row: Row) -> float | None:
        """Returns accuracy less that of `random` at the same counts; without labels, agreement."""
        return gain(row, self.baseline(row))

    def by_budget(self) -> list[list[Row]]:
        """Returns the dense row, then the rows of each budget, the most expensive budget first.

        Within a budget the best row is first: that of the least KL, or, if that was not measured,
        of the highest accuracy or agreement. Rows of `random` that only stand beside another row
        are not listed; `baseline` finds them.
        """
        baselines = [self.baseline(row) for row in self.rows]
        beside = {row.name for row in baselines if row and row.name.startswith("random/")}
        rows = [row for row in self.rows[1:] if row.name not in beside]
        groups = [[self.dense]]
        most = math.inf
        for row in sorted(rows, key=lambda row: -row.macs_share):
            if row.macs_share < most - SAME_BUDGET:
                groups.append([])
                most = row.macs_share
            groups[-1].append(row)
        return [sorted(group, key=_rank) for group in groups]

    def cells(self, row: Row) -> tuple[str, ...]:
        """Writes the row as text, one entry for each of COLUMNS."""
        baseline = self.baseline(row)
        return tuple(column.write(row, baseline) for column in COLUMNS)

    def table(self) -> str:
        """Returns the report as plain text, 100 columns wide at most, the best rows first.

        `random` at the counts of a row is no row here but a column: "vs random".
        """
        groups = [[(row, self.baseline(row)) for row in group] for group in self.by_budget()]
        facts = [f"{label}: {value}" for label, value in self.provenance.lines(self.batches)]
        # The command is left whole, so that it can be copied.
        lines = [*map(wrap, facts[:-1]), facts[-1]]
        return "\n".join([wrap(self.title), "", write_text_table(groups), *lines])

    def markdown(self) -> str:
        """Returns the report as a Markdown table with its provenance beneath it."""
        names = tuple(column.name for column in COLUMNS)
        grid = [names, ("---", *["---:"] * (len(names) - 1)), *map(self.cells, self.rows)]
        lines = ["| " + " | ".join(_escape_cell(cell) for cell in cells) + " |" for cells in grid]
        facts = "; ".join(
            f"{label} {_escape_cell(value)}" for label, value in self.provenance.lines(self.batches)
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
        further = [
            {name: row.pop(name) for name in FURTHER if row[name] is not None}
            for row in fields["rows"]
        ]
        rows = [{k: v for k, v in row.items() if k not in FURTHER} for row in fields["rows"]]
        return {
            "format": FORMAT_VERSION,
            "rows": rows,
            PROVENANCE_KEY: fields["provenance"],
            "title": fields["title"],
            "prepared": fields["prepared"],
            **({FURTHER_KEY: further} if any(further) else {}),
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
            further = data.get(FURTHER_KEY) or [{} for _ in data["rows"]]
            pairs = zip(data["rows"], further, strict=True)
            rows = tuple(Row.from_json({**row, **more}) for row, more in pairs)
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


def _rank(row: Row) -> tuple[float, float]:
    """Returns what rows of one budget are sorted by: least is best."""
    share = row.accuracy or row.agreement
    return (math.inf if row.kl is None else row.kl.value, -share.value if share else 0.0)


def _escape_cell(text: str) -> str:
    """Escapes what would end a cell of a Markdown table."""
    return text.replace("|", "\\|")
