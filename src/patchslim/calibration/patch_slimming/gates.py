"""Fits the gates of `patch_slimming_dynamic` to the exact score of Patch Slimming.

A gate is a linear function of a patch's normalised channels. It predicts the logarithm of the
score, less its mean over the image, since only the order within an image matters. Its best weights
solve one small system of linear equations. So nothing is trained, there are no settings, and the
result is the same every time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.calibration.patch_slimming.layer_search import LayerSearch
from patchslim.calibration.patch_slimming.result import PatchSlimmingResult

RIDGE = 1e-3  # of the channels' mean square, so that the system always has one solution


@torch.no_grad()
def fit_gate(
    layer_search: LayerSearch, result: PatchSlimmingResult, block: int
) -> tuple[Tensor, float]:
    """Fits the gate of one block.

    Returns:
        Its weights (1, C), and how well it predicts the score (R squared).
    """
    above = PatchSlimmingResult(
        result.cells, tuple(layer for layer in result.layers if layer.block > block)
    )
    entering = layer_search.features.tokens_before(block)
    width = entering[0].x.shape[2]
    gram = torch.zeros(width, width, dtype=torch.float64)
    product, variance = torch.zeros(width, 1, dtype=torch.float64), 0.0
    for tokens, scores in zip(entering, layer_search.scores(above, block), strict=True):
        patches = tokens.x[:, tokens.prefix :]
        inputs = _center(F.layer_norm(patches, patches.shape[-1:]).double().cpu()).flatten(0, 1)
        logs = scores.double().cpu().clamp(min=1e-300).log()[..., None]
        targets = _center(logs).flatten(0, 1)
        gram += inputs.T @ inputs
        product += inputs.T @ targets
        variance += float(targets.square().sum())
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
    weights = torch.linalg.solve(gram + ridge, product)
    explained = 2 * (weights * product).sum() - (weights * (gram @ weights)).sum()
    return weights.T, float(explained) / max(variance, 1e-30)


def _center(values: Tensor) -> Tensor:
    """Subtracts from the values (B, n, c) their mean over each image."""
    return values - values.mean(dim=1, keepdim=True)
