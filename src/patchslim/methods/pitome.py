"""`pitome`: merges patches that many others resemble, and protects the rest.

Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging" (NeurIPS 2024),
written from the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from patchslim.methods import Method, Placement, Signals
from patchslim.methods._matching import match_best
from patchslim.tokens.merging import Merge
from patchslim.tokens.rows import take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MARGIN = 0.75  # of the first block: the cosine from which on patches count as alike


class PiToMe(Method):
    """Merges pairs of patches of high energy, which many others resemble; protects the rest.

    In the first half of the blocks all patches are matched; after that twice as many as are to go.
    """

    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    reads = ("k",)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Sorts patches by energy, splits them alternately, and merges the most similar pairs."""
        count = tokens.patches - keep
        keys = F.normalize(signals.keys(), dim=2)
        similarity = keys @ keys.transpose(1, 2)
        margin = MARGIN * (1 - signals.block / signals.depth)
        energy = F.elu(similarity - margin).mean(dim=2)
        order = energy.topk(tokens.patches, dim=1).indices
        late = signals.block >= signals.depth / 2
        mergeable, protected = order.split([2 * count, tokens.patches - 2 * count], dim=1)
        if not late:
            mergeable, protected = order, order[:, :0]
        a, b = mergeable[:, ::2], mergeable[:, 1::2]
        pairs = take(take(similarity, a).transpose(1, 2), b).transpose(1, 2)
        matched = match_best(pairs, count)
        kept = torch.cat([b, a.gather(1, matched.stay), protected], dim=1)
        return Merge(kept, gone=a.gather(1, matched.gone), into=matched.into)

    def fewest(self, patches: int) -> int:
        """Halves `patches`: each merge needs two of them."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the similarities of all patches."""
        return (rows - prefix) ** 2 * block.key_width
