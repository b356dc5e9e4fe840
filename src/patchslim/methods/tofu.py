"""`tofu`: drops matched tokens in the first half of the blocks, and merges them in the second.

Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging" (WACV 2024),
written from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.methods import Method, Placement, Signals
from patchslim.methods._matching import compare_sets, count_pairs, match_sets
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import Keep
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

LEAST_NORM = 1e-6  # of a mean: below it, no direction is left to be scaled


@dataclass(frozen=True)
class NormMerge(Merge):
    """A `Merge` whose rows are as long as the longest row of their group (MLERP)."""

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Averages rows as a `Merge` does, and then scales the means of features."""
        out = super().move(t, weight=weight, total=total, prefix=prefix)
        if weight is None or t.ndim != 3 or not self.gone.shape[1]:
            return out
        norm = t[:, prefix:].to(torch.promote_types(t.dtype, torch.float32)).norm(dim=2)
        groups = torch.arange(self.kept.shape[1], device=t.device).unsqueeze(1)
        joining = norm.gather(1, self.gone).unsqueeze(1)
        longest = torch.where(self.into.unsqueeze(1) == groups, joining, 0).amax(dim=2)
        longest = torch.maximum(longest, norm.gather(1, self.kept))
        mean = out[:, prefix:]
        scale = longest / mean.to(norm.dtype).norm(dim=2).clamp(min=LEAST_NORM)
        return torch.cat([out[:, :prefix], mean * scale.unsqueeze(2).to(t.dtype)], dim=1)


class ToFu(Method):
    """Matches patches as ToMe does; drops them early, and merges them late, keeping their norm."""

    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    reads = ("k",)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep | Merge:
        """Matches the most similar pairs of A and B; the row of A is dropped, or joins its pair."""
        similarity = compare_sets(signals.keys(), tokens.prefix)
        kept, gone, into = match_sets(similarity, tokens.prefix, tokens.patches - keep)
        if signals.block <= signals.depth / 2:
            return Keep(kept)
        return NormMerge(kept, gone, into, weight=torch.ones_like(tokens.sizes()))

    def fewest(self, patches: int) -> int:
        """Halves `patches`: each match removes one token of A, which has half of all."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the similarities between A and B."""
        return count_pairs(rows - prefix, prefix) * block.key_width
