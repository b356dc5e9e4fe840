"""The commands to run next on a model that was just made, as text to copy.

This file knows how options are written. It runs nothing.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from patchslim.hosts._catalog import has_own_weights
from patchslim.runs.layout import MODEL_FOLDER

if TYPE_CHECKING:
    from patchslim.model.model import SlimModel


def measure_command(model: Path, data: str | None, classes: Path | None, dense: str | None) -> str:
    """Writes the command that measures a model next to the dense model it came from."""
    words = ["patchslim", "measure", str(model)]
    if data is not None:
        words += ["--data", data]
        words += [] if classes is None else ["--classes", str(classes)]
    return shlex.join(words + ([] if dense is None else ["--dense", dense]))


def train_command(args: Namespace, slimmed: SlimModel, data: str, *, labelled: bool) -> str:
    """Writes the command that fine-tunes a calibrated model to answer as the dense model does."""
    words = ["patchslim", "train", str(args.out / MODEL_FOLDER), "--data", data]
    if slimmed.trained is not None:  # its host is no longer the dense model
        words += ["--teacher", args.model]
        if not has_own_weights(args.model):
            words += ["--teacher-weights", str(args.weights or "FILE")]
    words += [] if labelled else ["--labels", "0"]
    return shlex.join([*words, "--out", str(args.out / "trained")])


def dense_argument(args: Namespace) -> str | None:
    """Says what to write after `--dense` for the model in the arguments, if it can be written."""
    if has_own_weights(args.model):
        return str(args.model)
    return None if args.weights is None else str(args.weights)
