"""`tome`: merges the most similar pairs of tokens, matched by their keys.

Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), written from the paper.
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from patchslim.errors import BadSetting
from patchslim.methods import Method, Placement, Signals, Threshold
from patchslim.methods._matching import compare_sets, count_pairs, first_of_sets, match_sets
from patchslim.methods._sorting import rank_rows
from patchslim.tokens.merging import Merge
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

Matches: TypeAlias = torch.return_types.max


class ToMe(Method):
    """Merges the pairs of tokens with the most similar keys.

    With `proportional`, later attention weighs a token by the patches it stands for; the paper
    turns that off for masked-autoencoder weights without fine-tuning. With a `threshold`, all
    pairs merge whose similarity exceeds it, more in some images than in others, and the schedule
    is the most that an image keeps.
    """

    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    tuned_threshold = Threshold("threshold", first=0.1, cosine=True, top=0.99)
    reads = ("k",)

    def __init__(self, *, proportional: bool = True, threshold: float = 0.0) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise BadSetting(f"threshold={threshold}: a cosine between 0 (none) and 1.")
        self.proportional = proportional
        self.threshold = threshold
        self.adaptive = threshold > 0

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Splits tokens alternately into sets A and B, and merges the most similar pairs into B.

        The rows that stay are those of A and then those of B: the next split depends on the order.
        """
        a, b = first_of_sets(tokens.prefix)
        similarity = compare_sets(signals.keys(), tokens.prefix)
        if tokens.alive is not None:
            real = tokens.alive
            similarity = similarity.masked_fill(
                ~(real[:, a::2, None] & real[:, None, b::2]), -torch.inf
            )
        if self.adaptive:
            best = similarity.max(dim=-1)
            return self._merge_above_threshold(tokens, best, tokens.rows()[:, b::2], keep)
        return Merge(*match_sets(similarity, tokens.prefix, tokens.patches - keep))

    def _merge_above_threshold(
        self, tokens: Tokens, best: Matches, every_b: Tensor, keep: int
    ) -> Merge:
        """Merges the pairs above the threshold, and more if the schedule wants fewer rows."""
        a, _ = first_of_sets(tokens.prefix)
        rows = tokens.rows()
        real = torch.ones_like(rows, dtype=torch.bool) if tokens.alive is None else tokens.alive
        number = real.sum(dim=1, keepdim=True)
        merging = (best.values > self.threshold).sum(dim=1, keepdim=True)
        merging = torch.maximum(merging, number - keep)
        rank = rank_rows(best.values)
        goes = torch.zeros_like(real)
        goes[:, a::2] = (rank < merging) & real[:, a::2]
        to = rows.clone()
        to[:, a::2] = torch.where(goes[:, a::2], every_b.gather(1, best.indices), rows[:, a::2])
        # A and then B, as without a threshold, and then padding: the next split depends on it.
        side = torch.ones_like(rows)
        side[:, a::2] = 0
        key = (side + (goes | ~real) * 2) * tokens.patches + rows
        kept = key.topk(min(keep, tokens.patches), dim=1, largest=False).indices
        stays = real & ~goes
        padding = stays.gather(1, kept)
        place = torch.zeros_like(rows).scatter(
            1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        )
        return Merge(kept, gone=rows, into=place.gather(1, to), padding=padding, joins=goes)

    def fewest(self, patches: int) -> int:
        """Halves `patches`: each merge removes one token of A, which has half of all."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the similarities between A and B."""
        return count_pairs(rows - prefix, prefix) * block.key_width
