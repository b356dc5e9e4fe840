"""`Signals`: what a block has computed when a method chooses, for the method to read.

It does not know which method reads it, nor which host computed it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.errors import BadSchedule, NeedsClassToken
from patchslim.tokens.attention import attention_map
from patchslim.tokens.spelling import is_by_product


@dataclass(frozen=True)
class Signals:
    """What a block has computed when a method chooses. Read-only.

    Attributes:
        prefix: how many leading rows are not patches.
        scale: the factor on the query-key product.
        q, k, v: queries, keys and values (B, H, N, d), prefix rows included. None if the method
            chooses before they are computed, or does not read them. At `Place.ON_QUERIES`, `q`
            has only the prefix rows.
        bias: what attention adds to its logits, or None.
        readout: computes how much the query of a pooling head attends to each patch (B, n), for
            hosts that have such a head instead of a class token.
        block: the number of the block, from 0.
        stride: 2 in a block that leaves only every second row and column of the grid, or 1.
        depth: how many blocks the host has.
        weights: the attention map (B, H, N, N), which is there at `Place.ON_MAP` only.
        entered: the features that entered the block (B, N, C), before attention was added to them;
            at `Place.BEFORE_FEED` only, and not in a packed batch.
    """

    prefix: int
    scale: float = 1.0
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    readout: Callable[[], Tensor] | None = None
    block: int = 0
    stride: int = 1
    depth: int = 1
    weights: Tensor | None = None
    entered: Tensor | None = None

    def keys(self) -> Tensor:
        """Averages the keys of the patches over the heads (B, n, d)."""
        if self.k is None:
            raise BadSchedule("Keys exist only inside a block; this method decides before it (P0).")
        # In the order in which most hosts compute them, so that no graph swaps axes for it.
        return self.k.transpose(1, 2).mean(dim=2)[:, self.prefix :]

    def class_attention(self) -> Tensor:
        """Computes how much the class token attends to each patch, averaged over heads (B, n).

        The softmax runs over all rows, so the patches' shares add up to less than one. In hosts
        with a pooling head, the query of that head takes the place of the class token.
        """
        if self.readout is not None:
            return self.readout()
        if not self.prefix or self.q is None or self.k is None:
            raise NeedsClassToken("There is no class token in this sequence to score patches by.")
        if is_by_product():
            logits = _product_by_head(self.q, self.k) * self.scale
        else:  # a matrix product would first copy the keys
            logits = (self.q[:, :, :1] * self.scale * self.k).sum(dim=-1)
        if self.bias is not None:
            logits = logits + self.bias[:, :, 0]
        return logits.softmax(dim=-1)[:, :, self.prefix :].mean(dim=1)

    def attention(self) -> Tensor:
        """Computes the whole attention map (B, H, N, N), prefix rows included."""
        if self.weights is not None:
            return self.weights
        if self.q is None or self.k is None:
            raise BadSchedule(
                "Attention maps exist only inside a block, and not where a host mixes those of its "
                "heads. This method reads them: decide inside a block, or take one that reads keys."
            )
        return attention_map(self.q, self.k, scale=self.scale, bias=self.bias)

    def attention_received(self, alive: Tensor | None) -> Tensor:
        """Computes how much all rows attend to each patch, averaged over rows and heads (B, n).

        Rows that are not `alive` (B, n) do not count as rows that attend.
        """
        weights = self.attention()[..., self.prefix :].mean(dim=1)
        if alive is None:
            return weights.mean(dim=1)
        counts = F.pad(alive.to(weights.dtype), (self.prefix, 0), value=1.0)
        return (weights * counts.unsqueeze(2)).sum(dim=1) / counts.sum(dim=1, keepdim=True)


def _product_by_head(q: Tensor, k: Tensor) -> Tensor:
    """Multiplies the first query with all keys: q and k (B, H, N, d) give (B, H, N).

    One product for all heads, of rows as the layer before has written them: each query meets the
    keys of the other heads with zeros. One product for each head would be too small to be fast.
    """
    heads = torch.arange(q.shape[1], device=q.device)
    own = heads[:, None, None] == heads
    apart = torch.where(own, q.transpose(1, 2)[:, 0].unsqueeze(3), 0)
    return (k.transpose(1, 2).flatten(2) @ apart.flatten(1, 2)).transpose(1, 2)
