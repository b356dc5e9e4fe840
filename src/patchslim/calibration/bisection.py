"""`Bisection`: tolerances tried so far, and the next one to try, until one just meets a budget.

It knows numbers only: the larger a tolerance, the fewer operations are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from patchslim.errors import ImpossibleBudget

COST_MARGIN = 0.002  # of the dense model's operations: how close below a budget is near enough
CLOSEST_RATIO = 1.01  # two tolerances between which the cost only jumps
INNER_SHARE = 0.1  # of the way between two tolerances that the next one is away from both at least
FIRST_TOLERANCE = 0.01
WIDEN_FACTOR = 4.0  # the factor by which a tolerance is moved until the budget lies between two
MAX_ROUNDS = 24


class Attempt(NamedTuple):
    """A tolerance, the operations it leaves, and the patch rows that each block gives out."""

    tolerance: float
    cost: float
    kept: dict[int, int]


class Bisection:
    """The search for the smallest tolerance whose cost is not above `target`."""

    def __init__(self, target: float, dense: float, tried: Iterable[Any]) -> None:
        self.target, self.dense = target, dense
        self.attempts = [
            Attempt(tolerance, cost, {int(block): rows for block, rows in kept.items()})
            for tolerance, cost, kept in tried
        ]

    def add(self, tolerance: float, cost: float, kept: dict[int, int]) -> None:
        """What one more tolerance gave."""
        self.attempts.append(Attempt(tolerance, cost, kept))

    def is_settled(self) -> bool:
        """Whether a tolerance is known whose cost is just below the budget."""
        below, above = self._below(), self._above()
        if below and self.target - max(each.cost for each in below) <= COST_MARGIN * self.dense:
            return True
        if below and above and min(below).tolerance / max(above).tolerance < CLOSEST_RATIO:
            return True
        if below and len(self.attempts) >= MAX_ROUNDS:
            return True
        if len(self.attempts) >= MAX_ROUNDS:
            least = min(each.cost for each in self.attempts) / self.dense
            raise ImpossibleBudget(
                f"After {MAX_ROUNDS} tolerances none meets the goal of "
                f"{self.target / self.dense:.3f}; "
                f"the nearest so far has {least:.3f}. Give a larger budget."
            )
        return False

    def next(self) -> float:
        """A tolerance between those too small and those large enough, or beyond all so far."""
        below, above = self._below(), self._above()
        if below and above:
            return _interpolate(max(above), min(below), self.target)
        if above:
            return max(above).tolerance * WIDEN_FACTOR
        return min(below).tolerance / WIDEN_FACTOR if below else FIRST_TOLERANCE

    def best(self) -> tuple[float, dict[int, int]]:
        """The smallest tolerance that meets the budget, and the rows that it leaves."""
        tolerance, _, kept = min(self._below())
        return tolerance, kept

    def to_json(self) -> list[Any]:
        """What was tried, as plain data."""
        return [
            [tolerance, cost, {str(block): rows for block, rows in kept.items()}]
            for tolerance, cost, kept in self.attempts
        ]

    def _below(self) -> list[Attempt]:
        return [each for each in self.attempts if each.cost <= self.target]

    def _above(self) -> list[Attempt]:
        return [each for each in self.attempts if each.cost > self.target]


def _interpolate(small: Attempt, large: Attempt, target: float) -> float:
    """Where the cost would be the target if it fell evenly with the logarithm of the tolerance."""
    way = (small.cost - target) / (small.cost - large.cost)
    way = min(max(way, INNER_SHARE), 1 - INNER_SHARE)
    return math.exp((1 - way) * math.log(small.tolerance) + way * math.log(large.tolerance))
