"""Calibrates methods that let images keep different numbers of patches: finds their threshold.

Each candidate is run on the images. What each image costs, and how often the answer stays the dense
model's, is counted and not estimated. Nothing here knows which method it is: a method offers its
`tuned_threshold`, or it is `adaptive` and its schedule is searched instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchslim.calibration.bisection import FIRST_TOLERANCE, Bisection
from patchslim.calibration.dispatch import register_calibrator
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.task import CalibrationResult, CalibrationTask
from patchslim.errors import BadSchedule, BadSetting, ImpossibleBudget, WrongInput
from patchslim.measurement.score import kl_divergence
from patchslim.methods._method import Method, method_settings
from patchslim.methods._registry import method_name
from patchslim.model.model import SlimModel
from patchslim.model.plan import check_needs, plan_schedule
from patchslim.schedules.budget import macs_target, make_schedule
from patchslim.schedules.schedule import Counts, Rate, Schedule, Tail
from patchslim.tokens.shapes import dense_macs

# Tried first where the schedule is searched: it keeps half of the patches at each decision.
DEFAULT_TOLERANCE = 1.0
SEARCH_RANGE = 1e6  # the factor by which a tolerance may differ from the method's usual one
IN_RECIPE = ("threshold", "spent", "cap", "agreement", "images")  # entries of the record


def has_threshold(method: Method) -> bool:
    """Tells whether there is something to search: a threshold, or counts that vary by image."""
    return method.adaptive or method.tuned_threshold is not None


@register_calibrator(Method, when=has_threshold)
def calibrate_threshold(method: Method, task: CalibrationTask) -> CalibrationResult:
    """Returns the model whose threshold meets the goal on the images of the task."""
    _check_task(task)
    check_needs(task.adapter.describe(task.host), method)
    search = _ThresholdSearch(method, task, task.load_batches())
    model = search.build_model(search.find_tolerance()).eval()
    record = search.describe(model)
    model.calibrated = {name: record[name] for name in IN_RECIPE}
    return CalibrationResult(model, None, record)


def summarize(values: Tensor) -> dict[str, float]:
    """Returns the mean, median, 99th percentile and maximum of numbers, one an image."""
    values = values.double()
    return {
        "mean": float(values.mean()),
        "p50": float(values.quantile(0.5)),
        "p99": float(values.quantile(0.99)),
        "max": float(values.max()),
    }


class Outcome(NamedTuple):
    """What a tolerance leads to: the mean share of operations, and of answers that change."""

    mean: float
    wrong: float


class Measurement(NamedTuple):
    """A model run on all images.

    `spent` is each image's share of the dense model's operations, `tokens` how many of its tokens
    enter the last block. `agreement` is the share of answers that stay the dense model's, and `kl`
    the mean KL divergence from them.
    """

    spent: Tensor
    tokens: Tensor
    agreement: float
    kl: float


class _ThresholdSearch:
    """Tries tolerances of one method on some images until one meets the goal."""

    def __init__(self, method: Method, task: CalibrationTask, images: Sequence[Tensor]) -> None:
        self.method, self.images, self.goal = method, images, task.goal
        self.host, self.adapter = task.make_student(tuned=False), task.adapter
        self.progress = task.progress
        self.outcomes: dict[float, Outcome] = {}
        self.size = (images[0].shape[2], images[0].shape[3])
        reason = self.adapter.size_mismatch(self.host, self.size, {})
        if reason is not None:
            raise WrongInput(f"Got images of {self.size[0]}x{self.size[1]} pixels: {reason}")
        self.shape = self.adapter.shape(self.host, self.size)
        self.dense = dense_macs(self.shape).total
        self.tail: Tail = "full" if self.shape.read is None else "exact"
        macs = self.goal.macs
        self.target = None if macs is None else macs_target(macs, self.dense) / self.dense
        cap = 1.0 if self.goal.cap is None else _cap_share(self.goal.cap, self.dense)
        if self.target is not None and cap < self.target:
            raise ImpossibleBudget(
                f"macs={macs:g} on average is above the cap of {self.goal.cap:g}. The cap is what "
                "no image may exceed: give a larger one."
            )
        self.max_schedule = self.goal.schedule or make_schedule(
            self.shape, self._method_at(0.5), macs=self.goal.cap, tail=self.tail
        )
        with torch.no_grad():
            self.dense_logits = [
                self.adapter.logits(self.host(batch)).cpu() for batch in self.images
            ]

    def find_tolerance(self) -> float:
        """Returns the smallest tolerance within the budget, or the largest that keeps the answers.

        Raises:
            ImpossibleBudget: no tolerance reaches the goal.
        """
        threshold = self.method.tuned_threshold
        usual = DEFAULT_TOLERANCE if threshold is None else threshold.first
        largest = math.inf if threshold is None else threshold.top
        narrow, wide = usual / SEARCH_RANGE, min(usual * SEARCH_RANGE, largest)
        if self.target is None:
            return self._find_for_agreement(float(self.goal.agreement or 0), usual, narrow, wide)
        return self._find_for_budget(self.target, usual, narrow, wide)

    def build_model(self, tolerance: float) -> SlimModel:
        """Returns the host slimmed by the method at one tolerance."""
        most = self.max_schedule
        if self.method.tuned_threshold is None:  # then the schedule is all that can be searched
            most = self._loosen_schedule(tolerance)
        method = self._method_at(tolerance)
        plan = plan_schedule(self.host, self.adapter, method, most, self.tail)
        return SlimModel(self.host, plan)

    def describe(self, model: SlimModel) -> dict[str, Any]:
        """Returns the record of a calibrated model, as plain data."""
        measured = self.measure(model)
        threshold = self.method.tuned_threshold
        setting = None if threshold is None else threshold.setting
        spent = summarize(measured.spent)
        record = {
            "method": method_name(self.method),
            "macs": spent["mean"],
            "threshold": {
                "setting": setting,
                "value": None if setting is None else method_settings(model.method)[setting],
            },
            "settings": method_settings(model.method),
            "spent": spent,
            "cap": model.macs(self.size).total / self.dense,
            "agreement": measured.agreement,
            "kl": measured.kl,
            "tokens": summarize(measured.tokens),
            "images": len(measured.spent),
            "schedule": model.schedule.to_json(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(record))
        return plain

    def measure(self, model: SlimModel) -> Measurement:
        """Runs a model on all images, and counts what each of them costs."""
        spent, tokens, same, divergences = [], [], [], []
        with torch.no_grad():
            for batch, dense in zip(self.images, self.dense_logits, strict=True):
                output, costs = model.forward_with_costs(batch)
                logits = self.adapter.logits(output).cpu()
                spent += [each.total / self.dense for each in costs]
                tokens += [each.rows[:-1][-1:] or each.rows for each in costs]
                same.append(logits.argmax(dim=-1) == dense.argmax(dim=-1))
                divergences.append(kl_divergence(dense.flatten(1), logits.flatten(1)))
        return Measurement(
            torch.tensor(spent, dtype=torch.float64),
            torch.tensor(tokens).flatten(),
            float(torch.cat(same).double().mean()),
            float(torch.cat(divergences).mean()),
        )

    def _find_for_agreement(
        self, agreement: float, usual: float, narrow: float, wide: float
    ) -> float:
        """Returns the largest tolerance that keeps the share `agreement` of the answers."""
        wrong = 1 - agreement
        if self._try_tolerance(narrow).wrong > wrong:
            raise ImpossibleBudget(
                f"agreement={self.goal.agreement}: even where nothing joins but what the cap asks "
                f"for, {1 - self.outcomes[narrow].wrong:.1%} of the answers stay. Ask for less, or "
                "give a larger cap."
            )
        if self._try_tolerance(wide).wrong <= wrong:
            return wide
        # The bisection looks for the smallest number. The number here is 1 / tolerance.
        number = self._bisect(wrong, lambda each: each.wrong, lambda number: usual / number)
        return usual / number

    def _find_for_budget(self, target: float, usual: float, narrow: float, wide: float) -> float:
        """Returns the smallest tolerance whose mean cost is not above `target`."""
        if self._try_tolerance(wide).mean > target:
            name, settings = type(self.method).__name__, method_settings(self.method)
            floor = f", a smaller floor than {settings['floor']}" if "floor" in settings else ""
            raise ImpossibleBudget(
                f"macs={self.goal.macs:g}: with all that it can join, {name} still spends "
                f"{self.outcomes[wide].mean:.3f} on average here. Give more{floor}, or another "
                "method."
            )
        if self._try_tolerance(narrow).mean <= target:
            return narrow
        return usual * self._bisect(target, lambda each: each.mean, lambda number: usual * number)

    def _bisect(
        self,
        target: float,
        cost: Callable[[Outcome], float],
        tolerance: Callable[[float], float],
    ) -> float:
        """Returns the smallest number whose cost is not above the target.

        Args:
            target: the largest cost.
            cost: the cost of an outcome. It falls as the number rises.
            tolerance: the tolerance that a number stands for.
        """
        bisection = Bisection(target, 1.0, [])
        while not bisection.is_settled():
            number = bisection.next()
            outcome = self._try_tolerance(tolerance(number / FIRST_TOLERANCE))
            bisection.add(number, cost(outcome), {})
        return bisection.best()[0] / FIRST_TOLERANCE

    def _try_tolerance(self, tolerance: float) -> Outcome:
        """Runs the model with one tolerance on the images."""
        measured = self.measure(self.build_model(tolerance))
        mean = float(measured.spent.mean())
        self.progress(
            f"tolerance {tolerance:.3g}: {mean:.3f} of the operations on average, "
            f"{float(measured.spent.max()):.3f} at most, {measured.agreement:.1%} same answers"
        )
        self.outcomes[tolerance] = Outcome(mean, 1 - measured.agreement)
        return self.outcomes[tolerance]

    def _loosen_schedule(self, tolerance: float) -> Schedule:
        """Returns a keep rate for the schedule's blocks, never above what the schedule keeps."""
        shape, method = self.shape, self.method
        rate = Rate(1 / (1 + tolerance), self.max_schedule.decision_blocks(shape.depth))
        if self.goal.cap is None and self.goal.schedule is None:
            return rate
        size = (shape.entering, shape.prefix, shape.depth, method)
        pairs = zip(self.max_schedule.counts(*size), rate.counts(*size), strict=True)
        return Counts(tuple(min(pair) for pair in pairs), shape.entering, shape.prefix)

    def _method_at(self, tolerance: float) -> Method:
        """Returns the method with its threshold set to a tolerance."""
        threshold = self.method.tuned_threshold
        if threshold is None:
            return self.method
        changed = {threshold.setting: threshold.setting_at(tolerance)}
        return type(self.method)(**(method_settings(self.method) | changed))


def _check_task(task: CalibrationTask) -> None:
    """Refuses goals and settings that a threshold cannot use."""
    goal, config = task.goal, task.config
    if goal.tolerance is not None or task.resume:
        raise BadSchedule(
            "tolerance and resume are Patch Slimming's. A threshold is found for macs= or "
            "agreement=, in one go."
        )
    if (goal.macs is None) == (goal.agreement is None):
        raise BadSchedule(
            "Give one of macs (operations of an image on average, such as 0.6) and agreement (the "
            "share of answers that stay the same, such as 0.95)."
        )
    if goal.agreement is not None and not 0 < goal.agreement < 1:
        raise BadSchedule(f"agreement={goal.agreement}: a share between 0 and 1, such as 0.95.")
    if goal.cap is not None and goal.schedule is not None:
        raise BadSchedule("Give cap (a budget) or schedule (its counts), not both.")
    usual = PatchSlimmingConfig(images=config.images, batch=config.batch).to_json()
    unused = [name for name, value in config.to_json().items() if value != usual[name]]
    if unused:
        raise BadSetting(
            f"{', '.join(unused)}: settings of Patch Slimming's search. A threshold uses images "
            "and batch alone; leave the others out."
        )


def _cap_share(cap: float, dense: int) -> float:
    """Returns the cap as a share of the dense model's operations."""
    try:
        return macs_target(cap, dense) / dense
    except ImpossibleBudget as error:
        raise ImpossibleBudget(str(error).replace("macs=", "cap=")) from error
