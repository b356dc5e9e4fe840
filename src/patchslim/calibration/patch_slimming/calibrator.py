"""One calibration of Patch Slimming: a tolerance for the budget, the layers, and the model.

It does not know where images come from, nor where what it finds is written to. How a layer is
searched is in `walk.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from patchslim.calibration.bisection import Bisection
from patchslim.calibration.patch_slimming.config import Search
from patchslim.calibration.patch_slimming.gates import fitted
from patchslim.calibration.patch_slimming.layer_search import Walk
from patchslim.calibration.patch_slimming.result import Found
from patchslim.calibration.state import Ledger
from patchslim.errors import ImpossibleBudget, UnsupportedModel, WrongInput
from patchslim.methods._method import Reducer
from patchslim.methods._ranking import ordered
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.methods.patch_slimming_dynamic import PatchSlimmingDynamic
from patchslim.model.model import SlimModel
from patchslim.runs.progress import Pace
from patchslim.schedules.budget import macs_target
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Counts, Schedule, Tail
from patchslim.tokens.shapes import HostShape, dense_macs

Say = Callable[[str], object]


class Slimming:
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


def _first(images: list[Tensor], count: int) -> list[Tensor]:
    """At most `count` of the images, from all batches alike."""
    every = torch.cat(images)
    some = every[:: max(1, -(-len(every) // count))][:count]
    return list(some.split(len(images[0])))
