"""`Schedule`: how many tokens are left after each block. Plain numbers, no tensors.

A schedule always says what is *kept*, prefix rows included. It is a rule that gives these counts
for any number of tokens, so that it works for every image size; only `Counts` spells them out for
one size. The words of papers (r, keep_rate, reduction_loc) become one of four rules.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from patchslim.errors import BadFile, BadSchedule, ShortSchedule, UnknownName, warn_caller
from patchslim.files import read_json, write_atomically
from patchslim.methods._method import remembers
from patchslim.schedules.blocks import unit_blocks
from patchslim.settings import Range, check_value, show_value

if TYPE_CHECKING:
    from patchslim.methods._method import Method

ROWS = Range(0, 1e9)  # how many tokens there may be, or be removed

# What the last block computes: only the rows that the head reads, or all of them.
Tail = Literal["exact", "full"]


@dataclass(frozen=True)
class Schedule(ABC):
    """A rule that says how many rows are left after each block."""

    kind: ClassVar[str]

    @abstractmethod
    def rows_after(self, block: int, rows: int, depth: int, entered: int, method: Method) -> int:
        """Counts the patch rows that the rule wants after a block that `rows` enter.

        `entered` is how many patch rows entered the first block. The method may leave more: see
        `Method.fewest`.
        """

    @abstractmethod
    def decision_blocks(self, depth: int) -> tuple[int, ...]:
        """Lists blocks in which the rule lets a method choose, even if no row has to go there."""

    @abstractmethod
    def ease(self, share: float) -> Schedule:
        """Returns a schedule that removes only a share, from 0 to 1, of what this one removes."""

    @abstractmethod
    def check(self, entering: int, prefix: int, depth: int) -> None:
        """Refuses a host that the rule does not fit."""

    def counts(
        self,
        entering: int,
        prefix: int,
        depth: int,
        method: Method,
        resets: Mapping[int, int] | None = None,
    ) -> tuple[int, ...]:
        """Counts the rows left after each block, prefix included, within the method's limits.

        Args:
            entering: rows that enter the first block.
            prefix: how many of them are not patches.
            depth: the number of blocks.
            method: the method that has to leave these counts.
            resets: for each block that subsamples the grid, the patch rows after it; the grid is
                complete there.
        """
        return tuple(
            [left for _, left in self._count_rows(entering, prefix, depth, method, resets)]
        )

    def in_every_block(self, depth: int, resets: Mapping[int, int]) -> Schedule:
        """Returns a schedule with the same rate in every block, from the first of its blocks on."""
        raise BadSchedule(
            f"A schedule of kind {self.kind!r} has no rate that could hold in every block. Give "
            "keep_rate= and at= (--keep-rate, --at)."
        )

    def _count_rows(
        self,
        entering: int,
        prefix: int,
        depth: int,
        method: Method,
        resets: Mapping[int, int] | None = None,
    ) -> list[tuple[int, int]]:
        """Counts rows wanted and rows left after each block, prefix included."""
        self.check(entering, prefix, depth)
        self._check_first_block(entering - prefix, depth, method, resets or {})
        rows = entered = entering - prefix
        steps: list[tuple[int, int]] = []
        for block in range(depth):
            if resets and block in resets:
                rows = entered = resets[block]
                reason = self.misfit(block, rows + prefix)
                if reason is not None:
                    raise BadSchedule(reason)
                steps.append((rows + prefix, rows + prefix))
                continue
            wanted = self.rows_after(block, rows, depth, entered, method)
            if wanted > rows:
                raise BadSchedule(
                    f"The schedule asks for {wanted + prefix} tokens after block {block}, but only "
                    f"{rows + prefix} enter it. Counts only fall (they include {prefix} prefix)."
                )
            rows = max(wanted, method.fewest(rows))
            steps.append((wanted + prefix, rows + prefix))
        return steps

    def _check_first_block(
        self, rows: int, depth: int, method: Method, resets: Mapping[int, int]
    ) -> None:
        """Refuses a choice in block 0 by a method that needs to remember earlier blocks."""
        if not remembers(method):
            return
        if self.rows_after(0, rows, depth, rows, method) < rows or 0 in self.decision_blocks(depth):
            raise BadSchedule(
                f"{type(method).__name__} chooses by what it remembers of earlier blocks; it "
                f"cannot choose in block 0. Give keep_rate=0.5, at={unit_blocks(depth, resets)} "
                "(--keep-rate, --at) or other blocks."
            )

    def misfit(self, block: int, rows: int) -> str | None:
        """Says why the rule does not fit a host that subsamples to `rows` in a block, or None."""
        return None

    def warn_if_short(
        self,
        entering: int,
        prefix: int,
        depth: int,
        method: Method,
        resets: Mapping[int, int] | None = None,
    ) -> None:
        """Warns if the method cannot remove as much as this schedule asks."""
        steps = self._count_rows(entering, prefix, depth, method, resets)
        left = tuple(each for _, each in steps)
        short = [block for block, (wanted, each) in enumerate(steps) if each > wanted]
        if short:
            name = type(method).__name__
            warn_caller(
                f"{name} cannot remove all that the schedule asks at block {short[0]}: one step "
                f"leaves at least {left[short[0]]} tokens there. Tokens after each block: {left}.",
                ShortSchedule,
            )

    def _check(
        self, field: str, kind: type, within: Range, cure: str, *, name: str | None = None
    ) -> None:
        """Checks a number of this rule, and makes it a plain one, as JSON can hold it."""
        value = getattr(self, field)
        plain = check_value(name or field, value, kind, within, BadSchedule, cure)
        object.__setattr__(self, field, plain)  # frozen, but still being made

    def _check_each(self, field: str, within: Range, cure: str, *, name: str | None = None) -> None:
        """Checks the whole numbers in a sequence of this rule, and makes it a plain tuple."""
        values, name = getattr(self, field), name or field
        if not is_list(values):
            raise BadSchedule(f"{name}={show_value(values)}: give a list or a tuple. {cure}")
        plain = [check_value(name, each, int, within, BadSchedule, cure) for each in values]
        object.__setattr__(self, field, tuple(plain))  # frozen, but still being made

    def to_json(self) -> dict[str, Any]:
        """Returns a plain dictionary that `from_json` turns back into an equal schedule."""
        return {"kind": self.kind, **asdict(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Schedule:
        """Makes the schedule that `to_json` wrote."""
        rules: tuple[type[Schedule], ...] = (Constant, Removed, Rate, Counts)
        kinds = {rule.kind: rule for rule in rules}
        if not isinstance(data, dict):
            raise BadFile(f"A saved schedule is a JSON object, not {type(data).__name__}.")
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        kind = fields.pop("kind", None)
        if not isinstance(kind, str) or kind not in kinds:
            raise UnknownName.of("kind of schedule", show_value(kind), kinds)
        try:
            return kinds[kind](**fields)
        except (TypeError, ArithmeticError) as error:
            raise BadFile(
                f"A schedule of kind {kind!r} does not take {sorted(fields)}: {error}."
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the schedule as JSON."""
        write_atomically(path, json.dumps(self.to_json()) + "\n")

    @staticmethod
    def load(path: str | Path) -> Schedule:
        """Reads the schedule that `save` wrote."""
        try:
            return Schedule.from_json(read_json(path))
        except (BadFile, BadSchedule) as error:
            raise BadFile(f"{path} is not a saved schedule: {error}") from error


@dataclass(frozen=True)
class Constant(Schedule):
    """Removes r patches in every block (ToMe). r may be a fraction; the running sum is rounded.

    `inflect` tilts it: -1 removes twice r at first and nothing at the end, 1 the reverse.
    """

    r: float
    inflect: float = 0.0
    kind: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        self._check("r", float, ROWS, "r must be 0 or more: the tokens removed a block.")
        self._check("inflect", float, Range(-1, 1), "It is between -1 (early) and 1 (late).")

    def check(self, entering: int, prefix: int, depth: int) -> None:
        """Accepts every host."""

    def rows_after(self, block: int, rows: int, depth: int, entered: int, method: Method) -> int:
        """Counts the patch rows that the rule wants after a block that `rows` enter."""
        if not self.inflect:
            return rows - round_half_up(self.r * (block + 1)) + round_half_up(self.r * block)
        first = int(self.r * (1 - self.inflect))
        step = (2 * self.r - 2 * first) / max(depth - 1, 1)
        return rows - int(first + step * block)

    def decision_blocks(self, depth: int) -> tuple[int, ...]:
        """Lists all blocks."""
        return tuple(range(depth))

    def ease(self, share: float) -> Schedule:
        """Returns a schedule with a smaller r and the same tilt."""
        return Constant(share * self.r, self.inflect)


@dataclass(frozen=True)
class Removed(Schedule):
    """Removes `r[i]` patches in block i."""

    r: tuple[int, ...]
    kind: ClassVar[str] = "removed"

    def __post_init__(self) -> None:
        self._check_each("r", ROWS, "Tokens removed a block are whole numbers from 0.")

    def check(self, entering: int, prefix: int, depth: int) -> None:
        """Refuses a host of another depth."""
        if len(self.r) != depth:
            raise BadSchedule(
                f"r={list(self.r)} has {len(self.r)} numbers, and the host has {depth} blocks."
            )

    def rows_after(self, block: int, rows: int, depth: int, entered: int, method: Method) -> int:
        """Counts the patch rows that the rule wants after a block that `rows` enter."""
        return rows - self.r[block]

    def decision_blocks(self, depth: int) -> tuple[int, ...]:
        """Lists all blocks."""
        return tuple(range(depth))

    def ease(self, share: float) -> Schedule:
        """Returns a schedule with a share of each number."""
        return Removed(tuple(round_half_up(share * each) for each in self.r))


@dataclass(frozen=True)
class Rate(Schedule):
    """Keeps the share `rate` of the current patches in each of the blocks `at` (EViT).

    `Method.rows_left` rounds. Usually it rounds up, and a row that the method adds (a fused one)
    comes on top and counts as a patch in later blocks.
    """

    rate: float
    at: tuple[int, ...]
    kind: ClassVar[str] = "rate"

    def __post_init__(self) -> None:
        kept = (
            "It is the share of patches *kept* at each place, above 0 and at most 1 (to remove "
            "30 % say keep_rate=0.7)."
        )
        self._check("rate", float, Range(0, 1, above=True), kept, name="keep_rate")
        cure = "Give block numbers from 0, ascending, such as 3,6,9."
        self._check_each("at", Range(0, 1e6), cure)
        if not self.at or list(self.at) != sorted(set(self.at)):
            raise BadSchedule(f"at={show_value(self.at)}: {cure[0].lower()}{cure[1:]}")

    def check(self, entering: int, prefix: int, depth: int) -> None:
        """Refuses a host that has not all of the blocks."""
        if self.at[-1] >= depth:
            raise BadSchedule(f"at={self.at}: this host has blocks 0 to {depth - 1}.")

    def rows_after(self, block: int, rows: int, depth: int, entered: int, method: Method) -> int:
        """Counts the patch rows that the rule wants after a block that `rows` enter."""
        if block not in self.at:
            return rows
        return method.rows_left(self.rate, self.at.index(block) + 1, entered, rows)

    def decision_blocks(self, depth: int) -> tuple[int, ...]:
        """Lists the blocks `at`."""
        return self.at

    def ease(self, share: float) -> Schedule:
        """Returns a schedule with a higher rate (EViT's shrinking keep rate)."""
        return Rate(1 - share * (1 - self.rate), self.at)

    def in_every_block(self, depth: int, resets: Mapping[int, int]) -> Schedule:
        """Returns a schedule with the same rate in every block from the first of `at` on."""
        return Rate(self.rate, tuple(b for b in range(self.at[0], depth) if b not in resets))

    def misfit(self, block: int, rows: int) -> str | None:
        """Refuses a block of `at` that subsamples the grid."""
        if block not in self.at:
            return None
        return (
            f"at={self.at}: block {block} subsamples the grid of this host, and a method cannot "
            f"decide in it. Take the block after it, {block + 1}."
        )


@dataclass(frozen=True)
class Counts(Schedule):
    """Leaves exactly `kept` rows after each block, prefix included, for images of one size."""

    kept: tuple[int, ...]
    entering: int
    prefix: int
    kind: ClassVar[str] = "counts"

    def __post_init__(self) -> None:
        self._check("entering", int, ROWS, "It is how many tokens enter the first block.")
        self._check("prefix", int, ROWS, "It is how many tokens are not patches.")
        above = Range(self.prefix, ROWS.high, above=True)
        cure = (
            f"Counts are whole numbers above the host's {self.prefix} prefix tokens (they include "
            "the prefix)."
        )
        self._check_each("kept", above, cure, name="keep")

    def check(self, entering: int, prefix: int, depth: int) -> None:
        """Refuses images of another size and hosts of another depth."""
        if (entering, prefix) != (self.entering, self.prefix):
            raise BadSchedule(
                f"This schedule is made for {self.entering} tokens ({self.prefix} of them prefix), "
                f"and the images give {entering} tokens ({prefix} of them prefix). Resize them, or "
                "slim the model again for their size."
            )
        if len(self.kept) != depth:
            raise BadSchedule(
                f"The schedule has {len(self.kept)} counts, and the host has {depth} blocks."
            )

    def rows_after(self, block: int, rows: int, depth: int, entered: int, method: Method) -> int:
        """Counts the patch rows that the rule wants after a block that `rows` enter."""
        return self.kept[block] - self.prefix

    def decision_blocks(self, depth: int) -> tuple[int, ...]:
        """Lists the blocks that leave fewer rows than enter them."""
        entering = (self.entering, *self.kept)
        return tuple(block for block in range(depth) if self.kept[block] < entering[block])

    def ease(self, share: float) -> Schedule:
        """Returns counts between all rows and these."""
        kept = (self.entering - round_half_up(share * (self.entering - rows)) for rows in self.kept)
        return Counts(tuple(kept), self.entering, self.prefix)

    def misfit(self, block: int, rows: int) -> str | None:
        """Refuses another count than the host's after a block that subsamples the grid."""
        if self.kept[block] == rows:
            return None
        return (
            f"The schedule leaves {self.kept[block]} tokens after block {block}, which subsamples "
            f"the grid of this host to {rows}. Say {rows} there."
        )


def round_half_up(value: float) -> int:
    """Rounds to the nearest integer, halves up, so that equal steps give equal schedules."""
    return math.floor(value + 0.5)


def is_list(value: object) -> bool:
    """Whether a value lists numbers in order: a list, a tuple, a range or the like, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
