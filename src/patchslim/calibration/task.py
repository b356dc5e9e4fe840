"""What goes into a calibration and what comes out of it: `CalibrationTask`, `CalibrationResult`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchslim.calibration.goal import Goal
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.patch_slimming.result import PatchSlimmingResult
from patchslim.data.source import Source
from patchslim.errors import BadData
from patchslim.hosts._adapter import Adapter
from patchslim.measurement.score import Batch, check_batch
from patchslim.model.images import check_images
from patchslim.model.model import SlimModel
from patchslim.runs.progress import Progress


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration found.

    Attributes:
        model: the slimmed model, in evaluation mode, on the host's device. It wraps a copy of the
            host where blocks were tuned or the host was in training mode.
        search_result: the order of the cells, and each layer with its errors (Patch Slimming);
            None for a threshold.
        record: everything as plain data: settings, tolerance, schedule, order and layers; or the
            threshold, and what images cost with it.
        figure: a drawing of the search, as the text of an SVG file; None for a threshold.
    """

    model: SlimModel
    search_result: PatchSlimmingResult | None
    record: dict[str, Any]
    figure: str | None = None


@dataclass(frozen=True)
class CalibrationTask:
    """One call of `calibrate`, checked as far as all methods have it in common.

    Attributes:
        host: the dense model. It is in evaluation mode while the calibration runs.
        adapter: the adapter of the host's family.
        images: what the caller gave: a `Source`, or batches.
        goal: what is to be reached.
        config: how to search.
        out: the folder for a checkpoint, or None.
        resume: whether to continue from the checkpoint in `out`.
        was_training: whether the host was in training mode before.
        progress: is called with one line of text at a time.
    """

    host: nn.Module
    adapter: Adapter
    images: Source | Iterable[Batch]
    goal: Goal
    config: PatchSlimmingConfig
    out: Path | None
    resume: bool
    was_training: bool
    progress: Progress

    def make_student(self, *, tuned: bool) -> nn.Module:
        """Returns the host for the slimmed model, in evaluation mode.

        The caller's own host is to stay as it is. So this is a copy where weights will be `tuned`,
        and where the host goes back to training mode afterwards.
        """
        return copy.deepcopy(self.host) if tuned or self.was_training else self.host

    def load_batches(self) -> list[Tensor]:
        """Loads at most `config.images` images, in batches, with the host's device and dtype.

        Raises:
            BadData: there are no images, or they have several sizes.
        """
        parameter = next(self.host.parameters())
        limit = self.config.images
        source = self.images
        given = source.sample_batches(limit) if isinstance(source, Source) else iter(source)
        batches: list[Tensor] = []
        for number, batch in enumerate(given):
            images = check_batch(batch, number)[0][: limit - sum(map(len, batches))]
            check_images(images, self.adapter.describe(self.host))
            batches.extend(images.to(parameter.device, parameter.dtype).split(self.config.batch))
            if sum(map(len, batches)) == limit:
                break
        if not batches:
            raise BadData("There are no images to calibrate on: give some (they need no labels).")
        if len({each.shape[1:] for each in batches}) > 1:
            raise BadData("The images are of several sizes; positions are calibrated for one.")
        return batches
