"""timm's `NaFlexVit` on images: its blocks are those of `VisionTransformer`, or those of `Eva`.

Images of one size a batch, of any size that its patches divide. Batches of patches of several
sizes, which the host also takes, have no grid in common and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor

from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_flat import FlatHost
from patchslim.hosts._timm_vit_blocks import BLOCK_KINDS
from patchslim.tokens.tokens import Tokens

MODULE = "timm.models.naflexvit"
BLOCKS = ("EvaBlock", *BLOCK_KINDS)
ATTENTIONS = ("Attention", "DiffAttention", "EvaAttention", "AttentionRope")


class TimmNaflex(FlatHost):
    """timm `NaFlexVit`."""

    family: ClassVar[str] = "timm NaFlexVit"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.NaFlexVit"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions, patch dropout."""
        methods = ("forward", "forward_features", "forward_head", "_forward_embeds", "_pool")
        reason = overridden_reason(host, (MODULE,), methods)
        if reason is not None:
            return reason
        if host.patch_drop is not None:
            return "it drops patches at random (patch_drop_rate). Build it with patch_drop_rate=0."
        for block in host.blocks:
            reason = foreign_class_reason("block", block, BLOCKS)
            if reason is None and hasattr(block, "attn"):
                reason = foreign_class_reason("attention", block.attn, ATTENTIONS)
            if reason is not None:
                return reason
        return None

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses all but multiples of the patch; nothing where the host pads images."""
        height, width = host.embeds.patch_size
        if host.embeds.dynamic_img_pad or not (size[0] % height or size[1] % width):
            return None
        return f"height and width must be multiples of the patch, {height}x{width}."

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embedding, and notes the table of rotary positions."""
        embedded = host._forward_embeds(images, None, None, None)
        grid = host.embeds.dynamic_feat_size((images.shape[2], images.shape[3]))
        return Tokens(
            x=embedded["patches"],
            prefix=int(host.num_prefix_tokens),
            grid=(int(grid[0]), int(grid[1])),
            rotary=embedded["rope_embeds"],
        )

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        from timm.models.naflexvit import batch_patchify

        embeds = host.embeds
        if not embeds.is_linear:
            projected = embeds.proj(images).flatten(2).transpose(1, 2)
            return cast("Tensor", embeds.norm(projected))
        patches, _ = batch_patchify(
            images, embeds.patch_size, embeds.dynamic_img_pad, embeds.channels_last
        )
        return cast("Tensor", embeds.norm(embeds.proj(patches)))

    def _patch_embed(self, host: Any) -> Any:
        return host.embeds

    def _image_size(self, host: Any) -> tuple[int, int]:
        embeds = host.embeds
        size = embeds.default_img_size
        said = (getattr(host, "pretrained_cfg", None) or {}).get("input_size")
        if size is None and said:
            size = said[1:]
        if size is None:
            grid = embeds.pos_embed_grid_size or (16, 16)
            size = [cells * side for cells, side in zip(grid, embeds.patch_size, strict=True)]
        return int(size[0]), int(size[1])

    def _table(self, host: Any, index: int, tokens: Tokens) -> Tensor | None:
        if tokens.rotary is None or not host.rope_is_mixed:
            return tokens.rotary
        return tokens.rotary[index]

    def _has_class_token(self, host: Any) -> bool:
        return bool(host.has_class_token)

    def _pools_prefix(self, host: Any) -> bool:
        return bool(host.pool_include_prefix)
