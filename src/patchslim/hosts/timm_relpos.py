"""timm's `VisionTransformerRelPos`: a ViT whose attention adds a bias by relative position.

The bias comes from a table, or from a small network on the logarithm of distances; each block has
one of its own, or all blocks share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._macs import linear_macs
from patchslim.hosts._relative import pick_bias
from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_flat import FlatHost
from patchslim.tokens.shapes import HostShape
from patchslim.tokens.tokens import Tokens

MODULE = "timm.models.vision_transformer_relpos"


class TimmRelPos(FlatHost):
    """timm `VisionTransformerRelPos`."""

    family: ClassVar[str] = "timm VisionTransformerRelPos"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.VisionTransformerRelPos"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks, attentions and biases."""
        reason = overridden_reason(host, (MODULE,))
        if reason is not None:
            return reason
        for block in host.blocks:
            reason = foreign_class_reason(
                "block", block, ("RelPosBlock", "ResPostRelPosBlock")
            ) or foreign_class_reason("attention", block.attn, ("RelPosAttention",))
            if reason is not None:
                return reason
        reasons = (
            foreign_class_reason("relative position", each, ("RelPosMlp", "RelPosBias"))
            for each in _tables(host)
        )
        return next((reason for reason in reasons if reason is not None), None)

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds patches, and puts the class token before them if there is one."""
        x = host.patch_embed(images)
        if host.cls_token is not None:
            x = torch.cat((host.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        grid = host.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        shared = host.shared_rel_pos
        return Tokens(
            x=x,
            prefix=int(host.num_prefix_tokens),
            grid=(int(grid[0]), int(grid[1])),
            # The table of positions of all blocks, which the host also makes once.
            rotary=None if shared is None else shared.get_bias(),
        )

    def bias(self, host: Any, index: int, queries: Tokens, keys: Tokens) -> Tensor | None:
        """Picks the bias of these rows from that of all rows."""
        own = host.blocks[index].attn.rel_pos
        whole = keys.rotary if own is None else own.get_bias()
        return None if whole is None else pick_bias(whole, queries, keys)

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs. A network that makes a bias runs once for all rows."""
        shape = super().shape(host, image_size)
        network = sum(
            linear_macs(table.mlp) * table.rel_coords_log[..., 0].numel()
            for table in _tables(host)
            if hasattr(table, "mlp")
        )
        return replace(shape, head=shape.head + network)

    def _has_relative_bias(self, host: Any) -> bool:
        return bool(_tables(host))

    def _pools_prefix(self, host: Any) -> bool:
        return False


def _tables(host: Any) -> list[Any]:
    """Lists the modules that make a bias: one that all blocks share, or one in each."""
    found = [host.shared_rel_pos, *(block.attn.rel_pos for block in host.blocks)]
    return [each for each in found if each is not None]
