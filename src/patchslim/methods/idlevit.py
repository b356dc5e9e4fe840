"""`idlevit`: the best attended patches go through a block; the others are idle, and may come back.

Xu, Li, Chen, Jiang, Lu, "No Token Left Behind: Efficient Vision Transformer via Dynamic Token
Idling" (2023).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from patchslim.methods import Method, Place, Placement, Signals
from patchslim.tokens.reduction import Defer, Fixed, Keep
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

BLOCKS = 3  # that share a keep rate


class IdleViT(Method):
    """Picks patches anew in each block, among all: idle ones stay as they are until picked."""

    place = Place.ON_MAP
    placement: ClassVar[Placement] = Placement.LATER
    needs_class_token: bool = True
    reads = ("q", "k")
    defers = True

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Fixed | Defer:
        """Lets the `keep` patches go on whose keys the query of the class token fits best."""
        if keep >= tokens.patches:
            return Fixed(tokens.patches)
        return Defer(Keep(_score(signals).topk(keep, dim=1).indices))

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Counts a share of all patches, rounded down; each three blocks, it shrinks once more."""
        return max(1, int(patches * rate ** -(-stage // BLOCKS) + 1e-9))

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one row of the attention map, a second time."""
        return block.attention_row_macs(rows)


def _score(signals: Signals) -> Tensor:
    """Averages the products of the class token's queries and all keys over the heads (B, n)."""
    if not signals.prefix or signals.q is None or signals.k is None:
        return signals.class_attention()
    products = (signals.q[:, :, :1] * signals.k[:, :, signals.prefix :]).sum(dim=3)
    return products.mean(dim=1)
