"""`Sweep`: the rows of all cells that were asked for, and why others have none."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from patchslim.errors import BadData, BadFile, UnknownName
from patchslim.files import check_writable, write_atomically
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.report.html import render_page
from patchslim.report.report import Report
from patchslim.report.row import Estimate, Row
from patchslim.settings import show_value
from patchslim.sweep.cell import Cell
from patchslim.sweep.store import CELLS, CellResult, Store

TITLE = "Fewer patches, side by side"
ROWS_FILE, CSV_FILE, REPORT_FILE, PAGE_FILE = "rows.jsonl", "rows.csv", "report.json", "report.html"


@dataclass(frozen=True)
class Comparison:
    """One row less another, each with the standard error of the paired difference.

    Attributes:
        kl: of the KL divergences from the dense model.
        agreement: of the shares of answers that are the dense model's.
        accuracy: of the shares of images that are read right; None without labels.
    """

    kl: Estimate
    agreement: Estimate
    accuracy: Estimate | None


@dataclass(frozen=True)
class Sweep:
    """What a sweep has found.

    Attributes:
        cells: each cell with its result, in the order in which they were asked for.
        measured: how many of them were measured now; the others were there.
        prepared: how the images were prepared, where they say so.
        folder: where everything is kept.
    """

    cells: Mapping[Cell, CellResult]
    measured: int
    prepared: Preprocessing | None
    folder: Path

    @property
    def refused(self) -> dict[Cell, str]:
        """The cells that have no rows, and the reasons."""
        return {
            cell: result.refused
            for cell, result in self.cells.items()
            if result.refused is not None
        }

    @property
    def rows(self) -> list[Row]:
        """The rows of all cells; where there are several runtimes, names say which."""
        return [row for _, row, _ in self._named_rows()]

    @property
    def report(self) -> Report:
        """All rows as one report, whose tables, pages and files are those of `measure`.

        Raises:
            BadData: no dense model could be measured, so there is nothing to compare with.
        """
        origins = [each.provenance for each in self.cells.values() if each.provenance]
        rows = self.rows
        first = next((row for row in rows if row.method == "dense"), None)
        if first is None or not origins:
            reasons = "; ".join(dict.fromkeys(self.refused.values())) or "no cell was asked for"
            raise BadData(f"Nothing was measured: {reasons}")
        others = [row for row in rows if row is not first]
        versions = {key: value for each in origins for key, value in each.versions.items()}
        types = ", ".join(dict.fromkeys(each.dtype for each in origins))
        runs = sorted(origins, key=lambda each: each.date)  # a folder that is filled by several
        provenance = replace(
            origins[0],
            versions=versions,
            dtype=types,
            commit=", ".join(dict.fromkeys(each.commit for each in runs)),
            command="; ".join(dict.fromkeys(each.command for each in runs)),
        )
        return Report((first, *others), provenance, TITLE, self.prepared)

    def compare(self, name: str, other: str) -> Comparison:
        """Compares two rows image by image, which tells small differences from chance.

        Args:
            name: the name of a row, as it stands in `rows`.
            other: the name of the row that it is compared with.

        Raises:
            UnknownName: there is no such row.
            BadData: the rows are of different images.
        """
        first, second = (self._read_answers(each) for each in (name, other))
        if len(first["kl"]) != len(second["kl"]):
            raise BadData(f"{name} and {other} were scored on different images.")
        differences = {
            kind: Estimate.mean(first[kind].double() - second[kind].double())
            for kind in ("kl", "correct", "agrees")
            if kind in first and kind in second
        }
        return Comparison(differences["kl"], differences["agrees"], differences.get("correct"))

    def _read_answers(self, name: str) -> dict[str, Tensor]:
        """Reads one number an image for each kind of score of a row."""
        named = {row.name: (result, own.name) for (_, result), row, own in self._named_rows()}
        if name not in named:
            raise UnknownName.of("row", name, named)
        result, own = named[name]
        found = Store(self.folder).read_answers(result.answers or "")
        if found is None or own not in found:
            raise BadData(f"The answers of {name} are no longer in {self.folder}. Run it again.")
        return found[own]

    def lines(self) -> list[str]:
        """Says in lines of text which cells were refused, and why; a reason once."""
        reasons: dict[str, list[str]] = {}
        for cell, reason in self.refused.items():
            reasons.setdefault(reason, []).append(str(cell))
        return [
            f"refused: {cells[0]}{f' and {len(cells) - 1} more' if cells[1:] else ''}: {reason}"
            for reason, cells in reasons.items()
        ]

    def save(self) -> None:
        """Writes the rows as JSON lines and as CSV, and the report as JSON and as a page."""
        lines = [
            json.dumps({**asdict(cell.variant), "batch": cell.batch, **_plain(row, result)})
            for (cell, result), row, _ in self._named_rows()
        ]
        lines += [
            json.dumps({**asdict(cell.variant), "batch": cell.batch, "refused": reason})
            for cell, reason in self.refused.items()
        ]
        folder = self.folder
        write_atomically(folder / ROWS_FILE, "".join(f"{line}\n" for line in lines))
        if len(self.refused) < len(self.cells):
            report = self.report
            report.save_csv(folder / CSV_FILE)
            report.save(folder / REPORT_FILE)
            write_atomically(folder / PAGE_FILE, render_page(report, notes=self.lines()))

    def _named_rows(self) -> Iterator[tuple[tuple[Cell, CellResult], Row, Row]]:
        """Yields each row with its cell, named so that no other has its name, and as it was."""
        places = {cell.place for cell in self.cells}
        # What all rows have in common need not stand in each name.
        differs = [len(set(part)) > 1 for part in zip(*places, strict=True)]
        for cell, result in self.cells.items():
            said = [str(each) for each, told in zip(cell.place, differs, strict=True) if told]
            where = f" ({', '.join(said)})" if said else ""
            for row in result.rows:
                yield (cell, result), replace(row, name=f"{row.name}{where}"), row


def check_folder(out: str | Path) -> Path:
    """Returns the folder of a sweep; refuses one whose files a sweep would replace.

    Raises:
        BadFile: it cannot be written, or holds files of these names that no sweep has written.
    """
    folder = check_writable(out, folder=True)
    names = (ROWS_FILE, CSV_FILE, REPORT_FILE, PAGE_FILE)
    others = [name for name in names if (folder / name).exists()]
    if others and not (folder / CELLS).is_dir():
        raise BadFile(
            f"{show_value(str(out))} holds {', '.join(others)}, which no sweep wrote and this one "
            "would replace. Give a new folder, or that of the sweep to go on with."
        )
    return folder


def _plain(row: Row, result: CellResult) -> dict[str, object]:
    """Returns a row with where and when it was measured, as plain data."""
    origin = result.provenance
    facts = {} if origin is None else asdict(origin)
    return {**asdict(row), "measured": facts}
