"""`tokenlearner`: a small network shows each new token which patches to look at.

Ryoo et al., "TokenLearner: Adaptive Space-Time Tokenization for Videos" (NeurIPS 2021), in the
form with a multilayer perceptron and a softmax over patches (version 1.1 of the authors' code).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.methods._slots import SlotMethod

HIDDEN = 64  # channels of the hidden layer, as in the authors' code
SPREAD = 4.0  # of the last weights at first, so that a map begins as a few patches, not as all


class Perceptron(nn.Module):
    """Gives each patch a logit for each slot, by two linear layers."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, HIDDEN)
        self.slots = nn.Linear(HIDDEN, slots)
        nn.init.normal_(self.slots.weight, std=SPREAD)

    def forward(self, patches: Tensor, count: int) -> Tensor:
        """Computes the logits (B, m, n) of the first `count` slots for patches (B, n, C)."""
        seen = F.gelu(self.hidden(self.norm(patches)))
        return F.linear(seen, self.slots.weight[:count], self.slots.bias[:count]).transpose(1, 2)


class TokenLearner(SlotMethod):
    """Makes each token that goes on a mean of all patches, by a learned map. Train it first.

    `slots` is how many maps each block has; a schedule uses the first of them.
    """

    layers = Perceptron

    def logit_macs(self, patches: int, left: int, width: int) -> int:
        """Counts the two layers for each patch."""
        return patches * HIDDEN * (width + left)
