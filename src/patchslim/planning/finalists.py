"""Chooses the few methods that are worth a search, by what they lose at a time that they reach.

A search takes minutes for each method. So all are judged once on few images, by their own rule, at
as many operations as the target is a share of the dense model. Of the best, one decision is timed,
and they are judged again at as many operations as the target leaves beside their decisions.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from patchslim.methods._method import Method
from patchslim.model.model import SlimModel
from patchslim.model.plan import Plan, plan_schedule
from patchslim.planning.judging import Jury
from patchslim.planning.method_search import find_largest_rule, find_rules
from patchslim.runs.progress import Progress
from patchslim.schedules.schedule import Constant, Tail
from patchslim.tokens.shapes import dense_macs

CONTENDERS = 5  # methods whose decisions are timed, besides the one that computes least for them
FINALISTS = 2  # methods that are searched
USUAL_SHARE = 0.65  # of the dense time, where the target is a divergence
MOST_IMAGES, FEWEST_IMAGES = 48, 8
SECONDS = 40.0  # for the answers of all methods


def choose_contenders(
    untouched: SlimModel,
    models: Sequence[SlimModel],
    images: Tensor,
    share: float,
    show: Progress,
) -> list[SlimModel]:
    """Returns the models that lose least at a share of the operations, best first.

    The method whose decisions need fewest operations is the last: where time is short, it alone
    may get there.

    Args:
        untouched: the host with nothing removed.
        models: the same with each method that could be searched.
        images: to judge answers on; the first few are taken.
        share: the target.
        show: is called with one line of text at a time.
    """
    plans = [find_largest_rule(model, functools.partial(_fits, share, 0.0)) for model in models]
    losses = _judge_plans(untouched, plans, images, show)
    ranked = sorted(range(len(models)), key=losses.__getitem__)
    least = min(ranked, key=lambda each: _own_work(plans[each]))
    return [models[each] for each in dict.fromkeys([*ranked[:CONTENDERS], least])]


def choose_finalists(
    untouched: SlimModel,
    models: Sequence[SlimModel],
    decisions: Sequence[float],
    images: Tensor,
    share: float,
    show: Progress,
) -> list[SlimModel]:
    """Returns the models whose methods lose least at a share of the dense time, best first.

    After them comes the one of the others that decides fastest: it may get where they do not. If
    none seems to get there, it is the only one.

    Args:
        untouched: the host with nothing removed.
        models: the same with each method that could be searched.
        decisions: what one decision of each takes, as a share of the dense time.
        images: to judge answers on; the first few are taken.
        share: the target.
        show: is called with one line of text at a time.
    """
    plans: list[Plan | None] = []
    of_model: list[int] = []
    for number, (model, decision) in enumerate(zip(models, decisions, strict=True)):
        found = [plan for _, plan in find_rules(model, functools.partial(_fits, share, decision))]
        plans += found or [None]
        of_model += [number] * max(1, len(found))
    losses = [math.inf] * len(models)
    for number, loss in zip(of_model, _judge_plans(untouched, plans, images, show), strict=True):
        losses[number] = min(losses[number], loss)
    ranked = sorted(range(len(models)), key=losses.__getitem__)
    chosen = [each for each in ranked[:FINALISTS] if losses[each] < math.inf]
    others = [each for each in ranked if each not in chosen]
    chosen += sorted(others, key=decisions.__getitem__)[:1]
    return [models[each] for each in chosen]


def _judge_plans(
    untouched: SlimModel, plans: Sequence[Plan | None], images: Tensor, show: Progress
) -> list[float]:
    """Returns the mean KL divergence of each plan on the first images; infinite for no plan."""
    jury = Jury(untouched, images[: _count_images(untouched, images, len(plans))])
    losses = []
    for number, plan in enumerate(plans, 1):
        show(f"a first look at schedule {number} of {len(plans)}")
        slimmed = None if plan is None else SlimModel(untouched.host, plan).eval()
        losses.append(math.inf if slimmed is None else jury.judge(slimmed).kl.value)
    return losses


def _own_work(plan: Plan | None) -> float:
    """Returns the operations that the decisions of a plan need."""
    return math.inf if plan is None else float(plan.cost.choosing)


def _fits(share: float, decision: float, plan: Plan) -> bool:
    """Tells whether a plan is guessed to take at most a share of the dense time."""
    return guess_share(plan, decision) <= share


def guess_share(plan: Plan, decision: float) -> float:
    """Guesses the share of the dense time that a plan takes: its operations and its decisions.

    A decision among fewer patches is taken to be faster by as much.
    """
    patches = plan.shape.entering - plan.shape.prefix
    decided = [plan.steps[block].entering - plan.shape.prefix for block in plan.decision_blocks]
    operations = plan.cost.total / dense_macs(plan.shape).total
    return operations + decision * sum(decided) / patches


def slim_untouched(untouched: SlimModel, method: Method) -> SlimModel:
    """Returns the host with a method that removes nothing yet."""
    host, plan = untouched.host, untouched.plan
    tail: Tail = "full" if plan.shape.read is None else "exact"
    return SlimModel(host, plan_schedule(host, plan.adapter, method, Constant(0), tail)).eval()


def _count_images(untouched: SlimModel, images: Tensor, methods: int) -> int:
    """Returns on how many images all methods can be judged in the time for it."""
    one = images[:1]
    with torch.inference_mode():
        untouched(one)
        began = time.perf_counter()
        untouched(one)
        taken = time.perf_counter() - began
    return max(FEWEST_IMAGES, min(MOST_IMAGES, int(SECONDS / (methods * taken))))
