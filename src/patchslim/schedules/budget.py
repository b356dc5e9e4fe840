"""Makes a schedule from what a user asks for: macs, keep, r, keep_rate or a saved file.

Works on shapes and counts alone. Knows no tensors and no host library.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from patchslim.errors import BadSchedule, ImpossibleBudget, UnknownName
from patchslim.methods._method import Method, Placement, always_decides
from patchslim.schedules.blocks import later_blocks, stage_blocks, unit_blocks
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import (
    Constant,
    Counts,
    Rate,
    Removed,
    Schedule,
    Tail,
    is_list,
    round_half_up,
)
from patchslim.settings import Range, check_value, show_value
from patchslim.tokens.shapes import HostShape, dense_macs

MIN_BLOCK_RATE = 0.7  # with a lower rate in every block, it is better to begin earlier


class Budget(TypedDict, total=False):
    """How much to keep: one of macs, keep, r, keep_rate. `at` names the blocks that remove."""

    macs: float | None
    keep: float | Sequence[int] | None
    r: float | Sequence[int] | tuple[int, float] | None
    keep_rate: float | None
    at: Sequence[int] | None


def make_schedule(
    shape: HostShape,
    method: Method,
    schedule: Schedule | str | Path | None = None,
    *,
    tail: Tail = "full",
    **budget: Unpack[Budget],
) -> Schedule:
    """Makes the schedule for a host and a method, from a budget, a saved file or nothing."""
    _check_one_budget(budget, schedule)
    if schedule is not None:
        return _open_schedule(schedule)
    given = [name for name, value in budget.items() if value is not None]
    if method.own_counts and given:
        raise BadSchedule(
            f"{method!r} brings the schedule that was published with it, and {', '.join(given)} "
            "asks for another. Leave one of them out."
        )
    macs, keep, r = budget.get("macs"), budget.get("keep"), budget.get("r")
    rate, named = budget.get("keep_rate"), budget.get("at")
    at = None if named is None else Rate(1.0, named).at  # type: ignore[arg-type]  # it checks them
    if at is not None and (is_list(r) or is_list(keep)):
        raise BadSchedule(
            f"at={at} goes with one number: keep_rate, macs, r or a share to keep. A list names "
            "every block."
        )
    if macs is not None:
        return schedule_for_macs(shape, method, macs, tail=tail, at=at)
    if keep is not None:
        return _schedule_from_keep(shape, method, keep, at)
    if r is not None:
        return _schedule_from_r(shape, r, at)
    if rate is not None:
        return Rate(rate, _decision_blocks(method, shape, at))
    return _schedule_without_budget(shape, method, at)


def _open_schedule(schedule: Schedule | str | Path) -> Schedule:
    """The schedule that was given, itself or as the path of a saved one."""
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, str | Path):
        raise BadSchedule(
            f"schedule={show_value(schedule)}: give a Schedule, or the path of a saved one."
        )
    return Schedule.load(schedule)


def _schedule_without_budget(
    shape: HostShape, method: Method, at: tuple[int, ...] | None
) -> Schedule:
    """The schedule of a method that brings one, decides itself, or removes nothing."""
    if method.own_counts:
        return Counts(method.own_counts, method.own_counts[0], shape.prefix)
    if method.adaptive:
        if at is None and method.placement is Placement.EVERY_BLOCK:
            return Constant(0)
        return Rate(1.0, _decision_blocks(method, shape, at))
    if method.fewest(2) == 2:
        return Constant(0)
    raise BadSchedule(
        "How much is to be kept? Give macs=0.6, keep=0.5, r=13 or keep_rate=0.7 "
        "(on the command line --macs 0.6, and so on)."
    )


def schedule_for_macs(
    shape: HostShape,
    method: Method,
    macs: float,
    *,
    tail: Tail,
    at: tuple[int, ...] | None = None,
) -> Schedule:
    """Finds the schedule, of the method's usual kind, with the largest cost not above `macs`.

    The cost falls in steps as the one number of the rule changes; bisection finds the right step.
    """
    if at is None and method.placement is Placement.LATER:
        rule = _start_early_enough(shape, method, macs, tail=tail)
    else:
        rule = _largest_schedule(shape, method, macs, tail=tail, at=at)
    counts = scheduled_counts(rule, shape, method)
    spelled = Counts(counts, shape.entering, shape.prefix)
    if method.defers:
        return rule  # a rate of all patches, in whatever blocks
    if always_decides(method) and spelled.decision_blocks(shape.depth) != rule.decision_blocks(
        shape.depth
    ):
        return rule  # the method also chooses in blocks where the count does not change
    return spelled


def _start_early_enough(shape: HostShape, method: Method, macs: float, *, tail: Tail) -> Schedule:
    """Finds a rate for every block from a quarter of the depth on, or from earlier if too low."""
    for begin in range(shape.depth // 4, 1, -1):
        places = _avoid_strides(shape, later_blocks(shape.depth, begin))
        with contextlib.suppress(ImpossibleBudget):
            rule = _largest_schedule(shape, method, macs, tail=tail, at=places)
            if isinstance(rule, Rate) and rule.rate >= MIN_BLOCK_RATE:
                return rule
    places = _avoid_strides(shape, later_blocks(shape.depth, 1))
    return _largest_schedule(shape, method, macs, tail=tail, at=places)


def _largest_schedule(
    shape: HostShape,
    method: Method,
    macs: float,
    *,
    tail: Tail,
    at: tuple[int, ...] | None,
) -> Schedule:
    """Finds the rule of the largest cost not above `macs`, in the blocks `at` or the usual."""
    dense = dense_macs(shape).total
    target = macs_target(macs, dense)
    spread = Placement.STAGES if at is not None else method.placement
    places = _decision_blocks(method, shape, at)
    most = float(shape.entering - shape.prefix)

    def rule(cut: float) -> Schedule:
        if spread is Placement.EVERY_BLOCK:
            return Constant(cut * most)
        return Rate(max(1.0 - cut, 1e-9), places)

    def cost(cut: float) -> int:
        made = rule(cut)
        named = blocks_always_decided(method, made, shape.depth)
        counts = scheduled_counts(made, shape, method)
        return slim_macs(shape, method, counts, tail=tail == "exact", named=named).total

    if cost(0.0) <= target:
        return rule(0.0)
    low, high = 0.0, 1.0
    if cost(high) > target:
        least = math.ceil(cost(high) / dense * 1000) / 1000
        raise ImpossibleBudget(
            f"macs={macs:g} is {target / dense:.3f} of this model; {type(method).__name__} cannot "
            f"go below {least:.3f} here. Nearest possible: macs={least:.3f}."
        )
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return rule(high)


def scheduled_counts(rule: Schedule, shape: HostShape, method: Method) -> tuple[int, ...]:
    """Counts the rows that a schedule leaves after each block of a host, prefix included."""
    return rule.counts(shape.entering, shape.prefix, shape.depth, method, shape.resets)


def blocks_always_decided(method: Method, schedule: Schedule, depth: int) -> tuple[int, ...]:
    """Finds the blocks in which the method decides even if the schedule leaves all rows."""
    return schedule.decision_blocks(depth) if always_decides(method) else ()


def macs_target(macs: float, dense: int) -> float:
    """Turns `macs`, a share or a number, into multiply-adds; refuses impossible values."""
    cure = (
        f"Give a share of the model's own above 0 and at most 1 (0.6), or multiply-adds an image "
        f"(this model has {dense:.3g}; 1 GMAC is 1e9)."
    )
    within = Range(0, 1e30, above=True)
    macs = float(check_value("macs", macs, float, within, ImpossibleBudget, cure))
    if 1 < macs < 1e4:
        raise ImpossibleBudget(f"macs={macs:g} is neither. {cure}")
    if macs > dense:
        raise ImpossibleBudget(f"macs={macs:g} is more than the model itself has: {dense:.4g}.")
    return macs * dense if macs <= 1 else macs


def _check_one_budget(budget: Budget, schedule: Schedule | str | Path | None) -> None:
    """Refuses unknown budgets, and more than one."""
    for name in budget:
        if name not in Budget.__annotations__:
            raise UnknownName.of("budget", name, Budget.__annotations__)
    asked = [name for name in ("macs", "keep", "r", "keep_rate") if budget.get(name) is not None]
    if len(asked) + (schedule is not None) > 1:
        given = [*asked, *(["schedule"] if schedule is not None else [])]
        raise BadSchedule(f"Give one of them, not several: {', '.join(given)}.")


def _schedule_from_keep(
    shape: HostShape, method: Method, keep: float | Sequence[int], at: tuple[int, ...] | None
) -> Schedule:
    """Makes a schedule from explicit counts, or from the share of patches left at the end."""
    if isinstance(keep, Sequence) and not isinstance(keep, str | bytes):
        return Counts(keep, shape.entering, shape.prefix)  # type: ignore[arg-type]  # it checks it
    cure = "It is the share of patches left at the end, or a list of the tokens after each block."
    keep = float(check_value("keep", keep, float, Range(0, 1, above=True), BadSchedule, cure))
    if method.placement is Placement.EVERY_BLOCK and at is None:
        return Constant((shape.entering - shape.prefix) * (1 - keep) / shape.depth)
    places = _decision_blocks(method, shape, at)
    if method.defers:  # a rate is of all patches
        return Rate(keep, places)
    return Rate(keep ** (1 / max(len(places), 1)), places)


def _decision_blocks(
    method: Method, shape: HostShape, at: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Finds the blocks asked for, or the method's usual ones, without those that subsample."""
    if at is not None:
        return at
    match method.placement:
        case Placement.FIRST:
            places: tuple[int, ...] = (0,)
        case Placement.LATER:
            places = later_blocks(shape.depth)
        case Placement.UNITS:
            places = unit_blocks(shape.depth, shape.resets)
        case _:
            places = stage_blocks(shape.depth)
    return _avoid_strides(shape, places)


def _avoid_strides(shape: HostShape, places: tuple[int, ...]) -> tuple[int, ...]:
    """Replaces each block that subsamples the grid by the block after it."""
    return tuple(sorted({place + (place in shape.strided) for place in places}))


def _schedule_from_r(
    shape: HostShape, r: float | Sequence[int] | tuple[int, float], at: tuple[int, ...] | None
) -> Schedule:
    """Makes a schedule from ToMe's r: a number for some or all blocks, a tilted one, or a list."""
    if at is not None:
        Rate(1.0, at).check(shape.entering, shape.prefix, shape.depth)  # are these its blocks?
        each = Constant(r).r  # type: ignore[arg-type]  # it checks it
        steps = [round_half_up(each * (i + 1)) - round_half_up(each * i) for i in range(len(at))]
        removed = dict(zip(at, steps, strict=True))
        return Removed(tuple(removed.get(block, 0) for block in range(shape.depth)))
    if isinstance(r, tuple) and len(r) == 2:
        return Constant(r[0], inflect=r[1])
    if isinstance(r, str | bytes) or not isinstance(r, Sequence):
        return Constant(r)  # type: ignore[arg-type]  # it checks it
    rule = Removed(r)  # type: ignore[arg-type]  # it checks and keeps a tuple
    rule.check(shape.entering, shape.prefix, shape.depth)
    return rule
