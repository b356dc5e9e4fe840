"""Calibrates `patch_slimming` and `patch_slimming_dynamic`: checks the goal, searches, records.

How the layers are searched is in `calibrator.py` and `layer_search.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from patchslim.calibration.dispatch import register_calibrator
from patchslim.calibration.patch_slimming.calibrator import PatchSlimmingCalibrator
from patchslim.calibration.patch_slimming.figure import draw_figure
from patchslim.calibration.patch_slimming.result import PatchSlimmingResult
from patchslim.calibration.state import CalibrationState, calibration_fingerprint
from patchslim.calibration.task import CalibrationResult, CalibrationTask
from patchslim.errors import BadSchedule, BadSetting, UnsupportedModel
from patchslim.methods._method import Method, method_settings
from patchslim.methods._ranking import format_order
from patchslim.methods._registry import method_name
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.methods.patch_slimming_dynamic import PatchSlimmingDynamic
from patchslim.model.model import SlimModel
from patchslim.model.slim import slim

IN_RECIPE = ("tolerance", "search", "images")  # entries of the record


@register_calibrator(PatchSlimming)
def calibrate_patch_slimming(method: PatchSlimming, task: CalibrationTask) -> CalibrationResult:
    """Returns a model that keeps, in all images, the positions that were found."""
    search = _run_search(method, task)
    model = search.calibrator.build_model(search.result, type(method)(order=search.order))
    return _finish(task, search, model, gates={})


@register_calibrator(PatchSlimmingDynamic)
def calibrate_patch_slimming_dynamic(
    method: PatchSlimmingDynamic, task: CalibrationTask
) -> CalibrationResult:
    """Returns a model that chooses positions in each image, by gates fitted to the search."""
    search = _run_search(method, task)
    dynamic = type(method)(order=search.order, prior=task.config.cover)
    model = search.calibrator.build_model(search.result, dynamic)
    gates = search.calibrator.fit_gates(dynamic, model, search.result)
    return _finish(task, search, model, gates)


@dataclass(frozen=True)
class _Search:
    """A finished search for positions.

    Attributes:
        name: what the method is called in the record.
        calibrator: what searched, which builds the model.
        images: how many images were searched on.
        tolerance: the largest error, or None if the counts were given.
        result: what was found for each block.
        order: the order of the cells, as the methods take it.
    """

    name: str
    calibrator: PatchSlimmingCalibrator
    images: int
    tolerance: float | None
    result: PatchSlimmingResult
    order: str


def _run_search(method: Method, task: CalibrationTask) -> _Search:
    """Checks what was asked, loads the images, and searches all layers."""
    name = method_name(method) or type(method).__name__
    goal, config = task.goal, task.config
    _check_fresh(method)
    goal.check_same_counts(name)
    _check_goal(task)
    outputs = _output_share(task)
    batches = task.load_batches()
    dense = slim(task.host, "identity", adapter=task.adapter)
    schedule = None if goal.schedule is None else goal.schedule.to_json()
    goals = {"macs": goal.macs, "tolerance": goal.tolerance, "schedule": schedule}
    fingerprint = calibration_fingerprint(dense, batches, name, goals, config.to_json())
    calibrator = PatchSlimmingCalibrator(
        dense,
        task.make_student(tuned=bool(config.epochs)),
        batches,
        config,
        outputs,
        CalibrationState(task.out, fingerprint, resume=task.resume),
        task.progress,
    )
    tolerance, counts = goal.tolerance, None
    if goal.macs is not None:
        tolerance, counts = calibrator.meet_budget(goal.macs)
    elif goal.schedule is not None:
        counts = calibrator.schedule_rows(goal.schedule)
    result = calibrator.search_layers(math.inf if tolerance is None else tolerance, counts)
    order = format_order(calibrator.layer_search.features.grid, list(result.cells))
    return _Search(name, calibrator, sum(map(len, batches)), tolerance, result, order)


def _finish(
    task: CalibrationTask, search: _Search, model: SlimModel, gates: dict[str, float]
) -> CalibrationResult:
    """Writes down how the model was made, and returns it with the record and the figure."""
    config = task.config
    record: dict[str, Any] = {
        "method": search.name,
        "macs": model.macs().total / model.dense_macs().total,
        "tolerance": search.tolerance,
        "search": config.to_json(),
        "images": search.images,
        "schedule": model.schedule.to_json(),
        "order": search.order,
        "layers": search.result.to_json()["layers"],
        "gates": gates,
    }
    model.calibrated = {name: record[name] for name in IN_RECIPE}
    if config.epochs:
        teacher = type(task.host).__name__
        model.trained = {"by": "calibrate", "epochs": config.epochs, "teacher": teacher}
    return CalibrationResult(model, search.result, record, draw_figure(record))


def _check_fresh(method: Method) -> None:
    """Refuses settings, which the calibration would replace."""
    usual = method_settings(type(method)())
    given = [name for name, value in method_settings(method).items() if value != usual[name]]
    if given:
        raise BadSetting(
            f"{', '.join(given)}: calibration finds the settings of {type(method).__name__} "
            "itself. Give the method by name, or without settings."
        )


def _check_goal(task: CalibrationTask) -> None:
    """Refuses none or several of the three goals, and values out of range."""
    goal = task.goal
    goals = {"macs": goal.macs, "tolerance": goal.tolerance, "schedule": goal.schedule}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise BadSchedule(
            "Give one of macs (a budget), tolerance (an error) and schedule (known counts), not "
            f"{' and '.join(given) or 'none'}."
        )
    tolerance = goal.tolerance
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise BadSchedule(f"tolerance={tolerance}: a number above 0, such as 0.01.")
    if tolerance is None and task.config.mode == "paper":
        raise BadSchedule(
            "mode='paper' tunes at every candidate, so its cost is known only at the end: give "
            "tolerance=0.01 or 0.02, as published; or meet a budget with mode='fast'."
        )


def _output_share(task: CalibrationTask) -> float:
    """Returns the share of patches left to the head; 0 if the head reads only the prefix.

    Raises:
        UnsupportedModel: the host has more than one grid.
        BadSchedule: the share is missing, or is given although the head reads no patches.
    """
    host, adapter, outputs = task.host, task.adapter, task.config.outputs
    strides = tuple(adapter.shape(host).strided)
    if strides:
        raise UnsupportedModel(
            f"Patch Slimming is calibrated on one grid, and {type(host).__name__} subsamples its "
            f"own in blocks {strides}. Methods that need no calibration serve it: tome."
        )
    reads_prefix_only = adapter.describe(host).rows_read is not None
    if reads_prefix_only and outputs:
        raise BadSchedule(
            f"outputs={outputs}: the head of this model reads no patches, so none has to be left "
            "to it. Leave it out."
        )
    if not reads_prefix_only and not outputs:
        raise BadSchedule(
            "The head of this model reads all patches (it averages them, or pools by attention, or "
            "gives them out), so that there is no set of outputs to begin with. Say which share of "
            "them it is to be left: outputs=0.5, --outputs 0.5."
        )
    return outputs
