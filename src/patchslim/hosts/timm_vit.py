"""timm's `VisionTransformer` in all its variants: one adapter, five kinds of block.

Class token or none, distillation token, registers, LayerScale, QK-norm, scale-norm, gated
attention, pre-norm, post-norm and parallel blocks, differential attention, every pooling.
Parallel attentions and differential maps are served as more heads of one attention call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_flat import FlatHost
from patchslim.hosts._timm_vit_blocks import attentions
from patchslim.tokens.tokens import Tokens

BLOCK_NAMES = (
    "Block",
    "ResPostBlock",
    "ParallelThingsBlock",
    "ParallelScalingBlock",
    "DiffParallelScalingBlock",
)


class TimmVit(FlatHost):
    """timm `VisionTransformer` and `VisionTransformerDistilled`."""

    family: ClassVar[str] = "timm VisionTransformer"
    host_classes: ClassVar[frozenset[str]] = frozenset(
        {"timm.models.vision_transformer.VisionTransformer"}
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions, patch dropout."""
        known = ("timm.models.vision_transformer", "timm.models.deit")
        methods = ("forward", "forward_features", "forward_head", "pool")
        reason = overridden_reason(host, known, methods)
        if reason is not None:
            return reason
        if not isinstance(host.patch_drop, nn.Identity):
            return "it drops patches at random (patch_drop_rate). Build it with patch_drop_rate=0."
        for block in host.blocks:
            reason = foreign_class_reason("block", block, BLOCK_NAMES)
            for attn in [] if reason else attentions(block):
                if attn is not block:
                    reason = reason or foreign_class_reason(
                        "attention", attn, ("Attention", "DiffAttention")
                    )
            if reason is not None:
                return reason
        return None

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds patches; adds positions and prefix tokens; applies the norm before the blocks."""
        x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
        grid = host.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        return Tokens(x=x, prefix=int(host.num_prefix_tokens), grid=(int(grid[0]), int(grid[1])))

    def _pools_prefix(self, host: Any) -> bool:
        return bool(host.pool_include_prefix)
