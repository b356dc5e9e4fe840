"""`calibrate`: finds, on unlabelled images, which patches each block must still give out.

It turns a budget into a tolerance, has the layers searched one after the other, writes down each as
it is found, and puts the result together. How a layer is searched is in `walk.py`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.adapter import Adapter, find_adapter
from patchslim.bisection import Bisection
from patchslim.budget import macs_target
from patchslim.cost import HostShape, dense_macs, slim_macs
from patchslim.errors import (
    BadData,
    BadFile,
    BadSchedule,
    BadSetting,
    ImpossibleBudget,
    UnknownName,
    UnsupportedModel,
    WrongInput,
)
from patchslim.folder import replaced_file
from patchslim.gates import fitted
from patchslim.ledger import CHECKPOINT, Ledger, identity
from patchslim.model import SlimModel
from patchslim.order import ordered
from patchslim.pace import Pace
from patchslim.reading import Source
from patchslim.reducer import Reducer, find_reducer, reducer_name
from patchslim.reducers.patch_slimming import PatchSlimming
from patchslim.reducers.patch_slimming_dynamic import PatchSlimmingDynamic
from patchslim.schedule import Counts, Schedule, Tail
from patchslim.score import Batch, usable
from patchslim.search import Found, Search
from patchslim.slim import check_identity, evaluating, slim
from patchslim.walk import Walk

MODEL = "model"
RECORD = "calibration.json"
FIGURE = "pyramid.svg"
CALIBRATED: tuple[type[Reducer], ...] = (PatchSlimming, PatchSlimmingDynamic)

Say = Callable[[str], object]


@dataclass(frozen=True)
class Calibrated:
    """What a calibration found.

    Attributes:
        model: the slimmed model, in evaluation mode, where the host was; around a copy of the host
            where blocks were tuned or the host was in training mode.
        found: the order of cells, and every layer with its errors.
        record: all of it as plain data: settings, tolerance, schedule, order, layers.
    """

    model: SlimModel
    found: Found
    record: dict[str, Any]


def calibrate(  # noqa: PLR0913 (one word for each thing that a calibration is made of)
    host: nn.Module,
    images: Source | Iterable[Batch],
    method: str = "patch_slimming",
    *,
    macs: float | None = None,
    tolerance: float | None = None,
    schedule: Schedule | None = None,
    search: Search | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    adapter: Adapter | None = None,
    progress: Say | None = None,
) -> Calibrated:
    """`host` with the positions that it needs least removed. The host itself is not changed.

    Args:
        host: the dense model.
        images: unlabelled images to choose on: `Images` and the like, or batches.
        method: "patch_slimming", or "patch_slimming_dynamic" for positions of each image.
        macs: a budget, as a share of the host's operations or as a number; or
        tolerance: the largest error of a block's features, by `search.error`; or
        schedule: how many tokens each block leaves, where that is known already.
        search: how to search; by default `Search()`.
        out: a folder that takes model/, calibration.json, figures, and a checkpoint a layer.
        resume: goes on with the calibration in `out`, where it was stopped.
        adapter: an Adapter of your own, for a family that does not ship here.
        progress: is called with one line of text at a time.

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    if isinstance(host, SlimModel):
        raise UnsupportedModel("This model is slimmed already; calibrate its .host instead.")
    search = search or Search()
    say = progress or (lambda _: None)
    _check_asked(method, {"macs": macs, "tolerance": tolerance, "schedule": schedule}, search)
    adapter = adapter or find_adapter(host)
    outputs = _outputs(host, adapter, search)
    out = None if out is None else Path(out).expanduser().resolve()
    if out is not None and not resume and (out / CHECKPOINT).exists():
        raise BadFile(
            f"{out} holds a calibration already. Go on with it (resume=True, --resume), or give "
            "another folder."
        )
    copied = bool(search.epochs) or any(module.training for module in host.modules())
    with evaluating(host):
        drawn = _drawn(host, images, search)
        dense = slim(host, "identity", adapter=adapter)
        asked = {
            "macs": macs,
            "tolerance": tolerance,
            "schedule": None if schedule is None else schedule.to_json(),
        }
        state = Ledger(out, identity(dense, drawn, method, asked, search), resume=resume)
        student = copy.deepcopy(host) if copied else host
        run = _Run(dense, student, drawn, search, outputs, state, say)
        counts = None if schedule is None else run.scheduled(schedule)
        if macs is not None:
            tolerance, counts = run.budget(macs)
        found = run.whole(math.inf if tolerance is None else tolerance, counts)
        model = run.model(found, method)
    record = {
        "method": method,
        "macs": model.macs().total / model.dense_macs().total,
        "tolerance": tolerance,
        "search": search.to_json(),
        "images": sum(map(len, drawn)),
        "schedule": model.schedule.to_json(),
        "order": ordered(run.walk.features.grid, list(found.cells)),
        "layers": found.to_json()["layers"],
        "gates": run.told,
    }
    model.calibrated = {name: record[name] for name in ("tolerance", "search", "images")}
    if search.epochs:
        model.trained = {"by": "calibrate", "epochs": search.epochs, "teacher": type(host).__name__}
    check_identity(model)
    if out is not None:
        write(out, model, record)
    return Calibrated(model, found, record)


def write(out: Path, model: SlimModel, record: dict[str, Any]) -> None:
    """The model, the record and the figure of a calibration, in its folder."""
    from patchslim.pyramid import figure

    model.save(out / MODEL)
    for name, text in ((RECORD, json.dumps(record, indent=1)), (FIGURE, figure(record))):
        try:
            with replaced_file(out / name) as fresh:
                fresh.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise BadFile(
                f"Could not write {out / name}: {error}. The model and the checkpoint are whole: "
                "make room, and go on with resume=True, --resume."
            ) from error


class _Run:
    """One calibration: a tolerance for the budget, the layers, and the model."""

    def __init__(
        self,
        dense: SlimModel,
        student: nn.Module,
        images: list[Tensor],
        search: Search,
        outputs: float,
        state: Ledger,
        say: Say,
    ) -> None:
        self.dense, self.student, self.search = dense, student, search
        self.state, self.say = state, say
        self.shape = dense.shape()
        made, got = dense.adapter.image_shape(dense.host)[1:], tuple(images[0].shape[2:])
        if got != made:
            raise WrongInput(
                f"The images have {got[0]}x{got[1]} pixels, and this host is made for "
                f"{made[0]}x{made[1]}. Resize them, or build the host for their size (img_size=)."
            )
        if self.shape.depth == 1:
            raise UnsupportedModel(
                "This model has one block, whose output the head reads; there is no later block to "
                "find the rows for."
            )
        patches = self.shape.entering - self.shape.prefix
        self.outputs = math.ceil(outputs * patches)
        self.images = images
        self.walk = Walk(dense, student, images, search, self.outputs)
        self.told: dict[str, float] = {}

    def budget(self, macs: float) -> tuple[float, dict[int, int]]:
        """The tolerance with which the whole model meets a budget, and the rows it leaves."""
        if "counts" in self.state.known:
            counts = {int(block): kept for block, kept in self.state.known["counts"].items()}
            return float(self.state.known["tolerance"]), counts
        target = macs_target(macs, dense_macs(self.shape).total)
        self._insist_possible(macs, target)
        every = dict.fromkeys(range(self.shape.depth), self.shape.entering - self.shape.prefix)
        if _cost(self.shape, every, self.outputs) <= target:
            self.say("the budget is met with all patches: nothing is removed")
            return 0.0, every
        free = Search.of(
            self.search.to_json() | {"mode": "free", "epochs": 0, "images": self.search.probe}
        )
        probe = _first(self.images, self.search.probe)
        walk = Walk(self.dense, self.dense.host, probe, free, self.outputs)
        dense = dense_macs(self.shape).total
        bisection = Bisection(target, dense, self.state.known.get("tried", []))
        while not bisection.settled():
            tolerance = bisection.next()
            found = walk.begin()
            for block in walk.blocks(found):
                found = walk.layer(found, block, tolerance=tolerance, kept=None, say=self.say)
            cost = _cost(self.shape, found.kept(), self.outputs)
            self.say(f"tolerance {tolerance:.3g} gives {cost / dense:.3f} of the operations")
            bisection.add(tolerance, cost, found.kept())
            self.state.keep(tried=bisection.to_json())
        tolerance, counts = bisection.best()
        self.state.keep(tolerance=tolerance, counts={str(b): n for b, n in counts.items()})
        return tolerance, counts

    def scheduled(self, schedule: Schedule) -> dict[int, int]:
        """The patch rows that a schedule leaves after each block."""
        shape = self.shape
        rows = schedule.counts(shape.entering, shape.prefix, shape.depth, PatchSlimming())
        return {block: count - shape.prefix for block, count in enumerate(rows)}

    def whole(self, tolerance: float, counts: dict[int, int] | None) -> Found:
        """All layers, from the last down; those that are written down already are not repeated."""
        known = self.state.known
        found = Found.from_json(known["found"]) if "found" in known else self.walk.begin()
        if "student" in known:
            self.student.load_state_dict(known["student"])
        left = self.walk.blocks(found)
        pace = Pace(len(left), 0, 1)
        for block in left:
            kept = None if counts is None else counts[block]
            found = self.walk.layer(found, block, tolerance=tolerance, kept=kept, say=self.say)
            pace.stepped()
            self.say(f"block {block} is done, {pace.left()} left")
            tuned = {"student": self.student.state_dict()} if self.search.epochs else {}
            self.state.keep(found=found.to_json(), **tuned)
        return found

    def model(self, found: Found, method: str) -> SlimModel:
        """The slimmed model of a finished search."""
        shape, kept = self.shape, found.kept()
        rows = [kept[block] for block in range(shape.depth - 1)]
        rows.append(self.outputs or rows[-1])
        schedule = Counts(tuple(shape.prefix + each for each in rows), shape.entering, shape.prefix)
        tail: Tail = "full" if self.outputs else "exact"
        cells = ordered(self.walk.features.grid, list(found.cells))
        reducer: Reducer = PatchSlimming(order=cells)
        if method == "patch_slimming_dynamic":
            reducer = PatchSlimmingDynamic(order=cells, prior=self.search.cover)
        made = SlimModel(self.student, self.dense.adapter, reducer, schedule, tail)
        parameter = next(self.student.parameters())
        reducer.to(parameter.device, parameter.dtype)
        if isinstance(reducer, PatchSlimmingDynamic):
            for block in made.deciding():
                self.say(f"block {block}: fitting its gate")
                weights, told = fitted(self.walk, found, block)
                reducer.gates[str(block)].get_parameter("worth.weight").data.copy_(weights)
                self.told[str(block)] = told
        return made.eval()

    def _insist_possible(self, macs: float, target: float) -> None:
        """Refuses a budget below that of one patch a block."""
        least = max(self.outputs, 1)
        fewest = _cost(self.shape, dict.fromkeys(range(self.shape.depth), least), self.outputs)
        dense = dense_macs(self.shape).total
        if fewest > target:
            raise ImpossibleBudget(
                f"macs={macs:g} is {target / dense:.3f} of this model, and {least} patches in each "
                f"block are {fewest / dense:.3f} of it. Give more"
                + (", or a smaller share of outputs." if self.outputs else ".")
            )


def _cost(shape: HostShape, kept: dict[int, int], outputs: int) -> float:
    """Multiply-adds of one image, when blocks give out `kept` patch rows."""
    rows = [kept[block] for block in range(shape.depth - 1)]
    rows.append(outputs or rows[-1])
    counts = [shape.prefix + each for each in rows]
    return slim_macs(shape, PatchSlimming(), counts, tail=not outputs).total


def _check_asked(method: str, asked: Mapping[str, Any], search: Search) -> None:
    """Refuses a method that has nothing to calibrate, and none or several of the three goals."""
    names = [str(reducer_name(each())) for each in CALIBRATED]
    if method not in names:
        find_reducer(method)
        raise UnknownName.of("method to calibrate", method, names, "Others need no calibration.")
    if not isinstance(search, Search):
        raise BadSetting(
            f"search={search!r}: give a patchslim.Search, such as Search(mode='free')."
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


def _outputs(host: nn.Module, adapter: Adapter, search: Search) -> float:
    """The share of patches that the head still reads; none where it reads the prefix alone."""
    known = adapter.reads(host) is not None
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


def _drawn(host: nn.Module, images: Source | Iterable[Batch], search: Search) -> list[Tensor]:
    """The images to calibrate on, as batches where the host is."""
    parameter = next(host.parameters())
    batches = images.some(search.images) if isinstance(images, Source) else iter(images)
    drawn: list[Tensor] = []
    for number, batch in enumerate(batches):
        some = usable(batch, number)[0][: search.images - sum(map(len, drawn))]
        drawn.extend(some.to(parameter.device, parameter.dtype).split(search.batch))
        if sum(map(len, drawn)) == search.images:
            break
    if not drawn:
        raise BadData("There are no images to calibrate on: give some (they need no labels).")
    if len({each.shape[1:] for each in drawn}) > 1:
        raise BadData("The images are of several sizes; positions are calibrated for one.")
    return drawn


def _first(images: list[Tensor], count: int) -> list[Tensor]:
    """At most `count` of the images, from all batches alike."""
    every = torch.cat(images)
    some = every[:: max(1, -(-len(every) // count))][:count]
    return list(some.split(len(images[0])))
