"""`representation_shift`: keeps the patches that attention changes most.

Choi et al., "Representation Shift: Unifying Token Compression with FlashAttention" (ICCV 2025),
written from the paper.
"""

from __future__ import annotations

import torch

from patchslim.errors import BadSchedule
from patchslim.methods import Method, Signals
from patchslim.tokens.reduction import Keep
from patchslim.tokens.tokens import Tokens


class RepresentationShift(Method):
    """Keeps the patches that this block's attention has moved farthest, and drops the others.

    It reads no attention map and no class token.
    """

    reads = ("x",)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep:
        """Keeps the `keep` rows whose features differ most from those that entered the block."""
        if signals.entered is None:
            raise BadSchedule("What entered the block is known between attention and feed-forward.")
        shift = (tokens.x - signals.entered)[:, tokens.prefix :]
        length = shift.to(torch.promote_types(shift.dtype, torch.float32)).norm(dim=2)
        return Keep(length.topk(keep, dim=1).indices)
