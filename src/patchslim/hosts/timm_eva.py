"""timm's `Eva`: EVA, EVA-02, DINOv3, Perception Encoder and the like, with rotary positions.

A token keeps the rotary position of the grid cell it comes from, wherever it stands in the
sequence; a merged token keeps that of the token into which the group was merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_flat import FlatHost
from patchslim.tokens.tokens import Tokens


class TimmEva(FlatHost):
    """timm `Eva` with pre-norm and post-norm blocks."""

    family: ClassVar[str] = "timm Eva"
    host_classes: ClassVar[frozenset[str]] = frozenset({"timm.models.eva.Eva"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions, patch dropout."""
        methods = ("forward", "forward_features", "forward_head", "pool")
        reason = overridden_reason(host, ("timm.models.eva",), methods)
        if reason is not None:
            return reason
        if host.patch_drop is not None:
            return "it drops patches at random (patch_drop_rate). Build it with patch_drop_rate=0."
        for block in host.blocks:
            reason = foreign_class_reason("block", block, ("EvaBlock", "EvaBlockPostNorm"))
            if reason is None:
                reason = foreign_class_reason(
                    "attention", block.attn, ("EvaAttention", "AttentionRope")
                )
            if reason is not None:
                return reason
        return None

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds patches, adds positions and prefix tokens, notes the table of rotary positions."""
        x, rotary = host._pos_embed(host.patch_embed(images))
        grid = host.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        return Tokens(
            x=host.norm_pre(x),
            prefix=int(host.num_prefix_tokens),
            grid=(int(grid[0]), int(grid[1])),
            rotary=rotary,
        )

    def _table(self, host: Any, index: int, tokens: Tokens) -> Tensor | None:
        if tokens.rotary is None or not getattr(host, "rope_mixed", False):
            return tokens.rotary
        return tokens.rotary[index]

    def _pools_prefix(self, host: Any) -> bool:
        return host.attn_pool is not None
