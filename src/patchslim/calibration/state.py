"""`Ledger`: what a calibration knows so far, in a file that it can be gone on with from.

It knows neither blocks nor patches: what is known is plain values and tensors by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.errors import BadFile
from patchslim.hosts._answers import noise_logits
from patchslim.model.model import SlimModel
from patchslim.runs import checkpoint
from patchslim.runs.fingerprint import check_same_run
from patchslim.runs.layout import CHECKPOINT_FILE


class CalibrationState:
    """What is known so far, written after every layer where there is a folder for it."""

    def __init__(self, out: Path | None, identity: dict[str, Any], *, resume: bool) -> None:
        self.file = None if out is None else out / CHECKPOINT_FILE
        self.fingerprint = identity
        self.known: dict[str, Any] = {}
        if resume and self.file is not None and self.file.exists():
            read = checkpoint.read(self.file)
            if "calibration" not in read:
                raise BadFile(
                    f"{self.file} is not a checkpoint of `calibrate`. Give another folder."
                )
            check_same_run(self.file, read["calibration"], identity)
            self.known = read["known"]

    def save(self, **known: Any) -> None:
        """Writes down what is known now."""
        self.known |= known
        if self.file is not None:
            checkpoint.write(self.file, {"calibration": self.fingerprint, "known": self.known})


def calibration_fingerprint(
    dense: SlimModel,
    images: list[Tensor],
    method: str,
    asked: Mapping[str, Any],
    search: PatchSlimmingConfig,
) -> dict[str, Any]:
    """What makes this calibration this one and no other, for its checkpoint."""
    pixels = hashlib.sha256()
    for batch in images:
        pixels.update(batch.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "method": method,
        "goal": dict(asked),
        "search": search.to_json(),
        "images": f"{sum(map(len, images))} with digest {pixels.hexdigest()[:12]}",
        "model": noise_logits(dense.plan.adapter, dense.host),
    }
