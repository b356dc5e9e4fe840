"""Runs the search of Patch Slimming: a tolerance for the budget, the layers, and then the model.

It does not know where images come from, nor where results are written. How a single layer is
searched is in `layer_search.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from patchslim.calibration.bisection import Bisection
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.patch_slimming.gates import fit_gate
from patchslim.calibration.patch_slimming.layer_search import LayerSearch
from patchslim.calibration.patch_slimming.result import PatchSlimmingResult, check_counts
from patchslim.calibration.state import CalibrationState
from patchslim.errors import ImpossibleBudget, UnsupportedModel, WrongInput
from patchslim.methods._method import Method
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.methods.patch_slimming_dynamic import PatchSlimmingDynamic
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.runs.progress import Progress, StepTimer
from patchslim.runs.state_checks import check_alike
from patchslim.schedules.budget import macs_target
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Counts, Schedule, Tail
from patchslim.tokens.shapes import HostShape, dense_macs


class PatchSlimmingCalibrator:
    """Finds which patches each block has to output, and builds the slimmed model.

    Args:
        dense: the dense model, as a SlimModel that removes nothing.
        student: the host of the slimmed model, whose blocks may be tuned.
        images: batches to search on, on the host's device.
        config: how to search.
        outputs: the share of patches left to the head; 0 if it reads only the prefix.
        state: what was found so far, and where to save it.
        progress: is called with one line of text at a time.
    """

    def __init__(
        self,
        dense: SlimModel,
        student: nn.Module,
        images: list[Tensor],
        config: PatchSlimmingConfig,
        outputs: float,
        state: CalibrationState,
        progress: Progress,
    ) -> None:
        self.dense, self.student, self.config = dense, student, config
        self.state, self.progress = state, progress
        self.shape = dense.plan.shape
        wanted = dense.plan.adapter.describe(dense.host).image_size
        given = tuple(images[0].shape[-2:])
        if given != wanted:
            raise WrongInput(
                f"The images have {given[0]}x{given[1]} pixels, and this host is made for "
                f"{wanted[0]}x{wanted[1]}. Resize them, or build the host for their size "
                "(img_size=)."
            )
        if self.shape.depth == 1:
            raise UnsupportedModel(
                "This model has one block, whose output the head reads; there is no later block to "
                "find the rows for."
            )
        patches = self.shape.entering - self.shape.prefix
        self.outputs = math.ceil(outputs * patches)
        self.images = images
        self.layer_search = LayerSearch(dense, student, images, config, self.outputs)

    def meet_budget(self, macs: float) -> tuple[float, dict[int, int]]:
        """Finds the tolerance with which the whole model meets a budget.

        Returns:
            The tolerance, and the patch rows that it leaves after each block.

        Raises:
            ImpossibleBudget: the budget is out of reach.
        """
        with self.state.reading() as known:
            if "counts" in known:
                counts = {int(block): kept for block, kept in known["counts"].items()}
                check_counts(counts, range(self._last_block() + 1), self.layer_search.patches)
                check_alike("tolerance", known["tolerance"], 0.0)
                return float(known["tolerance"]), counts
        dense = dense_macs(self.shape).total
        target = macs_target(macs, dense)
        self._check_possible(macs, target)
        every = dict.fromkeys(range(self.shape.depth), self.shape.entering - self.shape.prefix)
        if _count_macs(self.shape, every, self.outputs) <= target:
            self.progress("the budget is met with all patches: nothing is removed")
            return 0.0, every
        probe_config = PatchSlimmingConfig.of(
            self.config.to_json() | {"mode": "free", "epochs": 0, "images": self.config.probe}
        )
        probe = _take_images(self.images, self.config.probe)
        probe_search = LayerSearch(self.dense, self.dense.host, probe, probe_config, self.outputs)
        with self.state.reading() as known:
            bisection = Bisection(target, dense, known.get("tried", []))
            for attempt in bisection.attempts:
                check_alike("tried", [attempt.tolerance, attempt.cost], [0.0])
                check_counts(attempt.kept, range(self._last_block() + 1), self.layer_search.patches)
        while not bisection.is_settled():
            tolerance = bisection.next()
            result = probe_search.begin()
            for block in probe_search.blocks(result):
                result = probe_search.search_layer(
                    result, block, tolerance=tolerance, kept=None, progress=self.progress
                )
            cost = _count_macs(self.shape, result.kept(), self.outputs)
            self.progress(f"tolerance {tolerance:.3g} gives {cost / dense:.3f} of the operations")
            bisection.add(tolerance, cost, result.kept())
            self.state.save(tried=bisection.to_json())
        tolerance, counts = bisection.best()
        self.state.save(tolerance=tolerance, counts={str(b): n for b, n in counts.items()})
        return tolerance, counts

    def schedule_rows(self, schedule: Schedule) -> dict[int, int]:
        """Returns how many patch rows a schedule leaves after each block."""
        shape = self.shape
        rows = schedule.counts(shape.entering, shape.prefix, shape.depth, PatchSlimming())
        return {block: count - shape.prefix for block, count in enumerate(rows)}

    def search_layers(self, tolerance: float, counts: dict[int, int] | None) -> PatchSlimmingResult:
        """Searches all layers, from the last one down. Layers in the checkpoint are not repeated.

        Args:
            tolerance: the largest error of the next block's features.
            counts: the patch rows that each block has to output, if that is known already.
        """
        layer_search = self.layer_search
        with self.state.reading() as known:
            if "found" in known:
                result = PatchSlimmingResult.from_json(known["found"])
                result.check(self._last_block(), layer_search.patches)
            else:
                result = layer_search.begin()
            if "student" in known:
                check_alike("student", known["student"], self.student.state_dict())
                self.student.load_state_dict(known["student"])
        blocks = layer_search.blocks(result)
        timer = StepTimer(len(blocks), 0, 1)
        for block in blocks:
            kept = None if counts is None else counts[block]
            result = layer_search.search_layer(
                result, block, tolerance=tolerance, kept=kept, progress=self.progress
            )
            timer.finish_step()
            self.progress(f"block {block} is done, {timer.time_left()} left")
            tuned = {"student": self.student.state_dict()} if self.config.epochs else {}
            self.state.save(found=result.to_json(), **tuned)
        return result

    def build_model(self, result: PatchSlimmingResult, method: Method) -> SlimModel:
        """Returns the slimmed model of a finished search, with a method that knows its order."""
        shape, kept = self.shape, result.kept()
        rows = [kept[block] for block in range(shape.depth - 1)]
        rows.append(self.outputs or rows[-1])
        schedule = Counts(tuple(shape.prefix + each for each in rows), shape.entering, shape.prefix)
        tail: Tail = "full" if self.outputs else "exact"
        plan = plan_schedule(self.student, self.dense.plan.adapter, method, schedule, tail)
        model = SlimModel(self.student, plan)
        parameter = next(self.student.parameters())
        method.to(parameter.device, parameter.dtype)
        return model.eval()

    def fit_gates(
        self, method: PatchSlimmingDynamic, model: SlimModel, result: PatchSlimmingResult
    ) -> dict[str, float]:
        """Fits the gate of every block that decides.

        Returns:
            How well each gate predicts the score (R squared), by the number of its block.
        """
        r_squared = {}
        for block in model.plan.decision_blocks:
            self.progress(f"block {block}: fitting its gate")
            weights, r_squared[str(block)] = fit_gate(self.layer_search, result, block)
            method.gates[str(block)].get_parameter("worth.weight").data.copy_(weights)
        return r_squared

    def _last_block(self) -> int:
        """The block at which a search begins: the last one, or the one before its exact tail."""
        return self.shape.depth - (1 if self.outputs else 2)

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
    """Counts the multiply-adds of one image when blocks output `kept` patch rows."""
    rows = [kept[block] for block in range(shape.depth - 1)]
    rows.append(outputs or rows[-1])
    counts = [shape.prefix + each for each in rows]
    return slim_macs(shape, PatchSlimming(), counts, tail=not outputs).total


def _take_images(images: list[Tensor], count: int) -> list[Tensor]:
    """Takes at most `count` of the images, evenly spread over all batches."""
    every = torch.cat(images)
    some = every[:: max(1, -(-len(every) // count))][:count]
    return list(some.split(len(images[0])))
