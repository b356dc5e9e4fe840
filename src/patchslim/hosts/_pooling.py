"""Pooling of patch rows by heads: a merged row counts as many as it stands for.

A row that is not alive counts as none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.tokens.tokens import Tokens


def mean_of_patches(tokens: Tokens, x: Tensor) -> Tensor:
    """Averages the patch rows of x (B, N, C): a merged row weighs as many as it stands for."""
    weight = tokens.sizes() if tokens.alive is None else tokens.sizes() * tokens.alive
    total = weight.sum(dim=1, keepdim=True).clamp(min=1)  # the mean of nothing is 0
    share = (weight / total).to(x.dtype).unsqueeze(2)
    return (x[:, tokens.prefix :] * share).sum(dim=1)


def log_sizes(tokens: Tokens, dtype: torch.dtype) -> Tensor | None:
    """Computes what is added to a pooling query's logits of patch rows (B, n); None for nothing."""
    if tokens.size is None and tokens.alive is None:
        return None
    weight = tokens.sizes() if tokens.alive is None else tokens.sizes() * tokens.alive
    return weight.clamp(min=torch.finfo(weight.dtype).tiny).log().to(dtype)
