"""The gates of `patch_slimming_dynamic`, fitted to the exact score of Patch Slimming.

A gate is linear in the normalised channels of a patch, and what it is to tell is the log of the
score, less its mean over the image, since only the order within an image counts. So the best gate
is the solution of one small system of equations: no training, no settings, the same every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.calibration.patch_slimming.layer_search import LayerSearch
from patchslim.calibration.patch_slimming.result import PatchSlimmingResult

RIDGE = 1e-3  # of the mean square of the channels, so that there is always one solution


@torch.no_grad()
def fit_gate(walk: LayerSearch, found: PatchSlimmingResult, block: int) -> tuple[Tensor, float]:
    """The weights (1, C) of one block's gate, and how well it tells the score (R squared)."""
    known = PatchSlimmingResult(
        found.cells, tuple(each for each in found.layers if each.block > block)
    )
    width = walk.features.tokens_before(block)[0].x.shape[2]
    square = torch.zeros(width, width, dtype=torch.float64)
    product, spread = torch.zeros(width, 1, dtype=torch.float64), 0.0
    for tokens, scores in zip(
        walk.features.tokens_before(block), walk.scores(known, block), strict=True
    ):
        patches = tokens.x[:, tokens.prefix :]
        told = _center(F.layer_norm(patches, patches.shape[-1:]).double().cpu()).flatten(0, 1)
        logs = scores.double().cpu().clamp(min=1e-300).log()[..., None]
        wanted = _center(logs).flatten(0, 1)
        square += told.T @ told
        product += told.T @ wanted
        spread += float(wanted.square().sum())
    ridge = RIDGE * square.diagonal().mean() * torch.eye(width, dtype=square.dtype)
    weights = torch.linalg.solve(square + ridge, product)
    explained = 2 * (weights * product).sum() - (weights * (square @ weights)).sum()
    return weights.T, float(explained) / max(spread, 1e-30)


def _center(values: Tensor) -> Tensor:
    """The values (B, n, c), less their mean over each image."""
    return values - values.mean(dim=1, keepdim=True)
