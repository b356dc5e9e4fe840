"""`calibrate`: fits a method to unlabelled images, and writes what it found into a folder.

It checks what all methods have in common, and leaves the rest to the calibrator of the method's
type. Thresholds are in `threshold.py`, the positions of Patch Slimming in `patch_slimming/`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from torch import nn

# These two are imported for the calibrators that they register.
import patchslim.calibration.patch_slimming.calibrate  # noqa: F401
import patchslim.calibration.threshold  # noqa: F401
from patchslim.calibration.dispatch import find_calibrator
from patchslim.calibration.goal import Goal
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.task import CalibrationResult, CalibrationTask
from patchslim.data.source import Source
from patchslim.errors import BadFile, BadSetting, UnknownName, UnsupportedModel
from patchslim.files import write_atomically
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import eval_mode
from patchslim.hosts._registry import find_adapter
from patchslim.measurement.score import Batch, check_batches
from patchslim.methods import LearnedMethod, Method
from patchslim.methods._registry import make_method, method_names
from patchslim.model.check import check_identity
from patchslim.model.model import SlimModel
from patchslim.runs.layout import FIGURE_FILE, MODEL_FOLDER, RECORD_FILE, resolve_run_folder
from patchslim.runs.ownership import own_folder
from patchslim.runs.progress import Progress, check_progress
from patchslim.schedules.schedule import Schedule
from patchslim.settings import check_type, show_value


def calibrate(  # noqa: PLR0913 (one word for each thing that a calibration is made of)
    host: nn.Module,
    images: Source | Iterable[Batch],
    method: str | Method = "patch_slimming",
    *,
    macs: float | None = None,
    tolerance: float | None = None,
    agreement: float | None = None,
    cap: float | None = None,
    schedule: Schedule | None = None,
    config: PatchSlimmingConfig | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    adapter: Adapter | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Fits a method to images, and returns the host slimmed by it. The host is not changed.

    For Patch Slimming, it finds the positions that the host needs least. For a method that lets
    images keep different numbers of patches, it finds the threshold that meets a budget on average.

    Args:
        host: the dense model.
        images: unlabelled images to fit to: `Images` or another source, or batches.
        method: "patch_slimming", "patch_slimming_dynamic", or an adaptive method ("similarity",
            "tome", "ats", "duplicates"): a name, or a Method with settings of your own.
        macs: a budget, as a share of the host's multiply-adds or as a number of them. For adaptive
            methods it is the mean over the images.
        tolerance: instead of a budget, the largest error of a block's features, measured as
            `config.error` says (Patch Slimming).
        agreement: instead of a budget, the share of answers that must stay the dense model's
            (adaptive methods).
        cap: the most that any image may cost, written like `macs` (adaptive methods).
        schedule: the token count after each block, if it is known already. For adaptive
            methods it is the most that any image may keep.
        config: how to search; by default `PatchSlimmingConfig()`. Adaptive methods use only its
            `images` and `batch`.
        out: a folder for the model, calibration.json, a figure, and a checkpoint for each layer.
        resume: continues the calibration in `out` from its checkpoint.
        adapter: an Adapter of your own, for a family that does not ship with this package.
        progress: is called with one line of text at a time.

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    if isinstance(host, SlimModel):
        raise UnsupportedModel("This model is slimmed already; calibrate its .host instead.")
    check_type("host", host, nn.Module, "Give the dense torch.nn.Module.", UnsupportedModel)
    check_batches("images", images)
    check_type("resume", resume, bool, "Give True or False.")
    if adapter is not None:
        check_type("adapter", adapter, Adapter, "Give an Adapter, or leave it out.")
    config = PatchSlimmingConfig() if config is None else config
    if not isinstance(config, PatchSlimmingConfig):
        raise BadSetting(
            f"config={show_value(config)}: give a patchslim.PatchSlimmingConfig, such as "
            "PatchSlimmingConfig(mode='free')."
        )
    made = make_method(method, {})
    goal = Goal(macs, tolerance, agreement, cap, schedule)
    calibrator = find_calibrator(made)
    if calibrator is None:
        raise _refuse_method(method, goal)
    folder = None if out is None else resolve_run_folder(out, kind="calibration", resume=resume)
    was_training = any(module.training for module in host.modules())
    with eval_mode(host), contextlib.ExitStack() as owned:
        if folder is not None:
            owned.enter_context(own_folder(folder))
            resolve_run_folder(folder, kind="calibration", resume=resume)  # none was begun just now
        task = CalibrationTask(
            host=host,
            adapter=adapter or find_adapter(host),
            images=images,
            goal=goal,
            config=config,
            out=folder,
            resume=resume,
            was_training=was_training,
            progress=check_progress(progress),
        )
        result = calibrator(made, task)
        check_identity(result.model)
        if folder is not None:
            write_result(folder, result)
    return result


def must_be_calibrated(method: Method) -> bool:
    """Tells whether this method's choices mean nothing until it has been calibrated."""
    unusable = isinstance(method, LearnedMethod) and method.missing is not None
    return unusable and find_calibrator(method) is not None


def write_result(out: Path, result: CalibrationResult) -> None:
    """Writes the model, the record and the figure of a calibration into its folder."""
    result.model.save(out / MODEL_FOLDER)
    _write_text(out / RECORD_FILE, json.dumps(result.record, indent=1))
    if result.figure is not None:
        _write_text(out / FIGURE_FILE, result.figure)


def _refuse_method(method: str | Method, goal: Goal) -> UnknownName:
    """Returns the error for a method that nothing calibrates."""
    names = [name for name in method_names() if find_calibrator(make_method(name, {})) is not None]
    if not isinstance(method, str):
        return UnknownName(
            f"{show_value(method)} has nothing to calibrate. Methods that have: "
            f"{', '.join(names)}; each by name, or as a Method with settings of your own."
        )
    goal.check_same_counts(method)
    return UnknownName.of("method to calibrate", method, names, "Others need no calibration.")


def _write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    try:
        write_atomically(path, text + "\n")
    except BadFile as error:
        raise BadFile(
            f"{error} The model beside it is whole, and a checkpoint if there is one: give the "
            "command again (resume=True, --resume)."
        ) from error
