"""`evit`: keeps the patches that the class token attends to most, and fuses the others.

Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations" (ICLR 2022).
"""

from __future__ import annotations

from patchslim.methods import Method, Signals
from patchslim.tokens.reduction import Fuse, Keep
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class EViT(Method):
    """Keeps the attentive patches; with `fuse`, adds a row that is the weighted sum of the others.

    The weights are the class attention, not normalised again. Later blocks treat the fused row
    like any other: they keep it, drop it or fuse it again.
    """

    needs_class_token: bool = True

    def __init__(self, *, fuse: bool = True) -> None:
        super().__init__()
        self.fuse = fuse
        self.extra_rows = int(fuse)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep | Fuse:
        """Keeps the rows with the highest class attention, and fuses the others."""
        attentive = signals.class_attention()
        kept = attentive.topk(keep - self.extra_rows, dim=1).indices
        if not self.fuse:
            return Keep(kept)
        return Fuse(kept, share=attentive.scatter(1, kept, 0.0))

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one row of the attention map, a second time, and the weighted sum."""
        return block.attention_row_macs(rows) + self.extra_rows * (rows - prefix) * block.width
