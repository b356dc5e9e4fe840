"""`Bisection`: finds the smallest tolerance that meets a budget.

It knows only numbers. The larger a tolerance, the fewer operations are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from patchslim.errors import ImpossibleBudget

COST_MARGIN = 0.002  # close enough below the budget, as a share of the dense model's operations
CLOSEST_RATIO = 1.01  # tolerances this close are not split: between them the cost only jumps
INNER_SHARE = 0.1  # the next tolerance is at least this share of the interval from both its ends
FIRST_TOLERANCE = 0.01
WIDEN_FACTOR = 4.0  # moves the tolerance until the budget lies between two of them
MAX_ROUNDS = 24


class Attempt(NamedTuple):
    """A tolerance that was tried: the operations it leaves, and the patch rows after each block."""

    tolerance: float
    cost: float
    kept: dict[int, int]


class Bisection:
    """Searches for the smallest tolerance whose cost is not above `target`.

    Ask `next()` for a tolerance, measure it, `add()` the result, and stop when `is_settled()`.

    Args:
        target: the budget.
        dense: what the dense model costs.
        tried: earlier attempts, as `to_json` returned them.
    """

    def __init__(self, target: float, dense: float, tried: Iterable[Any]) -> None:
        self.target, self.dense = target, dense
        self.attempts = [
            Attempt(tolerance, cost, {int(block): rows for block, rows in kept.items()})
            for tolerance, cost, kept in tried
        ]

    def add(self, tolerance: float, cost: float, kept: dict[int, int]) -> None:
        """Adds the result of one more tolerance."""
        self.attempts.append(Attempt(tolerance, cost, kept))

    def is_settled(self) -> bool:
        """Tells whether a tolerance is known whose cost is just below the budget.

        Raises:
            ImpossibleBudget: no tolerance met the budget in `MAX_ROUNDS` attempts.
        """
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
        """Returns the next tolerance to try."""
        below, above = self._below(), self._above()
        if below and above:
            return _interpolate(max(above), min(below), self.target)
        if above:
            return max(above).tolerance * WIDEN_FACTOR
        return min(below).tolerance / WIDEN_FACTOR if below else FIRST_TOLERANCE

    def best(self) -> tuple[float, dict[int, int]]:
        """Returns the smallest tolerance that meets the budget, and the rows that it leaves."""
        tolerance, _, kept = min(self._below())
        return tolerance, kept

    def to_json(self) -> list[Any]:
        """Returns all attempts as plain data."""
        return [
            [tolerance, cost, {str(block): rows for block, rows in kept.items()}]
            for tolerance, cost, kept in self.attempts
        ]

    def _below(self) -> list[Attempt]:
        return [each for each in self.attempts if each.cost <= self.target]

    def _above(self) -> list[Attempt]:
        return [each for each in self.attempts if each.cost > self.target]


def _interpolate(small: Attempt, large: Attempt, target: float) -> float:
    """Guesses the tolerance of a cost: linear between two attempts, on a logarithmic scale."""
    share = (small.cost - target) / (small.cost - large.cost)
    share = min(max(share, INNER_SHARE), 1 - INNER_SHARE)
    return math.exp((1 - share) * math.log(small.tolerance) + share * math.log(large.tolerance))
