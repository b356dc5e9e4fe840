"""`saint`: drops the patches that have many similar neighbours.

Jeddi et al., "Similarity-Aware Token Pruning: Your VLM but Faster" (2025), written from the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from patchslim.methods import Method, Placement, Signals
from patchslim.methods._matching import compare_sets, count_pairs, match_sets
from patchslim.settings import Range, check_value
from patchslim.tokens.reduction import Keep
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class SAINT(Method):
    """Drops every second patch that many of the others resemble.

    Two patches are neighbours if the cosine of their keys is at least `threshold`. `gamma` says how
    much it counts how far the neighbours of a patch are above it, beside how many they are.
    """

    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    reads = ("k",)

    def __init__(self, *, threshold: float = 0.7, gamma: float = 10.0) -> None:
        super().__init__()
        self.threshold: float = check_value("threshold", threshold, float, Range(0, 1))
        self.gamma: float = check_value("gamma", gamma, float, Range(0, 100))

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep:
        """Scores the rows of A by their neighbours in B, and drops those of the highest scores."""
        similarity = compare_sets(signals.keys(), tokens.prefix)
        similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
        near = similarity >= self.threshold
        count = near.sum(dim=2)
        excess = torch.where(near, similarity - self.threshold, 0.0).sum(dim=2)
        crowded = count * (self.gamma * excess / count.clamp(min=1)).exp()
        alone = similarity.mean(dim=2)  # below one, which is the least of the others' scores
        score = torch.where(count > 0, crowded, alone).unsqueeze(2)
        kept, _, _ = match_sets(score.expand_as(similarity), tokens.prefix, tokens.patches - keep)
        return Keep(kept)

    def fewest(self, patches: int) -> int:
        """Halves `patches`: those that may go are half of all."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the similarities between A and B."""
        return count_pairs(rows - prefix, prefix) * block.key_width
