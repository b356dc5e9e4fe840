"""`diffrate`: drops the least attended patches, and merges the next ones, at learned rates.

Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers" (ICCV
2023), written from the paper. `PUBLISHED` has the rates that its authors learned for DeiT-Ti.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

from patchslim.errors import UnknownName
from patchslim.methods import Method, Placement, Signals
from patchslim.settings import Range, check_value
from patchslim.tokens.merging import Merge
from patchslim.tokens.rows import take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

# Tokens left in each block by pruning and then by merging, class token included.
PUBLISHED = {
    "0.6": (
        (197, 196, 180, 157, 130, 107, 86, 73, 63, 51, 40, 3),
        (197, 187, 167, 139, 114, 90, 76, 66, 57, 45, 37, 3),
    ),
    "0.7": (
        (197, 196, 194, 180, 150, 123, 98, 82, 68, 60, 52, 3),
        (197, 196, 192, 158, 133, 103, 88, 72, 64, 58, 49, 3),
    ),
    "0.8": (
        (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3),
        (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3),
    ),
    "0.9": (
        (197, 197, 196, 190, 182, 166, 141, 125, 113, 105, 99, 3),
        (197, 196, 194, 188, 172, 147, 129, 115, 107, 103, 96, 3),
    ),
}


class DiffRate(Method):
    """Drops the least attended patches, and merges the next ones into the most similar that stay.

    A `preset` is a schedule that the authors learned for DeiT-Ti, named after its GMACs. Without
    one, `pruned` is the share that is dropped of the patches that go; the others are merged.
    """

    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    needs_class_token = True
    proportional = True
    reads = ("x", "k")

    def __init__(self, *, preset: str = "", pruned: float = 0.3) -> None:
        super().__init__()
        if preset and preset not in PUBLISHED:
            raise UnknownName.of("preset of diffrate", preset, PUBLISHED)
        self.preset = preset
        self.pruned: float = check_value("pruned", pruned, float, Range(0, 1))
        self.own_counts = tuple(map(min, *PUBLISHED[preset])) if preset else ()

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Sorts patches by class attention: the first stay, the last go, those between merge."""
        left = tokens.patches - round(self.pruned * (tokens.patches - keep))
        if self.preset:
            left = PUBLISHED[self.preset][0][signals.block] - 1
        order = signals.class_attention().topk(tokens.patches, dim=1).indices
        kept, merged = order[:, :keep], order[:, keep : max(keep, left)]
        x = F.normalize(tokens.x[:, tokens.prefix :], dim=2)
        similarity = take(x, merged) @ take(x, kept).transpose(1, 2)
        even = torch.ones_like(tokens.sizes())
        return Merge(kept, merged, into=similarity.argmax(dim=2), weight=even)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one row of the attention map, a second time, and the similarities."""
        merged = (rows - block.left) - round(self.pruned * (rows - block.left))
        return block.attention_row_macs(rows) + merged * (block.left - prefix) * block.width
