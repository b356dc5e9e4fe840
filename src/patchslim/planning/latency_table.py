"""`LatencyTable`: how long blocks take on this device, by the tokens that go in and come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from patchslim.errors import BadFile
from patchslim.methods._method import Method
from patchslim.model.step import BlockStep
from patchslim.planning.search import Table


@dataclass(frozen=True)
class Point:
    """The time of one block, as a share of the time of the whole dense model.

    Attributes:
        entering: patches that go in.
        left: patches that come out; as many as go in where nothing is decided.
        share: the median over rounds.
        low, high: its quartiles.
    """

    entering: int
    left: int
    share: float
    low: float
    high: float

    @property
    def removed(self) -> float:
        """The share of the patches that is removed."""
        return 1 - self.left / self.entering


@dataclass(frozen=True)
class SelfCheck:
    """A whole schedule, predicted as the sum over its blocks, beside what it took when measured.

    Attributes:
        counts: tokens after each block.
        predicted, measured: its time, as a share of the dense model's.
    """

    counts: tuple[int, ...]
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class LatencyTable:
    """Times of one method's blocks, as shares of the dense model's time in the same round.

    Between measured numbers of tokens it interpolates, and fits no curve: kernels have steps.

    Attributes:
        depth: the number of blocks.
        rest: all but the blocks: embedding, head, and what surrounds them.
        whole: blocks that all patches enter, by the patches that they leave.
        reduced: blocks that fewer patches enter, as a method has left them.
        tail: the last block where it computes only the rows that the head reads; or none.
        checks: whole schedules, predicted and measured.
        dense_seconds: the time of the dense model while the table was measured.
        rounds: how often everything was timed.
    """

    depth: int
    rest: float
    whole: tuple[Point, ...]
    reduced: tuple[Point, ...]
    tail: tuple[Point, ...]
    checks: tuple[SelfCheck, ...]
    dense_seconds: float
    rounds: int

    @property
    def patches(self) -> int:
        """Patches that enter the first block."""
        return self.whole[0].entering

    @property
    def fewest(self) -> int:
        """The fewest patches that were measured."""
        return min(each.entering for each in self.reduced)

    @property
    def spread(self) -> float:
        """How far the quartiles of a time are apart, as a share of it: the median over times."""
        points = (*self.whole, *self.reduced, *self.tail)
        return median((each.high - each.low) / each.share for each in points)

    def block_share(self, entering: int, left: int) -> float:
        """Returns the time of a block, by the patches that go in and come out."""
        points = self.whole if entering == self.patches else self.reduced
        removed = 1 - left / entering
        rows = sorted({each.entering for each in points})
        shares = [_along_removed([p for p in points if p.entering == row], removed) for row in rows]
        return float(_interpolate(entering, rows, shares))

    def tail_share(self, entering: int) -> float:
        """Returns the time of the last block, where it computes only what the head reads."""
        points = sorted(self.tail, key=lambda each: each.entering)
        return float(
            _interpolate(
                entering, [each.entering for each in points], [each.share for each in points]
            )
        )

    def predict(self, steps: Sequence[BlockStep], prefix: int) -> float:
        """Returns the time of a whole model, as a share of the dense one's."""
        total = self.rest
        for step in steps:
            entering = step.entering - prefix
            if step.read is not None:
                total += self.tail_share(entering)
            else:
                left = step.left - prefix if step.place is not None else entering
                total += self.block_share(entering, left)
        return total

    def costs(self, levels: Sequence[int], method: Method) -> Table:
        """Returns the time of each step between levels, infinite where the method cannot do it."""
        one = np.full((len(levels), len(levels)), np.inf)
        deepest = max(each.removed for each in self.whole)
        for i, entering in enumerate(levels):
            for j, left in enumerate(levels[i:], i):
                possible = left >= method.fewest(entering) and 1 - left / entering <= deepest + 1e-9
                if i == j or possible:
                    one[i, j] = self.block_share(entering, left)
        every = np.repeat(one[None], self.depth, axis=0)
        if self.tail:
            every[-1] = np.inf
            np.fill_diagonal(every[-1], [self.tail_share(each) for each in levels])
        return every

    def to_json(self) -> dict[str, Any]:
        """Returns plain data that `from_json` turns back into an equal table."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LatencyTable:
        """Makes the table that `to_json` wrote."""
        try:
            plain = dict(data)
            for name in ("whole", "reduced", "tail"):
                plain[name] = tuple(Point(**each) for each in plain[name])
            plain["checks"] = tuple(
                SelfCheck(tuple(each["counts"]), each["predicted"], each["measured"])
                for each in plain["checks"]
            )
            return cls(**plain)
        except (TypeError, KeyError, AttributeError) as error:
            raise BadFile(f"This is no table of latencies: {error}.") from error


def _along_removed(points: Sequence[Point], removed: float) -> float:
    """Returns the time of a block that a fixed number of patches enters."""
    if removed <= 0:
        return next(each.share for each in points if each.left == each.entering)
    deciding = sorted((each.removed, each.share) for each in points if each.left < each.entering)
    if not deciding:  # the fewest patches that were measured: nothing is removed from them
        return next(each.share for each in points)
    return _interpolate(removed, *map(list, zip(*deciding, strict=True)))


def _interpolate(at: float, places: Sequence[float], values: Sequence[float]) -> float:
    """Interpolates between the two nearest places; beyond the ends it goes on straight."""
    if len(places) == 1:
        return values[0]
    upper = min(max(int(np.searchsorted(places, at)), 1), len(places) - 1)
    low, high = places[upper - 1], places[upper]
    along = (at - low) / (high - low)
    return values[upper - 1] + along * (values[upper] - values[upper - 1])
