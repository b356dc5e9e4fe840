"""The one number of an adaptive method: how far it goes, so that images cost a budget on average.

Every candidate is run on the images; what each of them costs, and how often the answer stays the
dense model's, is counted, not estimated. It does not know which method it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.adapter import Adapter
from patchslim.bisection import FIRST, Bisection
from patchslim.budget import macs_target, plan
from patchslim.cost import dense_macs
from patchslim.errors import BadSchedule, ImpossibleBudget
from patchslim.model import SlimModel
from patchslim.reducer import Reducer
from patchslim.schedule import Rate, Schedule, Tail
from patchslim.score import divergence
from patchslim.slim import check_class_token

LOOSE = 1.0  # tried first where the schedule is turned: half of the patches at each place

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
        "cap": model.macs().total / search.dense,
        "agreement": told["agreement"],
        "kl": told["kl"],
        "tokens": spread(told["tokens"]),
        "images": len(spent),
        "schedule": model.schedule.to_json(),
    }
    return model.eval(), record


def spread(values: Tensor) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum of one number an image."""
    values = values.double()
    return {
        "mean": float(values.mean()),
        "p50": float(values.quantile(0.5)),
        "p99": float(values.quantile(0.99)),
        "max": float(values.max()),
    }


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
        shape = adapter.shape(host, (images[0].shape[2], images[0].shape[3]))
        self.dense = dense_macs(shape).total
        self.tail: Tail = "full" if shape.read is None else "exact"
        target = None if goal.macs is None else macs_target(goal.macs, self.dense) / self.dense
        self.target = target
        if target is not None and goal.cap is not None:
            most = macs_target(goal.cap, self.dense) / self.dense
            if most < target:
                raise ImpossibleBudget(
                    f"macs={goal.macs:g} on average is above the cap of {goal.cap:g}. The cap is "
                    "what no image may exceed: give a larger one."
                )
        self.most = goal.schedule or plan(shape, self._at(0.5), macs=goal.cap, tail=self.tail)
        with torch.no_grad():
            self.answers = [adapter.logits(host(batch)).cpu() for batch in images]

    def widest(self) -> float:
        """The smallest tolerance that meets the budget, or the largest that keeps the answers."""
        if self.target is not None:
            return self._meet(self.target, lambda spent, _: float(spent.mean()), inverse=False)
        wrong = 1 - float(self.goal.agreement or 0)
        return self._meet(wrong, lambda _, told: 1 - float(told["agreement"]), inverse=True)

    def _meet(
        self,
        target: float,
        cost: Callable[[Tensor, dict[str, Any]], float],
        *,
        inverse: bool,
    ) -> float:
        """The tolerance, or its inverse, with which a falling cost is just not above the target."""
        knob = self.reducer.knob
        top = math.inf if knob is None else knob.top
        unit = (LOOSE if knob is None else knob.first) / (1 / FIRST if inverse else FIRST)
        bisection, means = Bisection(target, 1.0, []), list[float]()
        while not bisection.settled():
            tried = bisection.next()
            tolerance = min(unit / tried if inverse else unit * tried, top)
            spent, told = self.run(self.model(tolerance))
            got = cost(spent, told)
            self.say(
                f"tolerance {tolerance:.3g}: {float(spent.mean()):.3f} of the operations on "
                f"average, {float(spent.max()):.3f} at most, {told['agreement']:.1%} same answers"
            )
            if not inverse and tolerance == top and got > target:
                raise ImpossibleBudget(
                    f"macs={self.goal.macs:g}: with all that it can join, {self._name()} still "
                    f"spends {got:.3f} on average here. Give more, or another method or floor."
                )
            bisection.add(tried, got, {})
            same = float(spent.mean()) in means or (inverse and tolerance == top)
            if got <= target and same:
                break  # it has no more to join, or to leave
            means.append(float(spent.mean()))
        best, _ = bisection.best()
        return min(unit / best if inverse else unit * best, top)

    def model(self, tolerance: float) -> SlimModel:
        """The host slimmed by the method at one tolerance."""
        most = self.most
        if self.reducer.knob is None:  # the schedule is all that can be turned
            places = most.places(self.adapter.shape(self.host).depth)
            most = Rate(1 / (1 + tolerance), places)
        return SlimModel(self.host, self.adapter, self._at(tolerance), most, self.tail)

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

    def _name(self) -> str:
        return type(self.reducer).__name__
