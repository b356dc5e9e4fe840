"""The values that one forward pass hands on, from block to block and to the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from patchslim.methods import Decision, Method, Place, Signals
from patchslim.schedules.macs import skips_last_decision
from patchslim.tokens.tokens import Tokens


@dataclass(frozen=True)
class BlockStep:
    """What is to happen in one block: rows that go in and come out, leading rows that are read.

    `named` is whether the schedule names the block at all: a method that may leave fewer rows than
    scheduled decides there even where the schedule would leave all. `noted` is whether the method
    takes note of the rows, for a later decision. After a block with a `stride` only every
    `stride`-th row and column of the grid is left.
    """

    index: int
    entering: int
    left: int
    read: int | None = None
    is_scheduled: bool = False
    is_remembered: bool = False
    stride: int = 1


@dataclass(frozen=True)
class TrainingOutput:
    """One forward pass with all that a loss may look at.

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
    """What attention gave: the rows that asked, their values, and what a method may look at."""

    queries: Tokens
    values: Tensor
    signals: Signals | None


def decision_place(method: Method, step: BlockStep) -> Place | None:
    """Where in this block the method decides, or None where it does not.

    The schedule says so, not the rows at hand: a method that masks leaves them all in place.
    """
    if step.stride > 1 or skips_last_decision(method, step.read):
        return None
    if step.left >= step.entering and not step.is_scheduled:
        return None
    return method.place
