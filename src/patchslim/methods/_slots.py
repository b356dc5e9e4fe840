"""`SlotMethod`: a method that makes each new row of all patches, in shares that it learns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from patchslim.errors import BadSetting
from patchslim.methods._learned import LearnedMethod, ModulePerBlock
from patchslim.methods._method import Place, share_of_all
from patchslim.methods._signals import Signals
from patchslim.settings import Range, check_value
from patchslim.tokens.mixing import Mix
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class SlotMethod(LearnedMethod):
    """A method of slots: new rows, each a mean of all patches in shares from learned logits.

    A subclass names in `layers` what makes a block's layers from a width and a number of `slots`;
    called with patches and a count, they return logits of the first slots (B, m, n).
    """

    place = Place.BEFORE_BLOCK
    reads = ("x",)
    layers: ClassVar[Callable[..., nn.Module]]

    def __init__(self, *, slots: int = 196) -> None:
        super().__init__()
        self.slots = check_value("slots", slots, int, Range(1, 65536))
        self.learned = ModulePerBlock(type(self).layers, slots=self.slots)

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes the layers of each block that chooses."""
        self.learned.prepare(width, blocks)

    @property
    def missing(self) -> str | None:
        """Says that it has to be trained, unless it has layers."""
        if self.learned:
            return None
        return (
            f"{type(self).__name__} learns of what its new tokens are made, and has not been "
            "trained yet: now they are made at random. Train it: patchslim.train, "
            "`patchslim train`."
        )

    def check_step(self, block: int, patches: int, keep: int) -> None:
        """Refuses to leave more patches than there are slots."""
        if keep > self.slots:
            raise BadSetting(
                f"{type(self).__name__} has {self.slots} slots, and the schedule leaves {keep} "
                f"patches in block {block}. Give slots={keep}, or leave fewer patches."
            )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Mix:
        """Fills the first `keep` slots, each with a mean of all patches."""
        learned = self.learned.for_block(signals.block, tokens.x.shape[2])
        logits = learned(tokens.x[:, tokens.prefix :], keep)
        return Mix.of_slots(
            self.shares(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        )

    def shares(self, logits: Tensor) -> Tensor:
        """Turns logits (B, m, n) into what each patch weighs in each slot, 1 in all."""
        return logits.softmax(dim=2)

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Counts a share of all patches, `rate` to the power of the stage, rounded down."""
        return share_of_all(rate, stage, patches, rows)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the logits, and the product that mixes the patches."""
        patches, left = rows - prefix, block.left - prefix
        return self.logit_macs(patches, left, block.width) + left * patches * block.width

    @abstractmethod
    def logit_macs(self, patches: int, left: int, width: int) -> int:
        """Counts the multiply-adds of the logits of `left` slots."""
