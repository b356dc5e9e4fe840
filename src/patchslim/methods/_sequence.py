"""`Sequence`: two methods in one block, such as "topk+tome": the first prunes, the second merges.

Each pair of names is a class of its own, so that it is made, saved and loaded like any method.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import ClassVar, cast

from torch import Tensor

from patchslim.errors import BadSetting, UnknownName
from patchslim.methods import LearnedMethod, Method, Place, Signals
from patchslim.methods._method import remembers
from patchslim.methods._registry import find_method
from patchslim.settings import Range, check_value
from patchslim.tokens.attention import attention_bias
from patchslim.tokens.chain import Chain
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class Sequence(Method):
    """Two methods, one after the other. `share` is how much of what goes the first removes."""

    names: ClassVar[tuple[str, str]]

    def __init__(self, *, share: float = 0.5) -> None:
        super().__init__()
        self.share: float = check_value("share", share, float, Range(0, 1))
        self.first, self.second = (find_method(name)() for name in self.names)
        self.needs_class_token = self.first.needs_class_token or self.second.needs_class_token
        self.proportional = self.first.proportional or self.second.proportional
        self.extra_rows = self.first.extra_rows + self.second.extra_rows
        self.reads = tuple({*self.first.reads, *self.second.reads})

    def check_step(self, block: int, patches: int, keep: int) -> None:
        """Asks both methods."""
        between = self._between(patches, keep)
        if between < patches:
            self.first.check_step(block, patches, between)
        if keep < between:
            self.second.check_step(block, between, keep)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """Asks the first method, and then the second about what the first leaves."""
        between = self._between(tokens.patches, keep)
        if between == tokens.patches:
            return self.second.choose(tokens, signals, keep)
        first = self.first.choose(tokens, signals, between)
        if between == keep:
            return first
        left = first.apply(tokens)
        seen = self._follow(first, tokens, left, signals)
        return Chain(first, between, self.second.choose(left, seen, keep))

    def _between(self, patches: int, keep: int) -> int:
        """Counts the rows that the first leaves: fewer if the second cannot remove the rest."""
        between = patches - round(self.share * (patches - keep))
        between = min(max(between, keep, self.first.fewest(patches)), patches)
        while between > keep and self.second.fewest(between) > keep:
            between -= 1
        return between

    def _follow(self, first: Reduction, whole: Tokens, left: Tokens, signals: Signals) -> Signals:
        """Returns what the block has computed, for the rows that are left."""

        def move(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            rows, size = t.transpose(1, 2), whole.sizes()
            return first.move(rows, weight=size, prefix=signals.prefix).transpose(1, 2)

        readout, entered = signals.readout, signals.entered
        if entered is not None:
            entered = first.move(entered, weight=whole.sizes(), prefix=signals.prefix)
        return Signals(
            signals.prefix,
            signals.scale,
            move(signals.q),
            move(signals.k),
            move(signals.v),
            attention_bias(left, proportional=self.proportional),
            None if readout is None else lambda: first.represent(readout()),
            signals.block,
            signals.stride,
            signals.depth,
            entered=entered,
        )

    def fewest(self, patches: int) -> int:
        """Lets both methods remove all they can."""
        return self.second.fewest(self.first.fewest(patches))

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts both choices."""
        between = self._between(rows - prefix, block.left - prefix) + prefix
        first = self.first.macs(rows, prefix, replace(block, left=between)) if between < rows else 0
        if between == block.left:
            return first
        return first + self.second.macs(between, prefix, block)


@functools.cache
def find_sequence(name: str) -> type[Sequence]:
    """Returns the class of a sequence, such as "topk+tome"."""
    names = name.split("+")
    if len(names) != 2:
        raise UnknownName(f"{name!r} names {len(names)} methods; a sequence has two: topk+tome.")
    for each in names:
        if not _can_follow(find_method(each)()):
            raise BadSetting(
                f"{name}: a sequence is of two methods that choose between attention and "
                f"feed-forward, as many rows in every image, and learn nothing; {each} does not. "
                "Take two of evit, pitome, random, similarity, tome, topk."
            )
    doc = f"Removes tokens by {names[0]} and then, in the same block, by {names[1]}."
    members = {"names": tuple(names), "__doc__": doc, "__module__": __name__}
    return cast("type[Sequence]", type(name, (Sequence,), members))


def _can_follow(method: Method) -> bool:
    """Tells whether a method may be part of a sequence."""
    special = method.adaptive or method.defers or remembers(method) or method.own_counts
    learns = isinstance(method, LearnedMethod)
    removes = method.fewest(2) < 2
    return method.place is Place.BEFORE_FEED and removes and not learns and not special


def __getattr__(name: str) -> type[Sequence]:
    """Finds the class of a sequence by its name, for pickle."""
    if "+" not in name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return find_sequence(name)
