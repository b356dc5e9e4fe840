"""How much a position matters to what a model gives out: the score of Patch Slimming (eq. 6).

The score of row i after layer t sums, over all choices of one head a layer,

    || A[:, i] U[i, :] ||^2,  A = P_L ... P_{t+1},  U = P_t |Z_{t-1}|,

with P the attention maps, whose rows are those that each layer still gives out. It is the product
of how strongly the later layers read row i and how much it carries, and the first of the two obeys
a recursion from the last layer down, so no path is ever listed. Sums over heads are means here,
which rank alike and cannot overflow. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def importance_scores(weights: Tensor, entered: Tensor, later: Sequence[Tensor]) -> Tensor:
    """The score of each row that a layer gives out (B, N).

    Args:
        weights: the layer's own attention maps (B, H, N, N).
        entered: the features that entered it (B, N, C).
        later: the maps of the layers after it, in their order, (B, H, rows given out, rows read).
    """
    return read_strength(later, weights) * attended_energy(weights, entered)


def read_strength(later: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The mean over head paths of how strongly what is given out at last reads each row (B, N)."""
    if not later:
        return weights.new_ones(weights.shape[0], weights.shape[2])
    gram = torch.eye(later[-1].shape[2], dtype=weights.dtype, device=weights.device)[None, None]
    for each in reversed(later):
        gram = (each.transpose(2, 3) @ gram @ each).mean(dim=1, keepdim=True)
    return gram[:, 0].diagonal(dim1=1, dim2=2)


def attended_energy(weights: Tensor, entered: Tensor) -> Tensor:
    """The mean over heads of how much each row takes in (B, N)."""
    return (weights @ entered.abs()[:, None]).square().sum(dim=3).mean(dim=1)
