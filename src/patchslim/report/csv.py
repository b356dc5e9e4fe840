"""Writes a report as CSV, with columns named, scaled and rounded as in timm's result files.

Scripts that read those files read these too. Nothing here knows how a number was measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from patchslim.hosts._preprocessing import Preprocessing
from patchslim.report.provenance import Provenance
from patchslim.report.row import Estimate, Row


def csv_text(rows: Sequence[Row], provenance: Provenance, prepared: Preprocessing | None) -> str:
    """Returns a line of column names, then one line for each model.

    A cell is empty if it was not measured. As in timm's files, accuracies and their errors (100
    less the accuracy) are in per cent, parameters in millions, and `infer_step_time` is the
    milliseconds of a batch. Agreement is in per cent, too.
    """
    return write_cells([_csv_cells(row, provenance, prepared) for row in rows])


def write_cells(cells: Sequence[Mapping[str, str]]) -> str:
    """Returns a line of column names, then one line for each dictionary of cells."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def timing_cells(
    per_second: float | None, step_ms: float | None, batch: int, side: str, macs: int
) -> dict[str, str]:
    """Writes a timing in timm's columns: images a second, and milliseconds of a batch."""
    return {
        "infer_samples_per_sec": format_number(per_second, ".2f"),
        "infer_step_time": format_number(step_ms, ".3f"),
        "infer_batch_size": str(batch),
        "infer_img_size": side,
        "infer_gmacs": format_number(macs / 1e9, ".4g"),
    }


def write_side(image_size: tuple[int, int]) -> str:
    """Writes height and width; one number for a square."""
    return "x".join(map(str, dict.fromkeys(image_size)))


def write_parameters(count: int | None) -> str:
    """Writes a number of parameters in millions."""
    return format_number(count / 1e6 if count else None, ".2f")


def _csv_cells(row: Row, provenance: Provenance, prepared: Preprocessing | None) -> dict[str, str]:
    """Writes a row as text, by the name of the column."""
    side = write_side(provenance.image_size)
    batch = row.batch or provenance.batch
    top1, top1_err = _percentages(row.accuracy)
    top5, top5_err = _percentages(row.top5)
    return {
        "model": row.name,
        "top1": top1,
        "top1_err": top1_err,
        "top5": top5,
        "top5_err": top5_err,
        "param_count": write_parameters(row.parameters),
        "img_size": side,
        "crop_pct": format_number(prepared.crop_pct if prepared else None, ".3f"),
        "interpolation": prepared.interpolation if prepared else "",
        **timing_cells(
            row.throughput.median if row.throughput else None,
            row.latency.median * batch if row.latency else None,
            batch,
            side,
            row.macs,
        ),
        "agreement": _percentages(row.agreement)[0],
        "kl": format_number(row.kl.value if row.kl else None, ".4g"),
        "ece": format_number(row.ece, ".4f"),
        "macs_share": format_number(row.macs_share, ".4f"),
        "speedup": format_number(row.speedup.median if row.speedup else None, ".3f"),
        "conversion": format_number(row.conversion, ".3f"),
        "peak_memory": "" if row.memory is None else str(row.memory),
        "lost": _percentages(row.lost)[0],
        "won": _percentages(row.won)[0],
        "runtime": row.runtime or "",
        "precision": row.precision or "",
        "tokens": " ".join(map(str, row.tokens)),
    }


def _percentages(share: Estimate | None) -> tuple[str, str]:
    """Writes a share, and what is missing to 1, in per cent."""
    if share is None:
        return "", ""
    return f"{100 * share.value:.3f}", f"{100 * (1 - share.value):.3f}"


def format_number(value: float | None, form: str) -> str:
    """Writes a number; an empty string for None."""
    return "" if value is None else format(value, form)
