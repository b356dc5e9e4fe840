"""`DivergenceCheck`: stops a training whose loss explodes, or whose numbers are not finite."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from patchslim.errors import Diverged
from patchslim.training.config import TrainConfig
from patchslim.training.distributed import Processes
from patchslim.training.loader import MicroBatch
from patchslim.training.losses import LOSS_TERMS

RECENT_LOSSES = 50  # a new loss is compared with the median of this many before it
EXPLOSION_FACTOR = 20.0  # a loss that is this many times that median stops the run


class DivergenceCheck:
    """Raises `Diverged` with the step, the images and the cure, before that step changes a weight.

    Args:
        config: how the run trains.
        processes: the processes that train together.
        checkpoint: the checkpoint file of the run, which need not exist.

    Attributes:
        recent_losses: the losses of the latest steps. They are part of a checkpoint.
    """

    def __init__(self, config: TrainConfig, processes: Processes, checkpoint: Path) -> None:
        self.config, self.processes, self.checkpoint = config, processes, checkpoint
        self.recent_losses: deque[float] = deque(maxlen=RECENT_LOSSES)

    def check_terms(self, number: int, terms: Tensor, batch: MicroBatch) -> None:
        """Refuses a loss that is not finite in this or another process."""
        bad = not bool(terms.isfinite().all())
        if not self.processes.any(bad):
            return
        pairs = zip(LOSS_TERMS, terms.tolist(), strict=True)
        losses = ", ".join(f"{name} {value:.3g}" for name, value in pairs)
        names = ", ".join(batch.names[:5]) + (", ..." if len(batch.names) > 5 else "")
        where = f"{losses}; images {names}" if bad else "in another process"
        raise Diverged(f"The loss of step {number + 1} is not a number ({where}). {self._cure()}")

    def check_loss(self, number: int, loss: float, micro: Sequence[MicroBatch]) -> None:
        """Refuses a loss that is far above the losses before it."""
        if len(self.recent_losses) == RECENT_LOSSES:
            usual = statistics.median(self.recent_losses)
            if loss > EXPLOSION_FACTOR * usual and loss > usual + 1:
                raise Diverged(
                    f"The loss of step {number + 1} is {loss:.3g}, and {usual:.3g} is the median "
                    f"of the {RECENT_LOSSES} before it; first images: "
                    f"{', '.join(micro[0].names[:3])}. {self._cure()}"
                )
        self.recent_losses.append(loss)

    def check_gradient(self, number: int, norm: float, micro: Sequence[MicroBatch]) -> None:
        """Refuses a gradient whose norm is not finite."""
        if not math.isfinite(norm):
            raise Diverged(
                f"The gradient of step {number + 1} is {norm}; first images: "
                f"{', '.join(micro[0].names[:3])}. {self._cure()}"
            )

    def _cure(self) -> str:
        """Says what the user can do about a run that diverged."""
        saved = f" {self.checkpoint} is from before that." if self.checkpoint.exists() else ""
        precision = "" if self.config.precision == "float32" else ", use precision='float32'"
        return (
            f"Nothing was changed by that step. Lower lr (now {self.config.lr:g}){precision}, or "
            f"clip gradients harder (clip={self.config.clip:g}), and look at these images.{saved}"
        )
