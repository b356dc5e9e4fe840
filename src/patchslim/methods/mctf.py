"""`mctf`: merges tokens that are similar, that little attends to, and that stand for few patches.

Lee, Choi, Kim, "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision
Transformers" (CVPR 2024).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from patchslim.methods import Method, Place, Placement, Signals
from patchslim.methods._matching import (
    ascending,
    compare_sets,
    count_pairs,
    first_of_sets,
    match_best,
)
from patchslim.settings import Range, check_value
from patchslim.tokens.merging import Merge
from patchslim.tokens.rows import take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

FEWEST = 9  # patches that always stay, as in the official code
LEAST = 1e-12  # the smallest attention that a patch counts as receiving
TAU = Range(0, 1e6, above=True)


class MCTF(Method):
    """Merges pairs by similarity, attention received and size, in both directions.

    Each `tau` is the temperature of its criterion: the larger, the less it counts. Attention is
    that of this block, computed before merging; its map is folded instead of computed again.
    """

    place = Place.ON_MAP
    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    proportional = True
    reads = ("x", "q", "k")

    def __init__(
        self, *, tau_similarity: float = 1.0, tau_attention: float = 20.0, tau_size: float = 40.0
    ) -> None:
        super().__init__()
        self.tau_similarity = check_value("tau_similarity", tau_similarity, float, TAU)
        self.tau_attention = check_value("tau_attention", tau_attention, float, TAU)
        self.tau_size = check_value("tau_size", tau_size, float, TAU)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Merges half of the pairs from A into B, and the others from B into what is left of A."""
        size, x = tokens.sizes(), tokens.x[:, tokens.prefix :]
        received = signals.attention_received(tokens.alive).to(size.dtype).clamp(min=LEAST)
        readiness = received ** (-1 / self.tau_attention) * size ** (-1 / self.tau_size)
        a, b = first_of_sets(tokens.prefix)
        similarity = (compare_sets(x.to(size.dtype), tokens.prefix) + 1) / 2
        score = similarity.clamp(min=0) ** (1 / self.tau_similarity)
        score = score * readiness[:, a::2, None] * readiness[:, None, b::2]

        count = tokens.patches - keep
        to_b = match_best(score, count // 2)
        left = ascending(to_b.stay)
        to_a = match_best(take(score, left).transpose(1, 2), count - count // 2)
        kept = torch.cat([left * 2 + a, to_a.stay * 2 + b], dim=1)
        gone = torch.cat([to_b.gone * 2 + a, to_a.gone * 2 + b], dim=1)
        # Where each row of B is now: merged into a row of A, or after the rows of A.
        place = torch.zeros_like(tokens.rows()[:, b::2])
        after = torch.arange(left.shape[1], kept.shape[1], device=kept.device)
        place = place.scatter(1, to_a.stay, after.expand_as(to_a.stay))
        place = place.scatter(1, to_a.gone, to_a.into)
        into = torch.cat([place.gather(1, to_b.into), to_a.into], dim=1)
        return Merge(kept, gone, into, weight=size * received)

    def fewest(self, patches: int) -> int:
        """Halves `patches`, but leaves nine."""
        return max(patches - patches // 2, min(patches, FEWEST))

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the similarities between A and B; the attention map is the block's own."""
        return count_pairs(rows - prefix, prefix) * block.width
