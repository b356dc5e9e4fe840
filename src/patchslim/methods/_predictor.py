"""`Predictor`: DynamicViT's network that says which patches are needed. Knows no method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KEEP_BIAS = 2.0  # a patch is kept with probability 0.88 at first, so training starts near the host
KEEP_INDEX = 0  # of the two predictions, the one for "keep", as in the authors' checkpoints


class Predictor(nn.Module):
    """Predicts for each patch the log-probabilities of keeping and of dropping it.

    Half of the channels describe the patch; the other half are averaged over all patches left.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.norm = nn.LayerNorm(width)
        self.features = nn.Sequential(nn.Linear(width, width), nn.GELU())
        self.verdict = nn.Sequential(
            nn.Linear(width, half),
            nn.GELU(),
            nn.Linear(half, quarter),
            nn.GELU(),
            nn.Linear(quarter, 2),
            nn.LogSoftmax(dim=-1),
        )
        layers = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(layers[-1].bias[KEEP_INDEX], KEEP_BIAS)

    def forward(self, x: Tensor, alive: Tensor | None) -> Tensor:
        """Predicts (B, n, 2) from patches x (B, n, C), of which `alive` (B, n) are left."""
        local, shared = self.features(self.norm(x)).chunk(2, dim=-1)
        if alive is None:
            whole = shared.mean(dim=1, keepdim=True)
        else:
            weight = alive.to(shared.dtype).unsqueeze(-1)
            # If no patch is left, the mean is 0.
            whole = (shared * weight).sum(dim=1, keepdim=True) / weight.sum(
                dim=1, keepdim=True
            ).clamp(min=1)
        verdict: Tensor = self.verdict(torch.cat([local, whole.expand_as(shared)], dim=-1))
        return verdict


def predictor_macs(width: int) -> int:
    """Counts the multiply-adds of a predictor for one patch."""
    half, quarter = width // 2, width // 4
    return width * width + width * half + half * quarter + quarter * 2
