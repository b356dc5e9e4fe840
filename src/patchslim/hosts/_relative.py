"""Bias by relative position of the rows that are left, picked from what the host adds to all rows.

A token keeps the grid cell that it comes from, so its bias to any other is the host's own, however
few are left and in whatever order.
"""

from __future__ import annotations

from torch import Tensor

from patchslim.tokens.rows import with_prefix
from patchslim.tokens.tokens import Tokens


def pick_bias(whole: Tensor, queries: Tokens, keys: Tokens) -> Tensor:
    """Picks from the bias of the whole sequence (1, heads, N, N) that of these rows.

    Prefix rows stand first in both.
    """
    if queries.position is None and keys.position is None and queries.whole is None:
        return whole
    down, across = (with_prefix(each.cells(), each.prefix) for each in (queries, keys))
    picked = whole[0][:, down.unsqueeze(2), across.unsqueeze(1)]
    return picked.transpose(0, 1)
