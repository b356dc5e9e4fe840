"""`calibrate`: fits a method to unlabelled images, and writes down what it found.

It checks what is asked, draws the images and puts the result together. How positions are searched
is in `slimming.py`, how a threshold is found in `threshold.py`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchslim.calibration.patch_slimming.calibrator import PatchSlimmingCalibrator
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.patch_slimming.result import PatchSlimmingResult
from patchslim.calibration.state import CalibrationState, calibration_fingerprint
from patchslim.calibration.threshold import Goal, find_threshold
from patchslim.data.source import Source
from patchslim.errors import (
    BadData,
    BadFile,
    BadSchedule,
    BadSetting,
    UnknownName,
    UnsupportedModel,
)
from patchslim.files import replace_file
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import eval_mode
from patchslim.hosts._registry import find_adapter
from patchslim.measurement.score import Batch, check_batch
from patchslim.methods._method import Method
from patchslim.methods._ranking import format_order
from patchslim.methods._registry import find_method, make_method, method_name, method_names
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.methods.patch_slimming_dynamic import PatchSlimmingDynamic
from patchslim.model.check import check_identity
from patchslim.model.model import SlimModel
from patchslim.model.slim import slim
from patchslim.runs.layout import CHECKPOINT_FILE, FIGURE_FILE, MODEL_FOLDER, RECORD_FILE
from patchslim.schedules.schedule import Schedule

POSITION_METHODS: tuple[type[Method], ...] = (PatchSlimming, PatchSlimmingDynamic)

Progress = Callable[[str], object]


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration found.

    Attributes:
        model: the slimmed model, in evaluation mode, where the host was; around a copy of the host
            where blocks were tuned or the host was in training mode.
        found: the order of cells, and every layer with its errors; None of a threshold.
        record: all of it as plain data: settings, tolerance, schedule, order, layers; or the
            threshold, and what images cost with it.
    """

    model: SlimModel
    search_result: PatchSlimmingResult | None
    record: dict[str, Any]


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
    search: PatchSlimmingConfig | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    adapter: Adapter | None = None,
    progress: Progress | None = None,
) -> CalibrationResult:
    """`host` slimmed by a method that was fitted to images. The host itself is not changed.

    Of Patch Slimming the positions that the host needs least are found; of a method that lets
    images keep different numbers of patches, the threshold that meets a budget on average.

    Args:
        host: the dense model.
        images: unlabelled images to choose on: `Images` and the like, or batches.
        method: "patch_slimming", "patch_slimming_dynamic", or an adaptive method ("similarity",
            "tome", "ats", "duplicates"), by name or as a Method with settings of your own.
        macs: a budget, as a share of the host's operations or as a number; of adaptive methods
            the mean over the images; or
        tolerance: the largest error of a block's features, by `search.error` (Patch Slimming); or
        agreement: the share of answers that are to stay the dense model's (adaptive methods).
        cap: the most that any image may cost, in the words of `macs` (adaptive methods).
        schedule: how many tokens each block leaves, where that is known already; of adaptive
            methods, the most that any image may keep.
        search: how to search; by default `Search()`. Adaptive methods heed `images` and `batch`.
        out: a folder that takes model/, calibration.json, figures, and a checkpoint a layer.
        resume: goes on with the calibration in `out`, where it was stopped.
        adapter: an Adapter of your own, for a family that does not ship here.
        progress: is called with one line of text at a time.

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    if isinstance(host, SlimModel):
        raise UnsupportedModel("This model is slimmed already; calibrate its .host instead.")
    search = search or PatchSlimmingConfig()
    say = progress or (lambda _: None)
    _check_search(search)
    adaptive = _find_adaptive(method)
    if adaptive is not None:
        if tolerance is not None or resume:
            raise BadSchedule(
                "tolerance and resume are Patch Slimming's. A threshold is found for macs= or "
                "agreement=, in one go."
            )
        goal = Goal(macs=macs, agreement=agreement, cap=cap, schedule=schedule)
        return _calibrate_threshold(host, adapter, adaptive, images, goal, search, out, say)
    if not isinstance(method, str):
        raise UnknownName(
            f"{method!r} has nothing to calibrate. Methods that have: "
            f"{', '.join(_calibratable_names())}; "
            "Patch Slimming by name, others by name or as a Method with a threshold."
        )
    if agreement is not None or cap is not None:
        raise BadSchedule(
            "agreement and cap are for methods that let images keep different numbers of patches; "
            f"{method} takes macs, tolerance or schedule."
        )
    _check_goal(method, {"macs": macs, "tolerance": tolerance, "schedule": schedule}, search)
    adapter = adapter or find_adapter(host)
    outputs = _output_share(host, adapter, search)
    if out is not None:
        out = Path(out).expanduser().resolve() if resume else _new_folder(out)
    copied = bool(search.epochs) or any(module.training for module in host.modules())
    with eval_mode(host):
        drawn = _load_batches(host, images, search)
        dense = slim(host, "identity", adapter=adapter)
        asked = {
            "macs": macs,
            "tolerance": tolerance,
            "schedule": None if schedule is None else schedule.to_json(),
        }
        state = CalibrationState(
            out, calibration_fingerprint(dense, drawn, method, asked, search), resume=resume
        )
        student = copy.deepcopy(host) if copied else host
        run = PatchSlimmingCalibrator(dense, student, drawn, search, outputs, state, say)
        counts = None if schedule is None else run.schedule_rows(schedule)
        if macs is not None:
            tolerance, counts = run.meet_budget(macs)
        found = run.search_layers(math.inf if tolerance is None else tolerance, counts)
        model = run.model(found, method)
    record = {
        "method": method,
        "macs": model.macs().total / model.dense_macs().total,
        "tolerance": tolerance,
        "search": search.to_json(),
        "images": sum(map(len, drawn)),
        "schedule": model.schedule.to_json(),
        "order": format_order(run.layer_search.features.grid, list(found.cells)),
        "layers": found.to_json()["layers"],
        "gates": run.gate_scores,
    }
    model.calibrated = {name: record[name] for name in ("tolerance", "search", "images")}
    if search.epochs:
        model.trained = {"by": "calibrate", "epochs": search.epochs, "teacher": type(host).__name__}
    check_identity(model)
    if out is not None:
        write_calibration(out, model, record)
    return CalibrationResult(model, found, record)


def _new_folder(out: str | Path) -> Path:
    """The folder, which must not hold a calibration that could be gone on with."""
    out = Path(out).expanduser().resolve()
    if (out / CHECKPOINT_FILE).exists():
        raise BadFile(
            f"{out} holds a calibration already. Go on with it (resume=True, --resume), or give "
            "another folder."
        )
    return out


def _calibratable_names() -> list[str]:
    """The methods that can be calibrated."""
    placed = [str(method_name(each())) for each in POSITION_METHODS]
    return placed + [name for name in method_names() if _find_adaptive(name) is not None]


def _find_adaptive(method: str | Method) -> Method | None:
    """The method, where images may keep different numbers of patches by it."""
    made = make_method(method, {})
    return made if made.adaptive or made.tuned_threshold is not None else None


def _calibrate_threshold(  # noqa: PLR0913 (the arguments of `calibrate`)
    host: nn.Module,
    adapter: Adapter | None,
    method: Method,
    images: Source | Iterable[Batch],
    goal: Goal,
    search: PatchSlimmingConfig,
    out: str | Path | None,
    say: Progress,
) -> CalibrationResult:
    """The model whose threshold meets a goal, written down where that is asked for."""
    _check_threshold_settings(search)
    adapter = adapter or find_adapter(host)
    out = None if out is None else _new_folder(out)
    if any(module.training for module in host.modules()):
        host = copy.deepcopy(host).eval()
    with eval_mode(host):
        drawn = _load_batches(host, images, search)
        model, record = find_threshold(host, adapter, method, drawn, goal, say)
    record = {"method": method_name(method), "macs": record["spent"]["mean"], **record}
    known = ("threshold", "spent", "cap", "agreement", "images")
    model.calibrated = {name: record[name] for name in known}
    check_identity(model)
    if out is not None:
        model.save(out / MODEL_FOLDER)
        _write_text(out / RECORD_FILE, json.dumps(record, indent=1))
    return CalibrationResult(model, None, record)


def write_calibration(out: Path, model: SlimModel, record: dict[str, Any]) -> None:
    """The model, the record and the figure of a calibration, in its folder."""
    from patchslim.calibration.patch_slimming.figure import draw_figure

    model.save(out / MODEL_FOLDER)
    _write_text(out / RECORD_FILE, json.dumps(record, indent=1))
    _write_text(out / FIGURE_FILE, draw_figure(record))


def _write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    try:
        with replace_file(path) as fresh:
            fresh.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise BadFile(
            f"Could not write {path}: {error}. The model beside it is whole, and a checkpoint if "
            "there is one: make room, and give the command again (resume=True, --resume)."
        ) from error


def _check_search(search: PatchSlimmingConfig) -> None:
    """Refuses what is no `Search`."""
    if not isinstance(search, PatchSlimmingConfig):
        raise BadSetting(
            f"search={search!r}: give a patchslim.Search, such as Search(mode='free')."
        )


def _check_threshold_settings(search: PatchSlimmingConfig) -> None:
    """Refuses settings of the search for positions where a threshold is found."""
    usual = PatchSlimmingConfig(images=search.images, batch=search.batch).to_json()
    odd = [name for name, value in search.to_json().items() if value != usual[name]]
    if odd:
        raise BadSetting(
            f"{', '.join(odd)}: settings of Patch Slimming's search. A threshold heeds images and "
            "batch alone; leave the others out."
        )


def _check_goal(method: str, asked: Mapping[str, Any], search: PatchSlimmingConfig) -> None:
    """Refuses a method that has nothing to calibrate, and none or several of the three goals."""
    names = [str(method_name(each())) for each in POSITION_METHODS]
    if method not in names:
        find_method(method)
        raise UnknownName.of(
            "method to calibrate", method, _calibratable_names(), "Others need no calibration."
        )
    given = [name for name, value in asked.items() if value is not None]
    if len(given) != 1:
        raise BadSchedule(
            f"Give one of macs (a budget), tolerance (an error) and schedule (known counts), not "
            f"{' and '.join(given) or 'none'}."
        )
    for name in ("macs", "tolerance"):
        if isinstance(asked[name], str | bool):
            raise BadSchedule(f"{name}={asked[name]!r}: give a number, such as 0.6.")
    tolerance = asked["tolerance"]
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise BadSchedule(f"tolerance={tolerance}: a number above 0, such as 0.01.")
    if tolerance is None and search.mode == "paper":
        raise BadSchedule(
            "mode='paper' tunes at every candidate, so its cost is known only at the end: give "
            "tolerance=0.01 or 0.02, as published; or meet a budget with mode='fast'."
        )


def _output_share(host: nn.Module, adapter: Adapter, search: PatchSlimmingConfig) -> float:
    """The share of patches that the head still reads; none where it reads the prefix alone."""
    strides = tuple(adapter.shape(host).strided)
    if strides:
        raise UnsupportedModel(
            f"Patch Slimming is calibrated on one grid, and {type(host).__name__} subsamples its "
            f"own in blocks {strides}. Methods that need no calibration serve it: tome."
        )
    known = adapter.describe(host).rows_read is not None
    if known and search.outputs:
        raise BadSchedule(
            f"outputs={search.outputs}: the head of this model reads no patches, so none has to be "
            "left to it. Leave it out."
        )
    if not known and not search.outputs:
        raise BadSchedule(
            "The head of this model reads all patches (it averages them, or pools by attention, or "
            "gives them out), so that there is no set of outputs to begin with. Say which share of "
            "them it is to be left: outputs=0.5, --outputs 0.5. See docs/methods/patch_slimming.md."
        )
    return search.outputs


def _load_batches(
    host: nn.Module, images: Source | Iterable[Batch], search: PatchSlimmingConfig
) -> list[Tensor]:
    """The images to calibrate on, as batches where the host is."""
    parameter = next(host.parameters())
    batches = images.sample_batches(search.images) if isinstance(images, Source) else iter(images)
    drawn: list[Tensor] = []
    for number, batch in enumerate(batches):
        some = check_batch(batch, number)[0][: search.images - sum(map(len, drawn))]
        drawn.extend(some.to(parameter.device, parameter.dtype).split(search.batch))
        if sum(map(len, drawn)) == search.images:
            break
    if not drawn:
        raise BadData("There are no images to calibrate on: give some (they need no labels).")
    if len({each.shape[1:] for each in drawn}) > 1:
        raise BadData("The images are of several sizes; positions are calibrated for one.")
    return drawn
