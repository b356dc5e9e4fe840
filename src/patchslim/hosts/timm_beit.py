"""timm's `Beit`: BEiT and BEiT v2, whose attention adds a bias by relative position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._relative import pick_bias
from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_flat import FlatHost
from patchslim.tokens.tokens import Tokens

MODULE = "timm.models.beit"


class TimmBeit(FlatHost):
    """timm `Beit`."""

    family: ClassVar[str] = "timm Beit"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.Beit"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions."""
        reason = overridden_reason(host, (MODULE,))
        if reason is not None:
            return reason
        for block in host.blocks:
            reason = foreign_class_reason("block", block, ("Block",)) or foreign_class_reason(
                "attention", block.attn, ("Attention",)
            )
            if reason is not None:
                return reason
        return None

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds patches, puts the class token before them, adds absolute positions if any."""
        x = host.patch_embed(images)
        x = torch.cat((host.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if host.pos_embed is not None:
            x = x + host.pos_embed
        grid = host.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        return Tokens(x=host.pos_drop(x), prefix=1, grid=(int(grid[0]), int(grid[1])))

    def bias(self, host: Any, index: int, queries: Tokens, keys: Tokens) -> Tensor | None:
        """Picks the bias of these rows from that of all rows: the block's own, and the shared."""
        attn = host.blocks[index].attn
        whole = None if attn.window_size is None else attn._get_rel_pos_bias()
        if host.rel_pos_bias is not None:
            shared = host.rel_pos_bias().unsqueeze(0)
            whole = shared if whole is None else whole + shared
        return None if whole is None else pick_bias(whole, queries, keys)

    def _has_relative_bias(self, host: Any) -> bool:
        own = any(block.attn.window_size is not None for block in host.blocks)
        return own or host.rel_pos_bias is not None

    def _pools_prefix(self, host: Any) -> bool:
        return False
