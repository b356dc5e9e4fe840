"""`sit`: a slimming module that makes each new token of all patches, with a learned temperature.

Zong et al., "Self-slimmed Vision Transformer" (ECCV 2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.methods._slots import SlotMethod

SHARPNESS = 32.0  # of the logits at first, so that a token begins as a few patches, not as all


class SlimmingModule(nn.Module):
    """Gives each patch a logit for each slot, by two linear layers and one factor for all."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width // 2)
        self.slots = nn.Linear(width // 2, slots)
        self.scale = nn.Parameter(torch.tensor(SHARPNESS))  # the inverse of the temperature
        nn.init.normal_(self.slots.weight, std=(width // 2) ** -0.5)

    def forward(self, patches: Tensor, count: int) -> Tensor:
        """Computes the logits (B, m, n) of the first `count` slots for patches (B, n, C)."""
        seen = F.gelu(self.hidden(self.norm(patches)))
        logits = F.linear(seen, self.slots.weight[:count], self.slots.bias[:count])
        return self.scale * logits.transpose(1, 2)


class SiT(SlotMethod):
    """Makes each token that goes on a mean of all patches, by slimming modules. Train it first.

    `slots` is how many tokens a module can make; a schedule uses the first of them.
    """

    layers = SlimmingModule

    def logit_macs(self, patches: int, left: int, width: int) -> int:
        """Counts the two layers for each patch."""
        return patches * (width // 2) * (width + left)
