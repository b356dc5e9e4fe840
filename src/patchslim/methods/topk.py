"""`topk`: keeps the patches that the class token attends to most, and drops the others.

Haurum et al., "Which Tokens to Use?" (ICCV Workshops 2023), the Top-K baseline.
"""

from __future__ import annotations

from patchslim.methods import Method, Signals
from patchslim.tokens.reduction import Keep
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class TopK(Method):
    """Keeps the patches with the highest class attention, and drops the others."""

    needs_class_token: bool = True

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep:
        """Keeps the `keep` rows with the highest class attention."""
        return Keep(signals.class_attention().topk(keep, dim=1).indices)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one row of the attention map, a second time."""
        return block.attention_row_macs(rows)
