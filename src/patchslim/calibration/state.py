"""`CalibrationState`: what a calibration has found so far, in a checkpoint to continue from.

It knows neither blocks nor patches, only plain values and tensors by name.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchslim.errors import BadFile
from patchslim.hosts._answers import noise_logits
from patchslim.model.model import SlimModel
from patchslim.runs import checkpoint
from patchslim.runs.fingerprint import check_same_run
from patchslim.runs.layout import CHECKPOINT_FILE
from patchslim.runs.state_checks import refuse_misfits


class CalibrationState:
    """Values found so far. If there is a folder, every `save` writes them to it.

    Args:
        out: the folder of the calibration, or None to keep everything in memory.
        fingerprint: what makes this calibration different from others.
        resume: whether to start from the checkpoint in `out`, if there is one.

    Attributes:
        known: the values found so far, by name.

    Raises:
        BadFile: the checkpoint is damaged, or of another run.
    """

    def __init__(self, out: Path | None, fingerprint: dict[str, Any], *, resume: bool) -> None:
        self.file = None if out is None else out / CHECKPOINT_FILE
        self.fingerprint = fingerprint
        self.known: dict[str, Any] = {}
        if resume and self.file is not None and self.file.exists():
            saved = checkpoint.read(self.file)
            if "calibration" not in saved:
                raise BadFile(
                    f"{self.file} is not a checkpoint of `calibrate`. Give another folder."
                )
            with refuse_misfits(self.file):
                check_same_run(self.file, saved["calibration"], fingerprint)
                self.known = dict(saved["known"])

    @contextlib.contextmanager
    def reading(self) -> Iterator[dict[str, Any]]:
        """Within the block, known values that are not what the code expects raise a BadFile."""
        with refuse_misfits(self.file or Path(CHECKPOINT_FILE)):
            yield self.known

    def save(self, **values: Any) -> None:
        """Adds values by name, and writes the checkpoint."""
        self.known |= values
        if self.file is not None:
            checkpoint.write(self.file, {"calibration": self.fingerprint, "known": self.known})


def calibration_fingerprint(
    dense: SlimModel,
    images: Sequence[Tensor],
    method: str,
    goal: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what makes a calibration different from others, as plain data for its checkpoint."""
    pixels = hashlib.sha256()
    for batch in images:
        pixels.update(batch.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "method": method,
        "goal": dict(goal),
        "search": dict(config),
        "images": f"{sum(map(len, images))} with digest {pixels.hexdigest()[:12]}",
        "model": noise_logits(dense.plan.adapter, dense.host),
    }
