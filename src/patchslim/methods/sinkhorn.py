"""`sinkhorn`: shares patches out evenly among learned centres, by optimal transport.

Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers" (ICCV
Workshops 2023), which takes it as a soft clustering to compare others with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.methods._slots import SlotMethod
from patchslim.settings import Range, check_value


class Centres(nn.Module):
    """Computes the cosines of patches with learned centres, one for each slot."""

    def __init__(self, width: int, slots: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(slots, width))

    def forward(self, patches: Tensor, count: int) -> Tensor:
        """Computes the cosines (B, m, n) of the first `count` centres with patches (B, n, C)."""
        centres = F.normalize(self.centres[:count], dim=1)
        cosines: Tensor = centres @ F.normalize(patches, dim=2).transpose(1, 2)
        return cosines


class Sinkhorn(SlotMethod):
    """Makes each token that goes on a mean of patches near a learned centre. Train it first.

    Every patch gives as much in all, and every centre gets as much. `epsilon` is how far they
    spread, `rounds` how often both are evened out, `slots` how many centres each block has.
    """

    layers = Centres

    def __init__(self, *, epsilon: float = 0.01, rounds: int = 3, slots: int = 196) -> None:
        super().__init__(slots=slots)
        self.epsilon = check_value("epsilon", epsilon, float, Range(1e-4, 1e4))
        self.rounds = check_value("rounds", rounds, int, Range(1, 1000))

    def shares(self, logits: Tensor) -> Tensor:
        """Evens out what patches give and what centres get, in turns, ending with centres."""
        logits = logits / self.epsilon
        for _ in range(self.rounds):
            logits = logits.log_softmax(dim=1).log_softmax(dim=2)
        return logits.exp()

    def logit_macs(self, patches: int, left: int, width: int) -> int:
        """Counts one dot product of each centre with each patch."""
        return left * patches * width
