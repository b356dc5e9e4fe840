"""`Schedule`: how many tokens are left after each block. Plain numbers, no tensors.

One direction is stored: what is *kept*, prefix rows included. A schedule is a rule that gives these
counts for any number of tokens, so that hosts with a free image size keep it; `Counts` is the rule
that spells them out. Known vocabulary (r, keep_rate, reduction_loc) becomes one of four rules.
"""

from __future__ import annotations

import json
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from patchslim.errors import BadFile, BadSchedule, ShortSchedule, UnknownName

if TYPE_CHECKING:
    from patchslim.reducer import Reducer


@dataclass(frozen=True)
class Schedule(ABC):
    """A rule that says how many rows are left after each block."""

    kind: ClassVar[str]

    @abstractmethod
    def wanted(self, patches: int, depth: int, reducer: Reducer) -> list[int]:
        """Patch rows wanted after each block, before the method's own limits."""

    def counts(self, entering: int, prefix: int, depth: int, reducer: Reducer) -> tuple[int, ...]:
        """Rows left after each block, prefix included, within what the method can do.

        Args:
            entering: rows that enter the first block.
            prefix: how many of them are not patches.
            depth: the number of blocks.
            reducer: the method that will have to leave these counts.
        """
        rows = entering - prefix
        left: list[int] = []
        for block, wanted in enumerate(self.wanted(rows, depth, reducer)):
            if wanted > rows:
                raise BadSchedule(
                    f"The schedule asks for {wanted + prefix} tokens after block {block}, but only "
                    f"{rows + prefix} enter it. Counts can only fall (they include {prefix} prefix)."
                )
            rows = max(wanted, reducer.fewest(rows))
            left.append(rows + prefix)
        return tuple(left)

    def warn_if_short(self, entering: int, prefix: int, depth: int, reducer: Reducer) -> None:
        """Says so where the method cannot remove as much as this schedule asks."""
        wanted = self.wanted(entering - prefix, depth, reducer)
        left = self.counts(entering, prefix, depth, reducer)
        short = [block for block in range(depth) if left[block] > wanted[block] + prefix]
        if short:
            name = type(reducer).__name__
            warnings.warn(
                f"{name} cannot remove all that the schedule asks at block {short[0]}: one step "
                f"leaves at least {left[short[0]]} tokens there. Tokens after each block: {left}.",
                ShortSchedule,
                stacklevel=4,
            )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into an equal schedule."""
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Schedule:
        """The schedule that `to_json` wrote."""
        kinds = {rule.kind: rule for rule in (Constant, Rate, Counts)}
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        kind = fields.pop("kind", None)
        if kind not in kinds:
            raise UnknownName.of("kind of schedule", str(kind), kinds)
        try:
            return kinds[kind](**fields)
        except TypeError as error:
            raise BadFile(f"A schedule of kind {kind!r} does not take {sorted(fields)}.") from error

    def save(self, path: str | Path) -> None:
        """Writes the schedule as JSON."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Schedule:
        """The schedule that `save` wrote."""
        try:
            return Schedule.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise BadFile(f"{path} is not a saved schedule: {error}") from error


@dataclass(frozen=True)
class Constant(Schedule):
    """About r patches fewer after every block (ToMe); r may be a fraction: the sum is rounded.

    `inflect` tilts it: -1 removes twice r at first and nothing at the end, 1 the reverse.
    """

    r: float
    inflect: float = 0.0
    kind: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.r) and self.r >= 0 and -1 <= self.inflect <= 1):
            raise BadSchedule(
                f"r={self.r}, inflect={self.inflect}: r must be 0 or more (tokens removed a block) "
                "and inflect between -1 (early) and 1 (late)."
            )

    def wanted(self, patches: int, depth: int, reducer: Reducer) -> list[int]:
        """Patch rows wanted after each block."""
        if not self.inflect:
            return [patches - round_half_up(self.r * (block + 1)) for block in range(depth)]
        first = int(self.r * (1 - self.inflect))
        step = (2 * self.r - 2 * first) / max(depth - 1, 1)
        removed, left = 0, []
        for block in range(depth):
            removed += int(first + step * block)
            left.append(patches - removed)
        return left


@dataclass(frozen=True)
class Rate(Schedule):
    """The share `rate` of the current patches is kept at each of the blocks `at` (EViT).

    The count is rounded up, and rows that the method adds (a fused one) come on top; they are
    counted as patches from then on.
    """

    rate: float
    at: tuple[int, ...]
    kind: ClassVar[str] = "rate"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise BadSchedule(
                f"keep_rate={self.rate}: it is the share of patches *kept* at each place, above 0 "
                "and at most 1 (to remove 30 % say keep_rate=0.7)."
            )
        if not self.at or list(self.at) != sorted(set(self.at)) or self.at[0] < 0:
            raise BadSchedule(f"at={self.at}: give block numbers from 0, ascending, such as 3,6,9.")

    def wanted(self, patches: int, depth: int, reducer: Reducer) -> list[int]:
        """Patch rows wanted after each block."""
        if self.at[-1] >= depth:
            raise BadSchedule(f"at={self.at}: this host has blocks 0 to {depth - 1}.")
        left, rows = [], patches
        for block in range(depth):
            if block in self.at:
                rows = min(rows, math.ceil(self.rate * rows - 1e-9) + reducer.adds)
            left.append(rows)
        return left


@dataclass(frozen=True)
class Counts(Schedule):
    """Exactly `kept` rows after each block, prefix included, for images of one size."""

    kept: tuple[int, ...]
    entering: int
    prefix: int
    kind: ClassVar[str] = "counts"

    def wanted(self, patches: int, depth: int, reducer: Reducer) -> list[int]:
        """Patch rows wanted after each block."""
        if patches + self.prefix != self.entering:
            raise BadSchedule(
                f"This schedule is made for {self.entering} tokens, and the images give "
                f"{patches + self.prefix}. Slim the model again for images of that size."
            )
        if len(self.kept) != depth:
            raise BadSchedule(
                f"The schedule has {len(self.kept)} counts, and the host has {depth} blocks."
            )
        return [rows - self.prefix for rows in self.kept]


def round_half_up(value: float) -> int:
    """The nearest integer, halves upwards, so that equal steps give equal schedules."""
    return math.floor(value + 0.5)


def stages(depth: int) -> tuple[int, ...]:
    """Blocks at a quarter, a half and three quarters of the depth: 3, 6, 9 of 12."""
    return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)} - {depth}))


def total_counts(kept: Sequence[int], entering: int, prefix: int) -> Counts:
    """The explicit schedule `kept`, checked for whole positive numbers."""
    if any(not isinstance(rows, int) or rows <= prefix for rows in kept):
        raise BadSchedule(
            f"keep={list(kept)}: counts are whole numbers above the host's {prefix} prefix tokens "
            "(they include the prefix)."
        )
    return Counts(tuple(kept), entering, prefix)
