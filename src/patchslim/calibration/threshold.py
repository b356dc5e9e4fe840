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

from patchslim.calibration.bisection import FIRST, Bisection
from patchslim.errors import BadSchedule, ImpossibleBudget, WrongInput
from patchslim.hosts._adapter import Adapter
from patchslim.measurement.score import divergence
from patchslim.methods._method import Reducer
from patchslim.model.check import check_class_token
from patchslim.model.model import SlimModel
from patchslim.schedules.budget import macs_target, plan
from patchslim.schedules.schedule import Counts, Rate, Schedule, Tail
from patchslim.tokens.shapes import dense_macs

LOOSE = 1.0  # tried first where the schedule is turned: half of the patches at each place
REACH = 1e6  # how far a tolerance may lie from what is usual

Say = Callable[[str], object]


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


def found(
    host: nn.Module,
    adapter: Adapter,
    reducer: Reducer,
    images: Sequence[Tensor],
    goal: Goal,
    say: Say,
) -> tuple[SlimModel, dict[str, Any]]:
    """The model whose threshold meets the goal on these images, and what they cost in it."""
    check_class_token(host, adapter, reducer)
    search = _Search(host, adapter, reducer, images, goal, say)
    tolerance = search.widest()
    model = search.model(tolerance)
    spent, told = search.run(model)
    knob = reducer.knob
    setting = None if knob is None else knob.setting
    record = {
        "threshold": {"setting": setting, "value": None if knob is None else knob.at(tolerance)},
        "settings": model.reducer.settings(),
        "spent": spread(spent),
        "cap": model.macs(search.size).total / search.dense,
        "agreement": told["agreement"],
        "kl": told["kl"],
        "tokens": spread(told["tokens"]),
        "images": len(spent),
        "schedule": model.schedule.to_json(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return model.eval(), plain


def _cap(cap: float, dense: int) -> float:
    """The cap as a share of the dense model's operations."""
    try:
        return macs_target(cap, dense) / dense
    except ImpossibleBudget as error:
        raise ImpossibleBudget(str(error).replace("macs=", "cap=")) from error


def spread(values: Tensor) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum of one number an image."""
    values = values.double()
    return {
        "mean": float(values.mean()),
        "p50": float(values.quantile(0.5)),
        "p99": float(values.quantile(0.99)),
        "max": float(values.max()),
    }


class Tried(NamedTuple):
    """What a tolerance gives: the mean share of operations, and of answers that change."""

    mean: float
    wrong: float


class _Search:
    """Candidates of one method on some images, until one meets the goal."""

    def __init__(
        self,
        host: nn.Module,
        adapter: Adapter,
        reducer: Reducer,
        images: Sequence[Tensor],
        goal: Goal,
        say: Say,
    ) -> None:
        self.host, self.adapter, self.reducer = host, adapter, reducer
        self.images, self.goal, self.say = images, goal, say
        self.seen: dict[float, Tried] = {}
        self.size = (images[0].shape[2], images[0].shape[3])
        reason = adapter.misfit(host, self.size, {})
        if reason is not None:
            raise WrongInput(f"Got images of {self.size[0]}x{self.size[1]} pixels: {reason}")
        self.shape = shape = adapter.shape(host, self.size)
        self.dense = dense_macs(shape).total
        self.tail: Tail = "full" if shape.read is None else "exact"
        target = None if goal.macs is None else macs_target(goal.macs, self.dense) / self.dense
        self.target = target
        cap = 1.0 if goal.cap is None else _cap(goal.cap, self.dense)
        if target is not None and cap < target:
            raise ImpossibleBudget(
                f"macs={goal.macs:g} on average is above the cap of {goal.cap:g}. The cap is what "
                "no image may exceed: give a larger one."
            )
        self.most = goal.schedule or plan(shape, self._at(0.5), macs=goal.cap, tail=self.tail)
        with torch.no_grad():
            self.answers = [adapter.logits(host(batch)).cpu() for batch in images]

    def widest(self) -> float:
        """The smallest tolerance that meets the budget, or the largest that keeps the answers."""
        knob = self.reducer.knob
        usual = LOOSE if knob is None else knob.first
        narrow, wide = usual / REACH, min(usual * REACH, math.inf if knob is None else knob.top)
        if self.target is None:
            wrong = 1 - float(self.goal.agreement or 0)
            if self.tried(narrow).wrong > wrong:
                raise ImpossibleBudget(
                    f"agreement={self.goal.agreement}: even where nothing joins but what the cap "
                    f"asks for, {1 - self.seen[narrow].wrong:.1%} of the answers stay. Ask for "
                    "less, or give a larger cap."
                )
            if self.tried(wide).wrong <= wrong:
                return wide
            found = self._bisected(wrong, lambda each: each.wrong, lambda tried: usual / tried)
            return usual / found
        if self.tried(wide).mean > self.target:
            name, settings = type(self.reducer).__name__, self.reducer.settings()
            floor = f", a smaller floor than {settings['floor']}" if "floor" in settings else ""
            raise ImpossibleBudget(
                f"macs={self.goal.macs:g}: with all that it can join, {name} "
                f"still spends {self.seen[wide].mean:.3f} on average here. Give more{floor}, or "
                "another method."
            )
        if self.tried(narrow).mean <= self.target:
            return narrow
        return usual * self._bisected(
            self.target, lambda each: each.mean, lambda tried: usual * tried
        )

    def _bisected(
        self,
        target: float,
        cost: Callable[[Tried], float],
        tolerance: Callable[[float], float],
    ) -> float:
        """The smallest number whose cost, which falls with it, is not above the target."""
        bisection = Bisection(target, 1.0, [])
        while not bisection.settled():
            number = bisection.next()
            bisection.add(number, cost(self.tried(tolerance(number / FIRST))), {})
        return bisection.best()[0] / FIRST

    def tried(self, tolerance: float) -> Tried:
        """What one tolerance gives on the images."""
        spent, told = self.run(self.model(tolerance))
        self.say(
            f"tolerance {tolerance:.3g}: {float(spent.mean()):.3f} of the operations on average, "
            f"{float(spent.max()):.3f} at most, {told['agreement']:.1%} same answers"
        )
        self.seen[tolerance] = Tried(float(spent.mean()), 1 - told["agreement"])
        return self.seen[tolerance]

    def model(self, tolerance: float) -> SlimModel:
        """The host slimmed by the method at one tolerance."""
        most = self.most
        if self.reducer.knob is None:  # the schedule is all that can be turned
            most = self._looser(tolerance)
        return SlimModel(self.host, self.adapter, self._at(tolerance), most, self.tail)

    def _looser(self, tolerance: float) -> Schedule:
        """A rate for the places of the schedule, never above what the schedule keeps."""
        shape, reducer = self.shape, self.reducer
        rate = Rate(1 / (1 + tolerance), self.most.places(shape.depth))
        if self.goal.cap is None and self.goal.schedule is None:
            return rate
        size = (shape.entering, shape.prefix, shape.depth, reducer)
        both = zip(self.most.counts(*size), rate.counts(*size), strict=True)
        return Counts(tuple(min(each) for each in both), shape.entering, shape.prefix)

    def run(self, model: SlimModel) -> tuple[Tensor, dict[str, Any]]:
        """What each image costs, as shares of the dense model's; tokens left, and answers."""
        spent, tokens, same, apart = [], [], [], []
        with torch.no_grad():
            for batch, dense in zip(self.images, self.answers, strict=True):
                output, costs = model.answer(batch)
                logits = self.adapter.logits(output).cpu()
                spent += [each.total / self.dense for each in costs]
                tokens += [each.rows[:-1][-1:] or each.rows for each in costs]
                same.append(logits.argmax(dim=-1) == dense.argmax(dim=-1))
                apart.append(divergence(dense.flatten(1), logits.flatten(1)))
        told = {
            "agreement": float(torch.cat(same).double().mean()),
            "kl": float(torch.cat(apart).mean()),
            "tokens": torch.tensor(tokens).flatten(),  # that enter the last block
        }
        return torch.tensor(spent, dtype=torch.float64), told

    def _at(self, tolerance: float) -> Reducer:
        """The method with its knob turned to a tolerance."""
        knob = self.reducer.knob
        if knob is None:
            return self.reducer
        settings = self.reducer.settings() | {knob.setting: knob.at(tolerance)}
        return type(self.reducer)(**settings)
