"""The folder of a run of `train` or `calibrate`: the names of its files, and whether it is free."""

from __future__ import annotations

from pathlib import Path

from patchslim.errors import BadFile
from patchslim.files import check_writable

MODEL_FOLDER = "model"
RECORD_FILE = "calibration.json"
FIGURE_FILE = "pyramid.svg"
REPORT_FILE = "report.json"
CHECKPOINT_FILE = "checkpoint.pt"


def resolve_run_folder(out: str | Path, *, kind: str, resume: bool) -> Path:
    """Returns the absolute path of a run's folder. The folder need not exist.

    Args:
        out: the folder, as the caller gave it.
        kind: what the run is called in the error message: "run" or "calibration".
        resume: whether the run in this folder is to be continued.

    Raises:
        BadFile: nothing can be written there; or a new run is asked for, and the folder holds the
            checkpoint of another.
    """
    out = check_writable(out, folder=True).resolve()
    if not resume and (out / CHECKPOINT_FILE).exists():
        raise BadFile(
            f"{out} holds a {kind} already. Go on with it (resume=True, --resume), or give another "
            "folder."
        )
    return out
