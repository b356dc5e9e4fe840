"""The one number of an adaptive method: how far it goes, so that images cost a budget on average.

Every candidate is run on the images; what each of them costs, and how often the answer stays the
dense model's, is counted, not estimated. It does not know which method it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patchslim.calibration.bisection import FIRST_TOLERANCE, Bisection
from patchslim.errors import BadSchedule, ImpossibleBudget, WrongInput
from patchslim.hosts._adapter import Adapter
from patchslim.measurement.score import kl_divergence
from patchslim.methods._method import Method, method_settings
from patchslim.model.model import SlimModel
from patchslim.model.plan import check_class_token, plan_schedule
from patchslim.schedules.budget import macs_target, make_schedule
from patchslim.schedules.schedule import Counts, Rate, Schedule, Tail
from patchslim.tokens.shapes import dense_macs

DEFAULT_TOLERANCE = (
    1.0  # tried first where the schedule is turned: half of the patches at each place
)
SEARCH_RANGE = 1e6  # how far a tolerance may lie from what is usual

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Goal:
    """What is asked of a threshold: a mean budget or an agreement, below a cap.

    Attributes:
        macs: operations of an image on average, as a share of the host's or as a number.
        agreement: the share of images whose answer is to stay the dense model's.
        cap: the most that any image may cost, in the words of `macs`.
        schedule: the most tokens that any image may keep after each block, instead of a cap.
    """

    macs: float | None = None
    agreement: float | None = None
    cap: float | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        for name in ("macs", "agreement", "cap"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise BadSchedule(f"{name}={value!r}: give a number, such as 0.8.")
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise BadSchedule(
                f"schedule={self.schedule!r}: give a Schedule, such as Schedule.load(path)."
            )
        if (self.macs is None) == (self.agreement is None):
            raise BadSchedule(
                "Give one of macs (operations of an image on average, such as 0.6) and agreement "
                "(the share of answers that stay the same, such as 0.95)."
            )
        if self.agreement is not None and not 0 < self.agreement < 1:
            raise BadSchedule(f"agreement={self.agreement}: a share between 0 and 1, such as 0.95.")
        if self.cap is not None and self.schedule is not None:
            raise BadSchedule("Give cap (a budget) or schedule (its counts), not both.")


def find_threshold(
    host: nn.Module,
    adapter: Adapter,
    method: Method,
    images: Sequence[Tensor],
    goal: Goal,
    say: Progress,
) -> tuple[SlimModel, dict[str, Any]]:
    """The model whose threshold meets the goal on these images, and what they cost in it."""
    check_class_token(adapter.describe(host), method)
    search = _ThresholdSearch(host, adapter, method, images, goal, say)
    tolerance = search.find_tolerance()
    model = search.model(tolerance)
    spent, told = search.measure(model)
    knob = method.tuned_threshold
    setting = None if knob is None else knob.setting
    record = {
        "threshold": {
            "setting": setting,
            "value": None if knob is None else knob.setting_at(tolerance),
        },
        "settings": method_settings(model.method),
        "spent": summarize(spent),
        "cap": model.macs(search.size).total / search.dense,
        "agreement": told["agreement"],
        "kl": told["kl"],
        "tokens": summarize(told["tokens"]),
        "images": len(spent),
        "schedule": model.schedule.to_json(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return model.eval(), plain


def _cap_share(cap: float, dense: int) -> float:
    """The cap as a share of the dense model's operations."""
    try:
        return macs_target(cap, dense) / dense
    except ImpossibleBudget as error:
        raise ImpossibleBudget(str(error).replace("macs=", "cap=")) from error


def summarize(values: Tensor) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum of one number an image."""
    values = values.double()
    return {
        "mean": float(values.mean()),
        "p50": float(values.quantile(0.5)),
        "p99": float(values.quantile(0.99)),
        "max": float(values.max()),
    }


class Outcome(NamedTuple):
    """What a tolerance gives: the mean share of operations, and of answers that change."""

    mean: float
    wrong: float


class _ThresholdSearch:
    """Candidates of one method on some images, until one meets the goal."""

    def __init__(
        self,
        host: nn.Module,
        adapter: Adapter,
        method: Method,
        images: Sequence[Tensor],
        goal: Goal,
        say: Progress,
    ) -> None:
        self.host, self.adapter, self.method = host, adapter, method
        self.images, self.goal, self.say = images, goal, say
        self.outcomes: dict[float, Outcome] = {}
        self.size = (images[0].shape[2], images[0].shape[3])
        reason = adapter.size_mismatch(host, self.size, {})
        if reason is not None:
            raise WrongInput(f"Got images of {self.size[0]}x{self.size[1]} pixels: {reason}")
        self.shape = shape = adapter.shape(host, self.size)
        self.dense = dense_macs(shape).total
        self.tail: Tail = "full" if shape.read is None else "exact"
        target = None if goal.macs is None else macs_target(goal.macs, self.dense) / self.dense
        self.target = target
        cap = 1.0 if goal.cap is None else _cap_share(goal.cap, self.dense)
        if target is not None and cap < target:
            raise ImpossibleBudget(
                f"macs={goal.macs:g} on average is above the cap of {goal.cap:g}. The cap is what "
                "no image may exceed: give a larger one."
            )
        self.max_schedule = goal.schedule or make_schedule(
            shape, self._method_at(0.5), macs=goal.cap, tail=self.tail
        )
        with torch.no_grad():
            self.answers = [adapter.logits(host(batch)).cpu() for batch in images]

    def find_tolerance(self) -> float:
        """The smallest tolerance that meets the budget, or the largest that keeps the answers."""
        knob = self.method.tuned_threshold
        usual = DEFAULT_TOLERANCE if knob is None else knob.first
        narrow, wide = (
            usual / SEARCH_RANGE,
            min(usual * SEARCH_RANGE, math.inf if knob is None else knob.top),
        )
        if self.target is None:
            wrong = 1 - float(self.goal.agreement or 0)
            if self.try_tolerance(narrow).wrong > wrong:
                raise ImpossibleBudget(
                    f"agreement={self.goal.agreement}: even where nothing joins but what the cap "
                    f"asks for, {1 - self.outcomes[narrow].wrong:.1%} of the answers stay. Ask for "
                    "less, or give a larger cap."
                )
            if self.try_tolerance(wide).wrong <= wrong:
                return wide
            found = self._bisect(wrong, lambda each: each.wrong, lambda tried: usual / tried)
            return usual / found
        if self.try_tolerance(wide).mean > self.target:
            name, settings = type(self.method).__name__, method_settings(self.method)
            floor = f", a smaller floor than {settings['floor']}" if "floor" in settings else ""
            raise ImpossibleBudget(
                f"macs={self.goal.macs:g}: with all that it can join, {name} "
                f"still spends {self.outcomes[wide].mean:.3f} on average here. Give "
                f"more{floor}, or "
                "another method."
            )
        if self.try_tolerance(narrow).mean <= self.target:
            return narrow
        return usual * self._bisect(
            self.target, lambda each: each.mean, lambda tried: usual * tried
        )

    def _bisect(
        self,
        target: float,
        cost: Callable[[Outcome], float],
        tolerance: Callable[[float], float],
    ) -> float:
        """The smallest number whose cost, which falls with it, is not above the target."""
        bisection = Bisection(target, 1.0, [])
        while not bisection.is_settled():
            number = bisection.next()
            bisection.add(number, cost(self.try_tolerance(tolerance(number / FIRST_TOLERANCE))), {})
        return bisection.best()[0] / FIRST_TOLERANCE

    def try_tolerance(self, tolerance: float) -> Outcome:
        """What one tolerance gives on the images."""
        spent, told = self.measure(self.model(tolerance))
        self.say(
            f"tolerance {tolerance:.3g}: {float(spent.mean()):.3f} of the operations on average, "
            f"{float(spent.max()):.3f} at most, {told['agreement']:.1%} same answers"
        )
        self.outcomes[tolerance] = Outcome(float(spent.mean()), 1 - told["agreement"])
        return self.outcomes[tolerance]

    def model(self, tolerance: float) -> SlimModel:
        """The host slimmed by the method at one tolerance."""
        most = self.max_schedule
        if self.method.tuned_threshold is None:  # the schedule is all that can be turned
            most = self._loosen_schedule(tolerance)
        return SlimModel(
            self.host,
            plan_schedule(self.host, self.adapter, self._method_at(tolerance), most, self.tail),
        )

    def _loosen_schedule(self, tolerance: float) -> Schedule:
        """A rate for the places of the schedule, never above what the schedule keeps."""
        shape, method = self.shape, self.method
        rate = Rate(1 / (1 + tolerance), self.max_schedule.decision_blocks(shape.depth))
        if self.goal.cap is None and self.goal.schedule is None:
            return rate
        size = (shape.entering, shape.prefix, shape.depth, method)
        both = zip(self.max_schedule.counts(*size), rate.counts(*size), strict=True)
        return Counts(tuple(min(each) for each in both), shape.entering, shape.prefix)

    def measure(self, model: SlimModel) -> tuple[Tensor, dict[str, Any]]:
        """What each image costs, as shares of the dense model's; tokens left, and answers."""
        spent, tokens, same, apart = [], [], [], []
        with torch.no_grad():
            for batch, dense in zip(self.images, self.answers, strict=True):
                output, costs = model.forward_with_costs(batch)
                logits = self.adapter.logits(output).cpu()
                spent += [each.total / self.dense for each in costs]
                tokens += [each.rows[:-1][-1:] or each.rows for each in costs]
                same.append(logits.argmax(dim=-1) == dense.argmax(dim=-1))
                apart.append(kl_divergence(dense.flatten(1), logits.flatten(1)))
        told = {
            "agreement": float(torch.cat(same).double().mean()),
            "kl": float(torch.cat(apart).mean()),
            "tokens": torch.tensor(tokens).flatten(),  # that enter the last block
        }
        return torch.tensor(spent, dtype=torch.float64), told

    def _method_at(self, tolerance: float) -> Method:
        """The method with its knob turned to a tolerance."""
        knob = self.method.tuned_threshold
        if knob is None:
            return self.method
        settings = method_settings(self.method) | {knob.setting: knob.setting_at(tolerance)}
        return type(self.method)(**settings)
