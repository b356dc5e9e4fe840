"""Names of the files that a run of `train` or `calibrate` leaves in its folder."""

from __future__ import annotations

MODEL_FOLDER = "model"
RECORD_FILE = "calibration.json"
FIGURE_FILE = "pyramid.svg"
REPORT_FILE = "report.json"
CHECKPOINT_FILE = "checkpoint.pt"
