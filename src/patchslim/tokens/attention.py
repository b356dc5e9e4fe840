"""The one attention function: hosts hand over q, k, v and get the attended values back.

What a reduced sequence needs is added to the logits as one bias: the sizes of merged tokens, a
padding mask, or a soft mask in training. If it needs none of these there is no bias, and the same
fused kernel runs as in the dense model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.tokens.rows import mark_diagonal
from patchslim.tokens.tokens import Tokens

# With up to this many keys an explicit attention map is faster than the fused kernel, on devices
# where the fused kernel is slow.
MAX_EXPLICIT_KEYS = 320
# The weight of a fully masked token in training. Above zero, so that its logarithm and the
# gradients stay finite.
SOFT_MASK_EPS = 1e-6


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Computes softmax(q k' * scale + bias) v; q (B, H, n, d), k (B, H, N, d), v (B, H, N, e)."""
    if training and dropout == 0.0 and _is_explicit_faster(q, k):
        return attention_map(q, k, scale=scale, bias=bias) @ v
    attended = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale
    )
    # Where each head has a bias of its own, kernels lay out what they return in different ways, and
    # a graph that was traced with one is converted with another.
    own_bias = bias is not None and bias.shape[1] > 1
    if own_bias and torch.compiler.is_compiling():
        return attended.clone(memory_format=torch.contiguous_format)
    return attended


def _is_explicit_faster(q: Tensor, k: Tensor) -> bool:
    """Tells whether the fused kernel is the slow one here: its gradients in bfloat16 on a CPU."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return slow and q.requires_grad and k.shape[-2] <= MAX_EXPLICIT_KEYS


def attention_map(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Computes the attention weights themselves (B, H, n, N)."""
    logits = (q * scale) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


def attention_bias(keys: Tokens, *, proportional: bool) -> Tensor | None:
    """Makes the bias that is added to the logits of each key, or None if there is none.

    It can be broadcast to (B, H, queries, keys).

    Args:
        keys: the tokens that are attended to.
        proportional: whether a token that stands for s patches weighs s times as much (ToMe).
    """
    bias: Tensor | None = None
    if proportional and keys.size is not None:
        bias = _broadcast_bias(keys.size.log().to(keys.x.dtype), keys.prefix)
    if keys.alive is not None:
        mask = _broadcast_bias(_mask_bias(keys.alive, keys.x.dtype), keys.prefix)
        if keys.alive.is_floating_point():
            mask = _unmask_self(mask)
        bias = mask if bias is None else bias + mask
    return bias


def _broadcast_bias(bias: Tensor, prefix: int) -> Tensor:
    """Turns a bias of the patches (B, n) into one of all keys (B, 1, 1, N), 0 for the prefix."""
    return F.pad(bias, (prefix, 0))[:, None, None, :]


def _mask_bias(alive: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns a mask of keys into what is added to their logits."""
    if alive.is_floating_point():
        return (alive.float() + SOFT_MASK_EPS).log().to(dtype)
    lowest = torch.finfo(dtype).min
    return torch.zeros(alive.shape, dtype=dtype, device=alive.device).masked_fill(~alive, lowest)


def _unmask_self(bias: Tensor) -> Tensor:
    """Makes a matrix of the bias (B, 1, 1, N); every token still sees itself (DynamicViT)."""
    square = bias.expand(-1, -1, bias.shape[-1], -1)
    return square.masked_fill(mark_diagonal(square), 0.0)
