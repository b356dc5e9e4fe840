"""`tps`: drops the least attended patches, and squeezes each into the most similar one that stays.

Wei et al., "Joint Token Pruning and Squeezing Towards More Aggressive Compression of Vision
Transformers" (CVPR 2023), in the form without parameters (eTPS).
"""

from __future__ import annotations

import torch

from patchslim.methods import Method, Signals
from patchslim.methods._matching import compare_rows
from patchslim.tokens.merging import Merge
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class TPS(Method):
    """Keeps the attended patches; each other joins the most similar, the more so the more alike."""

    needs_class_token: bool = True

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Weighs a row that joins by exp(cosine), and the row that it joins by e."""
        order = signals.class_attention().topk(tokens.patches, dim=1).indices
        kept, gone = order[:, :keep], order[:, keep:]
        x = tokens.x[:, tokens.prefix :]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        alike = compare_rows(x, gone, kept).max(dim=2)
        itself = torch.ones_like(tokens.sizes())  # the cosine of a row with itself
        return Merge(kept, gone, alike.indices, weight=itself.scatter(1, gone, alike.values).exp())

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one row of the attention map, a second time, and the similarities."""
        compared = (rows - block.left) * (block.left - prefix) * block.width
        return block.attention_row_macs(rows) + compared
