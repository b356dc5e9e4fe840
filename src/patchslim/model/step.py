"""The values that one forward pass hands on, from block to block and to the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from patchslim.methods import Decision, Place, Signals
from patchslim.tokens.tokens import Tokens


@dataclass(frozen=True)
class BlockStep:
    """What happens in one block.

    Attributes:
        index: the number of the block.
        entering: rows that go in, prefix included.
        left: rows that come out.
        read: how many leading rows are computed, if nobody reads the others; None for all.
        place: where in the block the method decides; None if it does not.
        is_remembered: whether `Method.remember` is called in this block, for a later decision.
        stride: how many rows and columns of the grid become one: 1 in a flat host.
    """

    index: int
    entering: int
    left: int
    read: int | None = None
    place: Place | None = None
    is_remembered: bool = False
    stride: int = 1


@dataclass(frozen=True)
class TrainingOutput:
    """One forward pass with all that a loss may read.

    Attributes:
        output: what the host returns.
        tokens: the rows after the last block and the host's norm.
        decisions: what the method decided, in the order of the blocks.
    """

    output: Any
    tokens: Tokens
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class AttentionOutput:
    """What attention returned: the rows that asked, their values, and what a method may read."""

    queries: Tokens
    values: Tensor
    signals: Signals | None
