"""timm's `Eva`: EVA, EVA-02, DINOv3, Perception Encoder and the like, with rotary positions.

A token keeps the rotary position of the grid cell it comes from, wherever it stands in the
sequence; a merged token keeps that of the token into which the group was merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.hosts._adapter import Part
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._timm import QKV_COLUMNS, TimmHost, foreign_class_reason, linear_columns
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class TimmEva(TimmHost):
    """timm `Eva` with pre-norm and post-norm blocks."""

    family: ClassVar[str] = "timm Eva"
    host_classes: ClassVar[frozenset[str]] = frozenset({"timm.models.eva.Eva"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions, patch dropout."""
        for name in ("forward", "forward_features", "forward_head", "pool"):
            if getattr(type(host), name).__module__ != "timm.models.eva":
                return f"{type(host).__name__} overrides {name}, and only timm's own is known."
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

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm, projection, QK-norm and rotation; repeats shared keys."""
        block = host.blocks[index]
        attn = block.attn
        y = tokens.x if type(block).__name__ == "EvaBlockPostNorm" else block.norm1(tokens.x)
        flat = (
            _project_fused(attn, y, part)
            if attn.qkv is not None
            else _project_separately(attn, y, part)
        )
        every = {
            name: t.unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for name, t in flat.items()
        }
        dtype = y.dtype if "v" not in every else every["v"].dtype
        for name, norm in (("q", attn.q_norm), ("k", attn.k_norm)):
            if name in every:
                every[name] = self._rotate(host, index, tokens, norm(every[name]), dtype)
        groups = getattr(attn, "num_kv_groups", 1)
        if groups > 1:
            shared = {
                name: every[name].repeat_interleave(groups, dim=1) for name in "kv" if name in every
            }
            every.update(shared)
        return tuple(every[name] for name in part)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies inner norm, gate, projection, LayerScale, drop path and residual."""
        block = host.blocks[index]
        attn, x = block.attn, queries.x
        post = type(block).__name__ == "EvaBlockPostNorm"
        joined = attn.norm(attended.transpose(1, 2).flatten(2))
        if getattr(attn, "gate", None) is not None:
            joined = joined * attn.gate(x if post else block.norm1(x)).sigmoid()
        out = attn.proj_drop(attn.proj(joined))
        if post:
            out = block.norm1(out)
        elif block.gamma_1 is not None:
            out = block.gamma_1 * out
        mixed: Tensor = x + block.drop_path1(out)
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies feed-forward, LayerScale, drop path and residual."""
        block = host.blocks[index]
        if type(block).__name__ == "EvaBlockPostNorm":
            out = block.norm2(block.mlp(x))
        else:
            out = block.mlp(block.norm2(x))
            if block.gamma_2 is not None:
                out = block.gamma_2 * out
        fed: Tensor = x + block.drop_path2(out)
        return fed

    def _rotate(
        self, host: Any, index: int, tokens: Tokens, t: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Rotates queries or keys (B, H, N, d) by each patch's position in the grid."""
        from timm.layers import apply_rot_embed_cat

        if tokens.rotary is None or not tokens.patches:
            return t
        table = tokens.rotary[index] if getattr(host, "rope_mixed", False) else tokens.rotary
        if tokens.position is not None:
            table = table[..., tokens.position, :]
            table = table.transpose(0, 1) if table.ndim == 4 else table.unsqueeze(1)
        prefix, half = tokens.prefix, bool(getattr(host.blocks[index].attn, "rotate_half", False))
        turned = apply_rot_embed_cat(t[:, :, prefix:], table, half=half)
        return torch.cat([t[:, :, :prefix], turned], dim=2).to(dtype)

    def _attention(self, block: Any) -> Any:
        return block.attn

    def _pools_prefix(self, host: Any) -> bool:
        return host.attn_pool is not None

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        """Counts multiply-adds of one block; shared keys are projected once a group."""
        attn = host.blocks[index].attn
        width, inner = int(host.embed_dim), int(attn.num_heads * attn.head_dim)
        shared = inner // int(getattr(attn, "num_kv_groups", 1))
        return BlockShape(
            width=width,
            q=width * inner,
            k=width * shared,
            v=width * shared,
            query_width=inner,
            value_width=inner,
            key_width=int(attn.head_dim),
            out=linear_macs(attn) - width * (inner + 2 * shared),
            feed=linear_macs(host.blocks[index].mlp),
            **self._score_macs(host, inner),
        )


def _project_fused(attn: Any, y: Tensor, part: Part) -> dict[str, Tensor]:
    """Computes the columns that `part` names of one fused projection."""
    third = attn.qkv.out_features // 3
    start, stop = QKV_COLUMNS[part].start * third, QKV_COLUMNS[part].stop * third
    if getattr(attn, "q_bias", None) is None:
        whole = attn.qkv(y) if part == "qkv" else linear_columns(attn.qkv, y, start, stop)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))[start:stop]
        if attn.qkv_bias_separate:
            whole = linear_columns(attn.qkv, y, start, stop) + bias
        else:
            whole = F.linear(y, attn.qkv.weight[start:stop], bias)
    return dict(zip(part, whole.chunk(len(part), dim=2), strict=True))


def _project_separately(attn: Any, y: Tensor, part: Part) -> dict[str, Tensor]:
    """Computes the parts by separate projections."""
    layers = {"q": attn.q_proj, "k": attn.k_proj, "v": attn.v_proj}
    return {name: layers[name](y) for name in part}
