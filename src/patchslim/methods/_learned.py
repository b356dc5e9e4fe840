"""`LearnedMethod`: a method that has to be trained or calibrated before its choice means anything.

It adds three members to `Method`. Training and saving know no learned method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.errors import BadSetting
from patchslim.methods._method import Method


@dataclass(frozen=True)
class Decision:
    """What a method decided in one block during training.

    Attributes:
        block: the number of the block.
        share: the share of patch rows that the schedule wants left, of those that entered the
            first block.
        alive: how much of each row is still there (B, n), for a method that masks while it
            trains; None for one that removes.
    """

    block: int
    share: float
    alive: Tensor | None


class LearnedMethod(Method):
    """A method that learns from images: by training with the host, or by calibration.

    Override what applies:

    * `prepare` makes the parameters once the host and the schedule are known.
    * `missing` says what has not been done yet, so that `slim` can warn.
    * `loss` adds a term of the method's own to the training loss.

    While it trains (`self.training`), `choose` may return a `Mask` instead of removing rows, so
    that gradients reach the method's parameters.
    """

    _learns = True

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes the parameters, unless they exist already. `ModulePerBlock` does this for you.

        Args:
            width: channels of the host's tokens.
            blocks: the numbers of the blocks in which the method will choose.
        """

    @property
    def missing(self) -> str | None:
        """A sentence that says what has to be done first, and how; None if nothing is missing."""
        return None

    def loss(self, decisions: Sequence[Decision]) -> Tensor | None:
        """Returns the method's own term of the training loss, or None, from a step's decisions."""
        return None


class ModulePerBlock(nn.ModuleDict):
    """One small module for each block in which a method chooses, made for one host.

    `make(width, **options)` builds one. A recipe saves the method's settings; these modules are
    saved with the weights.
    """

    def __init__(self, make: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.make = make
        self.options = options
        self.width = 0

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes one module for each of `blocks`, with the same values in every run.

        If the modules exist already, checks that they fit this host and these blocks.
        """
        if len(self):
            self.check(width, blocks)
            return
        self.width = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for block in blocks:
                self[str(block)] = self.make(width, **self.options)

    def for_block(self, block: int, width: int) -> nn.Module:
        """Returns the module of a block; refuses a block or a width that it was not made for."""
        if str(block) not in self:
            self.check(width, [block])
        return self[str(block)]

    def check(self, width: int, blocks: Sequence[int]) -> None:
        """Refuses a host or a schedule that the modules were not made for."""
        own = tuple(int(block) for block in self)
        if width != self.width or not set(own).issuperset(blocks):
            raise BadSetting(
                f"This method has a {self.make.__name__} for {self.width} channels in blocks "
                f"{own}, and here are {width} channels and decisions in blocks {tuple(blocks)}. "
                "Use the host and the schedule that it was made for, or make a new one."
            )


def is_trainable(method: Method) -> bool:
    """Tells whether the method has parameters, which then have to be trained."""
    return next(method.parameters(), None) is not None
