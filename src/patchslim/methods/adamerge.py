"""`adamerge`: merges salient tokens into those that they resemble, and weighs each by its salience.

Lee, Go, Choi, "AdaMerge: Salience-Aware Adaptive Token Merging for Training-Free Acceleration of
Vision Transformers" (2026), written from the paper.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from patchslim.methods import Method, Place, Placement, Signals
from patchslim.methods._matching import ascending, match_best
from patchslim.tokens.merging import Merge
from patchslim.tokens.rows import mark_diagonal
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

LEAST = 1e-6  # of a salience, and of a length: no row may weigh nothing
TINY = 1e-30  # of the stretch of an image's saliences


class AdaMerge(Method):
    """Merges pairs across the halves of the sequence, by their cosine and by salience.

    A token is salient if many others attend to it by their plain features.
    """

    place = Place.BEFORE_BLOCK
    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    reads = ("x",)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Lets each row of the first half propose one of the second, and takes the best."""
        x = tokens.x[:, tokens.prefix :]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        affinity = x @ x.transpose(1, 2)
        # A column's sum less 1, from what patches give to others: large features give nearly all
        # to themselves, and sums of ones would differ by rounding alone.
        given = affinity.softmax(dim=2).masked_fill(mark_diagonal(affinity), 0)
        salience = given.sum(dim=1) - given.sum(dim=2)
        least, most = salience.amin(dim=1, keepdim=True), salience.amax(dim=1, keepdim=True)
        salience = ((salience - least) / (most - least).clamp(min=TINY)).clamp(min=LEAST)

        half = tokens.patches // 2
        length = x.norm(dim=2).clamp(min=LEAST)
        cosine = affinity[:, :half, half:] / length[:, :half, None] / length[:, None, half:]
        matched = match_best(salience[:, :half, None] * cosine, tokens.patches - keep)
        stay = ascending(matched.stay)
        kept = torch.cat([stay, tokens.rows()[:, half:]], dim=1)
        return Merge(kept, matched.gone, matched.into + stay.shape[1], weight=salience)

    def fewest(self, patches: int) -> int:
        """Halves `patches`: each merge removes one row of the first half."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the products of all patches."""
        return (rows - prefix) ** 2 * block.width
