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
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.patch_slimming.gates import fit_gate
from patchslim.calibration.patch_slimming.layer_search import LayerSearch
from patchslim.calibration.patch_slimming.result import PatchSlimmingResult
from patchslim.calibration.state import CalibrationState
from patchslim.errors import ImpossibleBudget, UnsupportedModel, WrongInput
from patchslim.methods._method import Method
from patchslim.methods._ranking import format_order
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.methods.patch_slimming_dynamic import PatchSlimmingDynamic
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.runs.progress import StepTimer
from patchslim.schedules.budget import macs_target
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Counts, Schedule, Tail
from patchslim.tokens.shapes import HostShape, dense_macs

Progress = Callable[[str], object]


class PatchSlimmingCalibrator:
    """One calibration: a tolerance for the budget, the layers, and the model."""

    def __init__(
        self,
        dense: SlimModel,
        student: nn.Module,
        images: list[Tensor],
        search: PatchSlimmingConfig,
        outputs: float,
        state: CalibrationState,
        say: Progress,
    ) -> None:
        self.dense, self.student, self.search = dense, student, search
        self.state, self.say = state, say
        self.shape = dense.plan.shape
        made, got = (
            dense.plan.adapter.describe(dense.host).image_shape[1:],
            tuple(images[0].shape[2:]),
        )
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
        self.layer_search = LayerSearch(dense, student, images, search, self.outputs)
        self.gate_scores: dict[str, float] = {}

    def meet_budget(self, macs: float) -> tuple[float, dict[int, int]]:
        """The tolerance with which the whole model meets a budget, and the rows it leaves."""
        if "counts" in self.state.known:
            counts = {int(block): kept for block, kept in self.state.known["counts"].items()}
            return float(self.state.known["tolerance"]), counts
        target = macs_target(macs, dense_macs(self.shape).total)
        self._check_possible(macs, target)
        every = dict.fromkeys(range(self.shape.depth), self.shape.entering - self.shape.prefix)
        if _count_macs(self.shape, every, self.outputs) <= target:
            self.say("the budget is met with all patches: nothing is removed")
            return 0.0, every
        free = PatchSlimmingConfig.of(
            self.search.to_json() | {"mode": "free", "epochs": 0, "images": self.search.probe}
        )
        probe = _take_images(self.images, self.search.probe)
        walk = LayerSearch(self.dense, self.dense.host, probe, free, self.outputs)
        dense = dense_macs(self.shape).total
        bisection = Bisection(target, dense, self.state.known.get("tried", []))
        while not bisection.is_settled():
            tolerance = bisection.next()
            found = walk.begin()
            for block in walk.blocks(found):
                found = walk.search_layer(
                    found, block, tolerance=tolerance, kept=None, say=self.say
                )
            cost = _count_macs(self.shape, found.kept(), self.outputs)
            self.say(f"tolerance {tolerance:.3g} gives {cost / dense:.3f} of the operations")
            bisection.add(tolerance, cost, found.kept())
            self.state.save(tried=bisection.to_json())
        tolerance, counts = bisection.best()
        self.state.save(tolerance=tolerance, counts={str(b): n for b, n in counts.items()})
        return tolerance, counts

    def schedule_rows(self, schedule: Schedule) -> dict[int, int]:
        """The patch rows that a schedule leaves after each block."""
        shape = self.shape
        rows = schedule.counts(shape.entering, shape.prefix, shape.depth, PatchSlimming())
        return {block: count - shape.prefix for block, count in enumerate(rows)}

    def search_layers(self, tolerance: float, counts: dict[int, int] | None) -> PatchSlimmingResult:
        """All layers, from the last down; those that are written down already are not repeated."""
        known = self.state.known
        found = (
            PatchSlimmingResult.from_json(known["found"])
            if "found" in known
            else self.layer_search.begin()
        )
        if "student" in known:
            self.student.load_state_dict(known["student"])
        left = self.layer_search.blocks(found)
        pace = StepTimer(len(left), 0, 1)
        for block in left:
            kept = None if counts is None else counts[block]
            found = self.layer_search.search_layer(
                found, block, tolerance=tolerance, kept=kept, say=self.say
            )
            pace.finish_step()
            self.say(f"block {block} is done, {pace.time_left()} left")
            tuned = {"student": self.student.state_dict()} if self.search.epochs else {}
            self.state.save(found=found.to_json(), **tuned)
        return found

    def model(self, found: PatchSlimmingResult, method: str) -> SlimModel:
        """The slimmed model of a finished search."""
        shape, kept = self.shape, found.kept()
        rows = [kept[block] for block in range(shape.depth - 1)]
        rows.append(self.outputs or rows[-1])
        schedule = Counts(tuple(shape.prefix + each for each in rows), shape.entering, shape.prefix)
        tail: Tail = "full" if self.outputs else "exact"
        cells = format_order(self.layer_search.features.grid, list(found.cells))
        chosen: Method = PatchSlimming(order=cells)
        if method == "patch_slimming_dynamic":
            chosen = PatchSlimmingDynamic(order=cells, prior=self.search.cover)
        made = SlimModel(
            self.student,
            plan_schedule(self.student, self.dense.plan.adapter, chosen, schedule, tail),
        )
        parameter = next(self.student.parameters())
        chosen.to(parameter.device, parameter.dtype)
        if isinstance(chosen, PatchSlimmingDynamic):
            for block in made.plan.decision_blocks:
                self.say(f"block {block}: fitting its gate")
                weights, told = fit_gate(self.layer_search, found, block)
                chosen.gates[str(block)].get_parameter("worth.weight").data.copy_(weights)
                self.gate_scores[str(block)] = told
        return made.eval()

    def _check_possible(self, macs: float, target: float) -> None:
        """Refuses a budget below that of one patch a block."""
        least = max(self.outputs, 1)
        fewest = _count_macs(
            self.shape, dict.fromkeys(range(self.shape.depth), least), self.outputs
        )
        dense = dense_macs(self.shape).total
        if fewest > target:
            raise ImpossibleBudget(
                f"macs={macs:g} is {target / dense:.3f} of this model, and {least} patches in each "
                f"block are {fewest / dense:.3f} of it. Give more"
                + (", or a smaller share of outputs." if self.outputs else ".")
            )


def _count_macs(shape: HostShape, kept: dict[int, int], outputs: int) -> float:
    """Multiply-adds of one image, when blocks give out `kept` patch rows."""
    rows = [kept[block] for block in range(shape.depth - 1)]
    rows.append(outputs or rows[-1])
    counts = [shape.prefix + each for each in rows]
    return slim_macs(shape, PatchSlimming(), counts, tail=not outputs).total


def _take_images(images: list[Tensor], count: int) -> list[Tensor]:
    """At most `count` of the images, from all batches alike."""
    every = torch.cat(images)
    some = every[:: max(1, -(-len(every) // count))][:count]
    return list(some.split(len(images[0])))
