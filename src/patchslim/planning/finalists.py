"""Chooses the few methods that are worth a search, by what they lose at a time that they reach.

A search takes a minute for each method. Here, each method is judged once on few images, by its own
rule, at as many operations as the target in time leaves beside its decisions. One decision is timed
for that; a whole table is not.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from patchslim.methods._method import Method
from patchslim.methods._registry import method_label
from patchslim.model.model import SlimModel
from patchslim.model.plan import Plan, plan_schedule
from patchslim.planning.judging import Jury
from patchslim.planning.method_search import find_largest_rule
from patchslim.runs.progress import Progress
from patchslim.schedules.schedule import Constant, Tail
from patchslim.tokens.shapes import dense_macs

FINALISTS = 2  # methods that lose least; the one that decides fastest is always searched, too
USUAL_SHARE = 0.65  # of the dense time, where the target is a divergence
MOST_IMAGES, FEWEST_IMAGES = 48, 8
SECONDS = 40.0  # for the answers of all methods


def choose_finalists(
    untouched: SlimModel,
    models: Sequence[SlimModel],
    decisions: Sequence[float],
    images: Tensor,
    share: float,
    show: Progress,
) -> list[SlimModel]:
    """Returns the models whose methods lose least at a share of the dense time, best first.

    The method that decides fastest is among them: where time is short, it alone may get there.

    Args:
        untouched: the host with nothing removed.
        models: the same with each method that could be searched.
        decisions: what one decision of each takes, as a share of the dense time; 0 for all if the
            share is one of operations.
        images: to judge answers on; the first few are taken.
        share: the target.
        show: is called with one line of text at a time.
    """
    jury = Jury(untouched, images[: _count_images(untouched, images, len(models))])
    losses = []
    for model, decision in zip(models, decisions, strict=True):
        show(f"{method_label(model.method)}: a first look")
        plan = find_largest_rule(model, functools.partial(_fits, share, decision))
        slimmed = None if plan is None else SlimModel(untouched.host, plan).eval()
        losses.append(math.inf if slimmed is None else jury.judge(slimmed).kl.value)
    ranked = sorted(range(len(models)), key=losses.__getitem__)
    chosen = ranked[:FINALISTS]
    fastest = min(ranked, key=decisions.__getitem__)
    return [models[each] for each in dict.fromkeys([*chosen, fastest])]


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
