"""A report as CSV whose columns are named, scaled and rounded as in timm's own result files.

So what reads those reads this. It knows nothing of how a number was measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from patchslim.hosts._preprocessing import Preprocessing
from patchslim.report.provenance import Provenance
from patchslim.report.row import Estimate, Row


def csv_text(rows: Sequence[Row], birth: Provenance, prepared: Preprocessing | None) -> str:
    """One line a model below the names of the columns; what was not measured is empty.

    As in timm's files, accuracies and their complements are percentages, parameters millions and
    a step is a batch, in milliseconds. So is agreement a percentage.
    """
    cells = [_csv_cells(row, birth, prepared) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(cells[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return text.getvalue()


def _csv_cells(row: Row, birth: Provenance, prepared: Preprocessing | None) -> dict[str, str]:
    """The row as text, by the name of the column."""
    side = "x".join(map(str, dict.fromkeys(birth.image_size)))
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
            row.latency.median * birth.batch if row.latency else None, ".3f"
        ),
        "infer_batch_size": str(birth.batch),
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
    """A share and what it lacks to all, in percent."""
    if share is None:
        return "", ""
    return f"{100 * share.value:.3f}", f"{100 * (1 - share.value):.3f}"


def _format_number(value: float | None, form: str) -> str:
    """The number as text; empty where there is none."""
    return "" if value is None else format(value, form)
