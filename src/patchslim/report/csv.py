"""Writes a report as CSV, with columns named, scaled and rounded as in timm's result files.

Scripts that read those files read these too. Nothing here knows how a number was measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from patchslim.hosts._preprocessing import Preprocessing
from patchslim.report.provenance import Provenance
from patchslim.report.row import Estimate, Row


def csv_text(rows: Sequence[Row], provenance: Provenance, prepared: Preprocessing | None) -> str:
    """Returns a line of column names, then one line for each model.

    A cell is empty if it was not measured. As in timm's files, accuracies and their errors (100
    less the accuracy) are in per cent, parameters in millions, and `infer_step_time` is the
    milliseconds of a batch. Agreement is in per cent, too.
    """
    cells = [_csv_cells(row, provenance, prepared) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def _csv_cells(row: Row, provenance: Provenance, prepared: Preprocessing | None) -> dict[str, str]:
    """Writes a row as text, by the name of the column."""
    side = "x".join(map(str, dict.fromkeys(provenance.image_size)))  # one number for a square
    top1, top1_err = _percentages(row.accuracy)
    top5, top5_err = _percentages(row.top5)
    return {
        "model": row.name,
        "top1": top1,
        "top1_err": top1_err,
        "top5": top5,
        "top5_err": top5_err,
        "param_count": _format_number(row.parameters / 1e6 if row.parameters else None, ".2f"),
        "img_size": side,
        "crop_pct": _format_number(prepared.crop_pct if prepared else None, ".3f"),
        "interpolation": prepared.interpolation if prepared else "",
        "infer_samples_per_sec": _format_number(
            row.throughput.median if row.throughput else None, ".2f"
        ),
        "infer_step_time": _format_number(
            row.latency.median * provenance.batch if row.latency else None, ".3f"
        ),
        "infer_batch_size": str(provenance.batch),
        "infer_img_size": side,
        "infer_gmacs": _format_number(row.macs / 1e9, ".4g"),
        "agreement": _percentages(row.agreement)[0],
        "kl": _format_number(row.kl.value if row.kl else None, ".4g"),
        "ece": _format_number(row.ece, ".4f"),
        "macs_share": _format_number(row.macs_share, ".4f"),
        "speedup": _format_number(row.speedup.median if row.speedup else None, ".3f"),
        "conversion": _format_number(row.conversion, ".3f"),
        "peak_memory": "" if row.memory is None else str(row.memory),
        "tokens": " ".join(map(str, row.tokens)),
    }


def _percentages(share: Estimate | None) -> tuple[str, str]:
    """Writes a share, and what is missing to 1, in per cent."""
    if share is None:
        return "", ""
    return f"{100 * share.value:.3f}", f"{100 * (1 - share.value):.3f}"


def _format_number(value: float | None, form: str) -> str:
    """Writes a number; an empty string for None."""
    return "" if value is None else format(value, form)
