"""timm's vision encoder of Gemma 4 (`Gemma4Vit*`): rotary positions by axis, norms on both sides.

The pooling after the blocks averages squares of patches, so it gets the whole grid, put back.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._adapter import Part
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MODULE = "timm.models.gemma4_vit"


class TimmGemma4(StageHost):
    """timm `Gemma4VitEncoder` and its classifier."""

    family: ClassVar[str] = "timm Gemma4Vit"
    host_classes: ClassVar[frozenset[str]] = frozenset(
        {f"{MODULE}.Gemma4VitEncoder", f"{MODULE}.Gemma4VitClassifier"}
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions."""
        reason = overridden_reason(host, (MODULE,))
        for block in () if reason else self.blocks(host):
            reason = (
                reason
                or foreign_class_reason("block", block, ("Gemma4Block",))
                or foreign_class_reason("attention", block.attn, ("Gemma4Attention",))
            )
        return reason

    def size_mismatch(self, host: Any, size: tuple[int, int], options: Any) -> str | None:
        """Refuses sizes that are no multiple of the patch, or of what is pooled."""
        encoder = _encoder(host)
        height, width = encoder.patch_size
        if encoder.global_pool == "soft":
            height, width = (each * encoder.pooling_kernel_size for each in (height, width))
        if not (size[0] % height or size[1] % width):
            return None
        return f"height and width must be multiples of {height}x{width}."

    def blocks(self, host: Any) -> Any:
        """Lists the blocks of the encoder."""
        return _encoder(host).blocks

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embeds patches and adds positions."""
        encoder = _encoder(host)
        x, _, _ = encoder.patch_embed(images)
        height, width = encoder.patch_size
        return x, (images.shape[2] // height, images.shape[3] // width)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm, projections, a norm of each, and rotation by each patch's cell."""
        from timm.models.gemma4_vit import apply_multidimensional_rope

        block = self.blocks(host)[index]
        attn, y = block.attn, block.norm1(tokens.x)
        table = tokens.rotary
        assert table is not None  # noqa: S101 (`embed` has made it)
        cos, sin = table[tokens.cells()].chunk(2, dim=2)
        parts = []
        for name in part:
            each = getattr(attn, f"{name}_proj")(y).unflatten(2, (-1, attn.head_dim))
            each = getattr(attn, f"{name}_norm")(each)
            if name != "v":
                each = apply_multidimensional_rope(each, cos, sin, ndim=2, unsqueeze_dim=2)
            each = each.transpose(1, 2)
            shared = attn.num_kv_groups > 1 and name != "q"
            parts.append(each.repeat_interleave(attn.num_kv_groups, dim=1) if shared else each)
        return tuple(parts)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies projection, norm, drop path and residual."""
        block = self.blocks(host)[index]
        out = block.attn.proj_drop(block.attn.o_proj(attended.transpose(1, 2).flatten(2)))
        mixed: Tensor = queries.x + block.drop_path(block.norm2(out))
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies norm, feed-forward, norm, drop path and residual."""
        block = self.blocks(host)[index]
        fed: Tensor = x + block.drop_path(block.norm4(block.mlp(block.norm3(x))))
        return fed

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Pools as the encoder does, and applies the classifier if there is one."""
        encoder = _encoder(host)
        if encoder.global_pool == "soft":
            x, _ = encoder.pooler(x, _positions(host, grid, x), None)
            if encoder.std_bias is not None:
                x = (x - encoder.std_bias) * encoder.std_scale
        elif encoder.global_pool == "avg":
            x = x.mean(dim=1)
        return x if encoder is host else host.forward_head(x)

    def _rotary(self, host: Any, grid: tuple[int, int]) -> Tensor | None:
        encoder = _encoder(host)
        like = encoder.patch_embed.input_proj.weight
        cos, sin = encoder.rotary_emb(like, _positions(host, grid, like)[:1])
        return torch.cat([cos, sin], dim=2)[0]

    def _attention(self, block: Any) -> Any:
        return block.attn

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        block = self.blocks(host)[index]
        attn, width = block.attn, int(_encoder(host).embed_dim)
        inner = int(attn.num_heads * attn.head_dim)
        return BlockShape(
            width=width,
            q=linear_macs(attn.q_proj),
            k=linear_macs(attn.k_proj),
            v=linear_macs(attn.v_proj),
            query_width=inner,
            value_width=inner,
            key_width=int(attn.head_dim),
            out=linear_macs(attn.o_proj),
            feed=linear_macs(block.mlp),
            score=inner,
        )

    def _image_size(self, host: Any) -> tuple[int, int]:
        said = (getattr(host, "pretrained_cfg", None) or {}).get("input_size", (3, 768, 768))
        return int(said[1]), int(said[2])


def _encoder(host: Any) -> Any:
    """Finds the encoder: the host, or what a classifier keeps."""
    return getattr(host, "encoder", host)


def _positions(host: Any, grid: tuple[int, int], like: Tensor) -> Tensor:
    """Makes column and row of each cell, as the host numbers them (B, H*W, 2)."""
    embed = _encoder(host).patch_embed
    cells: Tensor = embed._default_patch_coord(like.shape[0], *grid, like.device)[0]
    return cells.flip(dims=(-1,))
