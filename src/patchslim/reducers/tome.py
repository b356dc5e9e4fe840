"""`tome`: merges the most similar pairs of tokens, matched bipartitely by their keys.

Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), written from the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from patchslim.cost import BlockShape
from patchslim.reducer import Reducer, Signals, Spread
from patchslim.reduction import Merge, Reduction
from patchslim.tokens import Tokens


class ToMe(Reducer):
    """Merges pairs by key similarity; `proportional` attention weighs a token by its size.

    The paper turns proportional attention off for masked-autoencoder weights used off the shelf.
    """

    spread: ClassVar[Spread] = Spread.EVERY_BLOCK

    def __init__(self, *, proportional: bool = True) -> None:
        super().__init__()
        self.proportional = proportional

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """Tokens are dealt alternately to A and B; the best pairs merge, A into B.

        Order of the rows that stay: those of A, then those of B. The next deal depends on it.
        """
        a, b = _deal(tokens.prefix)
        keys = F.normalize(signals.keys(), dim=-1)
        best = (keys[:, a::2] @ keys[:, b::2].transpose(-2, -1)).max(dim=-1)
        order = best.values.topk(best.values.shape[1], dim=1).indices
        gone, stay = order.split(
            [tokens.patches - keep, order.shape[1] - tokens.patches + keep], dim=1
        )
        stay = stay.topk(stay.shape[1], dim=1, largest=False).values
        into = best.indices.gather(1, gone) + stay.shape[1]
        every_b = torch.arange(b, tokens.patches, 2, device=gone.device).expand(gone.shape[0], -1)
        return Merge(torch.cat([stay * 2 + a, every_b], dim=1), gone=gone * 2 + a, into=into)

    def fewest(self, patches: int) -> int:
        """Half: each merge takes one token of A, and A is half of all."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """The similarities between A and B."""
        a, b = _deal(prefix)
        count = rows - prefix
        return len(range(a, count, 2)) * len(range(b, count, 2)) * block.key_width


def _deal(prefix: int) -> tuple[int, int]:
    """The first patch of A and of B: rows of the whole sequence alternate, and row 0 is of A."""
    return prefix % 2, 1 - prefix % 2
