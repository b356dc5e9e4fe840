"""The one attention function. Hosts hand over q, k, v and get the attended values back.

Everything that a reduced sequence needs of attention is said by one additive bias: the sizes of
merged tokens, a padding mask, a soft mask in training. Without any of it there is no bias and the
fused kernel of the dense model runs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.tokens.tokens import Tokens

MAX_EXPLICIT_KEYS = (
    320  # keys up to which a map is cheaper than the fused kernel where that one is slow
)
SOFT_MASK_EPS = (
    1e-6  # what a fully silenced token still weighs in training, so that gradients are finite
)


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
    """softmax(q k' * scale + bias) v, with q (B, H, n, d), k (B, H, N, d), v (B, H, N, e)."""
    if training and dropout == 0.0 and _is_explicit_faster(q, k):
        return attention_map(q, k, scale=scale, bias=bias) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def _is_explicit_faster(q: Tensor, k: Tensor) -> bool:
    """Whether training would wait for the fused kernel: in bfloat16 on a CPU, for its gradients."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return slow and q.requires_grad and k.shape[-2] <= MAX_EXPLICIT_KEYS


def attention_map(q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """The attention weights themselves (B, H, n, N), for whoever needs to see or fold them."""
    logits = (q * scale) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1)


def attention_bias(keys: Tokens, *, proportional: bool) -> Tensor | None:
    """What is added to the logits of each key, broadcastable to (B, H, queries, keys), or None.

    Args:
        keys: the tokens that are attended to.
        proportional: whether a token that stands for s patches weighs s times as much (ToMe).
    """
    bias: Tensor | None = None
    if proportional and keys.size is not None:
        bias = _broadcast_bias(keys.size.log().to(keys.x.dtype), keys.prefix)
    if keys.alive is not None:
        silent = _broadcast_bias(_mask_bias(keys.alive, keys.x.dtype), keys.prefix)
        if keys.alive.is_floating_point():
            silent = _unmask_self(silent)
        bias = silent if bias is None else bias + silent
    return bias


def _broadcast_bias(bias: Tensor, prefix: int) -> Tensor:
    """The bias of the patches (B, n) for all keys (B, 1, 1, N): none for the prefix."""
    return F.pad(bias, (prefix, 0))[:, None, None, :]


def _mask_bias(alive: Tensor, dtype: torch.dtype) -> Tensor:
    """The log weight of each key: exactly nothing for padding, nearly nothing for a soft mask."""
    if alive.is_floating_point():
        return (alive.float() + SOFT_MASK_EPS).log().to(dtype)
    lowest = torch.finfo(dtype).min
    return torch.zeros(alive.shape, dtype=dtype, device=alive.device).masked_fill(~alive, lowest)


def _unmask_self(bias: Tensor) -> Tensor:
    """The bias (B, 1, 1, N) as a matrix in which no token is silenced for itself (DynamicViT)."""
    own = torch.eye(bias.shape[-1], dtype=torch.bool, device=bias.device)
    return bias.expand(-1, -1, bias.shape[-1], -1).masked_fill(own, 0.0)
