"""Schedules of one method for a limit on time or operations: searched, and by its own rule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from patchslim.errors import BadSchedule, PatchslimError
from patchslim.methods import LearnedMethod
from patchslim.methods._method import Method, Placement, remembers
from patchslim.methods._registry import make_method, method_names
from patchslim.model.model import SlimModel
from patchslim.model.plan import Plan, check_needs, plan_schedule
from patchslim.planning.damage import Damage
from patchslim.planning.latency_table import LatencyTable, SelfCheck
from patchslim.planning.search import Table, find_levels, least_cost
from patchslim.schedules.blocks import later_blocks, stage_blocks
from patchslim.schedules.budget import schedule_for_macs
from patchslim.schedules.macs import block_flow
from patchslim.schedules.schedule import Counts, Schedule
from patchslim.tokens.shapes import HostShape, block_macs, dense_macs

STEPS = 48  # levels that the patches of an image are divided into
BISECTIONS = 10  # of the budget of a method's own rule
MANY = 1000  # patches, of which a method that removes some can remove some at once
LEAST_SPREAD = 0.1  # of the sums that a line is fitted to
LEAST_SLOPE = 0.5  # below it, times are noise
NOT_SEARCHED = ("identity", "random")  # remove nothing, or look at nothing


class Correction(NamedTuple):
    """A line from sums over blocks to times of whole schedules: `start` + `slope` times the sum.

    On a runtime, a block that was exported by itself reads and writes what blocks of a whole graph
    hand on in its own form, so that sums are off by about as much for all schedules.
    """

    start: float
    slope: float

    def of_sum(self, total: float) -> float:
        """Returns the time of a schedule whose blocks take `total` by themselves."""
        return self.start + self.slope * total

    def sum_for(self, share: float) -> float:
        """Returns what the blocks of a schedule may take by themselves."""
        return (share - self.start) / self.slope


def fit_correction(checks: Sequence[SelfCheck]) -> Correction:
    """Fits the line to whole schedules that were timed; one of them gives a ratio alone."""
    sums = np.array([each.predicted for each in checks])
    times = np.array([each.measured for each in checks])
    if len(checks) > 1 and np.ptp(sums) > LEAST_SPREAD:
        slope, start = np.polyfit(sums, times, 1)
        if slope > LEAST_SLOPE:
            return Correction(float(start), float(slope))
    return Correction(0.0, float(np.median(times / sums)) if len(checks) else 1.0)


@dataclass(frozen=True)
class MethodSearch:
    """All that is known of one method on this host and device.

    Attributes:
        model: the host with the method.
        table: how long its blocks take.
        damage: what its cuts change.
    """

    model: SlimModel
    table: LatencyTable
    damage: Damage

    @cached_property
    def correction(self) -> Correction:
        """What whole schedules took, as a line over the sums of their blocks."""
        return fit_correction(self.table.checks)

    @property
    def levels(self) -> list[int]:
        """The numbers of patches that may be left after a block."""
        patches = self.table.patches
        step = max(1, round(patches / STEPS))
        return [*range(patches, self.table.fewest - 1, -step)]

    @cached_property
    def times(self) -> Table:
        """The time of each step between levels in each block."""
        return self.table.costs(self.levels, self.model.method)

    def predict(self, plan: Plan) -> float:
        """Returns the time of a plan as a share of the dense model's."""
        return self.correction.of_sum(self.table.predict(plan.steps, plan.shape.prefix))

    def shortest_time(self) -> float:
        """Returns the least time of any schedule, as a share of the dense model's."""
        return self.correction.of_sum(self.table.rest + least_cost(self.times))

    def plans_for_time(self, share: float) -> Iterator[tuple[str, Plan]]:
        """Yields plans that take at most a share of the dense time, and how each was found."""
        limit = self.correction.sum_for(share) - self.table.rest
        yield from self._searched(self.times, limit)

        yield from find_rules(self.model, lambda plan: self.predict(plan) <= share)

    def plans_for_macs(self, target: float) -> Iterator[tuple[str, Plan]]:
        """Yields plans of at most as many multiply-adds an image, and how each was found."""
        shape = self.model.plan.shape
        costs = _macs_table(shape, self.model.method, self.levels, self.model.plan.tail == "exact")
        dense = dense_macs(shape)
        yield from self._searched(costs, target - dense.embed - dense.head)

        best = find_largest_rule(self.model, lambda plan: plan.cost.total <= target)
        if best is not None:
            yield "rule", best

    def _searched(self, costs: Table, limit: float) -> Iterator[tuple[str, Plan]]:
        """Yields the plan that the damage curve likes best."""
        levels = self.levels
        path = find_levels(costs, self.damage.table(levels, len(costs)), limit)
        if path is not None:
            shape = self.model.plan.shape
            kept = tuple(levels[each] + shape.prefix for each in path)
            yield "search", _replan(self.model, Counts(kept, shape.entering, shape.prefix))


def find_rules(model: SlimModel, fits: Callable[[Plan], bool]) -> Iterator[tuple[str, Plan]]:
    """Yields the plans of a method's own rule, there and in fewer blocks, that just fit.

    Deciding takes time, so that fewer decisions may leave more patches in the same time.
    """
    depth, usual = model.plan.shape.depth, model.method.placement
    places: list[tuple[int, ...] | None] = [None]
    if usual in (Placement.EVERY_BLOCK, Placement.LATER):
        places += [later_blocks(depth)[::2], stage_blocks(depth)]
    for at in dict.fromkeys(places):
        best = find_largest_rule(model, fits, at)
        if best is not None:
            yield "rule" if at is None else f"rule at {', '.join(map(str, at))}", best


def find_largest_rule(
    model: SlimModel, fits: Callable[[Plan], bool], at: tuple[int, ...] | None = None
) -> Plan | None:
    """Returns the plan of a method's own rule that removes the least and fits, if any does.

    With `at`, the method decides in these blocks.
    """
    plan = model.plan
    best = None
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        with contextlib.suppress(BadSchedule):
            rule = schedule_for_macs(plan.shape, model.method, middle, tail=plan.tail, at=at)
            made = _replan(model, rule)
            if fits(made):
                best, low = made, middle
                continue
            high = middle
            continue
        low = middle  # too few operations for this method
    return best


def _replan(model: SlimModel, schedule: Schedule) -> Plan:
    """Returns the plan of the same method with another schedule."""
    plan = model.plan
    return plan_schedule(model.host, plan.adapter, model.method, schedule, plan.tail)


def plannable_methods(model: SlimModel) -> list[Method]:
    """Makes every method that needs no training and can be planned for this host."""
    made = [make_method(name, {}) for name in method_names() if name not in NOT_SEARCHED]
    return [method for method in made if find_obstacle(model, method) is None]


def find_obstacle(model: SlimModel, method: Method) -> str | None:
    """Says why a method cannot be planned for on a host, or None."""
    if method.adaptive:
        return "its images keep different numbers of tokens; calibrate() finds its threshold"
    if method.defers or remembers(method):
        return "what a block takes depends on the blocks before it"
    if isinstance(method, LearnedMethod) and method.missing is not None:
        return "it has to be trained or calibrated first"
    if method.fewest(MANY) == MANY:
        return "it removes nothing"
    patches = model.plan.shape.entering - model.plan.shape.prefix
    try:
        check_needs(model.plan.adapter.describe(model.host), method)
        method.check_step(1, patches, patches - 1)
    except PatchslimError as error:
        return str(error)
    return None


def _macs_table(shape: HostShape, method: Method, levels: list[int], tail: bool) -> Table:  # noqa: FBT001
    """Counts the multiply-adds of each step between levels in each block."""
    made = np.full((shape.depth, len(levels), len(levels)), np.inf)
    for block in range(shape.depth):
        read = shape.read if tail and block == shape.depth - 1 else None
        for i, entering in enumerate(levels):
            for j, left in enumerate(levels[i:], i):
                if i != j and (read is not None or left < method.fewest(entering)):
                    continue
                flow = block_flow(method, entering + shape.prefix, left + shape.prefix, read)
                made[block, i, j] = block_macs(shape.blocks[block], flow)
    return made
