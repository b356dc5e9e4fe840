"""Scores how much each position matters to a model's output: Patch Slimming, equation 6.

The score of row i after layer t sums, over all choices of one head in each layer,

    || A[:, i] U[i, :] ||^2,  A = P_L ... P_{t+1},  U = P_t |Z_{t-1}|,

where P are the attention maps, with the rows that each layer still outputs, and Z the features.
It is the product of two factors: how strongly the later layers read row i, and how much the row
carries. The first factor follows a recursion from the last layer down, so no path of heads is ever
listed. Sums over heads are means here: they rank alike, and cannot overflow. Knows only tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def importance_scores(weights: Tensor, entered: Tensor, later: Sequence[Tensor]) -> Tensor:
    """Returns the score of each row that a layer outputs (B, N).

    Args:
        weights: the attention maps of the layer (B, H, N, N).
        entered: the features that enter it (B, N, C).
        later: the maps of the layers after it, in order (B, H, rows output, rows read).
    """
    return read_strength(later, weights) * attended_energy(weights, entered)


def read_strength(later: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Returns how strongly the last layer's output reads each row (B, N), as a mean over heads."""
    if not later:
        return weights.new_ones(weights.shape[0], weights.shape[2])
    gram = torch.eye(later[-1].shape[2], dtype=weights.dtype, device=weights.device)[None, None]
    for each in reversed(later):
        gram = (each.transpose(2, 3) @ gram @ each).mean(dim=1, keepdim=True)
    return gram[:, 0].diagonal(dim1=1, dim2=2)


def attended_energy(weights: Tensor, entered: Tensor) -> Tensor:
    """Returns how much each row carries (B, N), as a mean over heads."""
    return (weights @ entered.abs()[:, None]).square().sum(dim=3).mean(dim=1)
