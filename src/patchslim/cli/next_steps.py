"""What to do with a model that was just made: the command that measures or trains it, as text.

It knows how options are spelled, and runs nothing.
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
    """The command that measures what was made, beside the model as it was before."""
    words = ["patchslim", "measure", str(model)]
    if data is not None:
        words += ["--data", data]
        words += [] if classes is None else ["--classes", str(classes)]
    return shlex.join(words + ([] if dense is None else ["--dense", dense]))


def train_command(args: Namespace, slimmed: SlimModel, data: str, *, labelled: bool) -> str:
    """The command that fine-tunes what was calibrated, to answer as the dense model does."""
    words = ["patchslim", "train", str(args.out / MODEL_FOLDER), "--data", data]
    if slimmed.trained is not None:  # its own host is not the dense model any more
        words += ["--teacher", args.model]
        if not has_own_weights(args.model):
            words += ["--teacher-weights", str(args.weights or "FILE")]
    words += [] if labelled else ["--labels", "0"]
    return shlex.join([*words, "--out", str(args.out / "trained")])


def dense_argument(args: Namespace) -> str | None:
    """What `--dense` calls the model that the arguments name, where it can."""
    if has_own_weights(args.model):
        return str(args.model)
    return None if args.weights is None else str(args.weights)
