"""`patchmerger`: learned queries, each of which makes one token of all patches.

Renggli et al., "Learning to Merge Tokens in Vision Transformers" (2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchslim.methods._slots import SlotMethod


class Queries(nn.Module):
    """Compares normalised patches with learned queries, one for each slot."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(slots, width))

    def forward(self, patches: Tensor, count: int) -> Tensor:
        """Computes the logits (B, m, n) of the first `count` slots for patches (B, n, C)."""
        logits: Tensor = self.queries[:count] @ self.norm(patches).transpose(1, 2)
        return logits


class PatchMerger(SlotMethod):
    """Makes each token that goes on a mean of all patches, by a learned query. Train it first.

    `slots` is how many queries each block has; a schedule uses the first of them.
    """

    layers = Queries

    def logit_macs(self, patches: int, left: int, width: int) -> int:
        """Counts one dot product of each query with each patch."""
        return left * patches * width
