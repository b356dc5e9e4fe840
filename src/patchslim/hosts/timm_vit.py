"""timm's `VisionTransformer` in all its variants: one adapter, five kinds of block.

Class token or none, distillation token, registers, LayerScale, QK-norm, scale-norm, gated
attention, pre-norm, post-norm and parallel blocks, differential attention, every pooling.
Parallel attentions and differential maps are served as more heads of one attention call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.hosts._adapter import Part
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._timm import QKV_COLUMNS, TimmHost, foreign_class_reason, linear_columns
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class TimmVit(TimmHost):
    """timm `VisionTransformer` and `VisionTransformerDistilled`."""

    family: ClassVar[str] = "timm VisionTransformer"
    host_classes: ClassVar[frozenset[str]] = frozenset(
        {"timm.models.vision_transformer.VisionTransformer"}
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions, patch dropout."""
        known = ("timm.models.vision_transformer", "timm.models.deit")
        for name in ("forward", "forward_features", "forward_head", "pool"):
            if getattr(type(host), name).__module__ not in known:
                return f"{type(host).__name__} overrides {name}, and only timm's own is known."
        if not isinstance(host.patch_drop, nn.Identity):
            return "it drops patches at random (patch_drop_rate). Build it with patch_drop_rate=0."
        for block in host.blocks:
            reason = foreign_class_reason("block", block, BLOCK_KINDS)
            for attn in [] if reason else _attentions(block):
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

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies the block's norm and projection. Several attentions count as more heads."""
        block = host.blocks[index]
        each = [_project_heads(attn, y, part) for attn, y in _attention_inputs(block, tokens.x)]
        if len(each) == 1:
            return each[0]
        return tuple(torch.cat(same, dim=1) for same in zip(*each, strict=True))

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies gate, projection, LayerScale, drop path, residual, as this kind of block does."""
        block = host.blocks[index]
        mixed: Tensor = BLOCK_KINDS[type(block).__name__][0](block, queries.x, attended)
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies the feed-forward and its residual, as this kind of block does it."""
        block = host.blocks[index]
        fed: Tensor = BLOCK_KINDS[type(block).__name__][1](block, x)
        return fed

    def _attention(self, block: Any) -> Any:
        return _attentions(block)[0]

    def _pools_prefix(self, host: Any) -> bool:
        return bool(host.pool_include_prefix)

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        """Counts the multiply-adds of one block from its layers."""
        block = host.blocks[index]
        attns = _attentions(block)
        width, heads = int(host.embed_dim), len(attns) * attns[0].num_heads
        maps = 2 if hasattr(attns[0], "lambda_init") else 1
        channels = int(attns[0].head_dim)
        inner = heads * maps * channels
        parallel = "Scaling" in type(block).__name__
        # Whatever a projection has beside its columns, such as a low-rank update, counts here, too.
        out = sum(map(linear_macs, [block] if parallel else attns)) - 3 * width * inner
        return BlockShape(
            width=width,
            q=width * inner,
            k=width * inner,
            v=width * inner,
            query_width=inner,
            value_width=inner * maps,
            key_width=channels,
            out=out,
            feed=0 if parallel else linear_macs(getattr(block, "ffns", None) or block.mlp),
            **self._score_macs(host, inner),
        )


def _attentions(block: Any) -> list[Any]:
    """Lists the attentions of a block. A fused parallel block is its own attention."""
    if hasattr(block, "attns"):
        return [branch.attn for branch in block.attns]
    return [block.attn] if hasattr(block, "attn") else [block]


def _attention_inputs(block: Any, x: Tensor) -> list[tuple[Any, Tensor]]:
    """Pairs each attention of a block with its input: normed, or plain in a post-norm block."""
    if hasattr(block, "attns"):
        return [(branch.attn, branch.norm(x)) for branch in block.attns]
    if hasattr(block, "in_proj"):
        return [(block, block.in_norm(x))]
    return [(block.attn, x if type(block).__name__ == "ResPostBlock" else block.norm1(x))]


def _project_heads(attn: Any, y: Tensor, part: Part) -> tuple[Tensor, ...]:
    """Computes queries, keys and values of one attention, split into heads and normed.

    Differential attention has two maps a head over one value: each map becomes a head.
    """
    flat = _project_flat(attn, y, part)
    maps = 2 if hasattr(attn, "lambda_init") else 1
    every: list[Tensor] = []
    for name, t in zip(part, flat, strict=True):
        if name == "v":
            value = t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
            every.append(value.repeat_interleave(maps, dim=1) if maps > 1 else value)
            continue
        t = t.unflatten(2, (attn.num_heads * maps, -1)).transpose(1, 2)
        every.append(attn.q_norm(t) if name == "q" else attn.k_norm(t))
    return tuple(every)


def _project_flat(attn: Any, y: Tensor, part: Part) -> list[Tensor]:
    """Computes the columns of the fused projection that `part` names, (B, N, heads * channels)."""
    layer = getattr(attn, "qkv", None)
    first = 0
    if layer is None:
        layer, first = attn.in_proj, attn.in_split[0]
    columns = QKV_COLUMNS[part]
    if part == "qkv" and not first:
        return list(layer(y).chunk(3, dim=2))
    third = (layer.out_features - first) // 3
    start, stop = first + columns.start * third, first + columns.stop * third
    return list(linear_columns(layer, y, start, stop).chunk(len(part), dim=2))


def _join_heads(attn: Any, attended: Tensor) -> Tensor:
    """Joins the heads of attended values (B, heads, n, d); differential maps are subtracted."""
    if hasattr(attn, "lambda_init"):
        weight = attn._compute_lambda().type_as(attended)
        attended = attended[:, 0::2] - weight * attended[:, 1::2]
        attended = attn.sub_norm(attended) * (1 - attn.lambda_init)
    return attended.transpose(1, 2).flatten(2)


def _attention_output(attn: Any, y: Tensor, attended: Tensor) -> Tensor:
    """Applies an attention's gate, norm and output projection. The gate reads the input `y`."""
    joined = attn.norm(_join_heads(attn, attended))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        joined = joined * gate(y).sigmoid()
    out: Tensor = attn.proj_drop(attn.proj(joined))
    return out


def _mix_pre(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    y = x if getattr(block.attn, "gate", None) is None else block.norm1(x)
    return x + block.drop_path1(block.ls1(_attention_output(block.attn, y, attended)))


def _feed_pre(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _mix_post(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    return x + block.drop_path1(block.norm1(_attention_output(block.attn, x, attended)))


def _feed_post(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _mix_side_by_side(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    parts = attended.chunk(len(block.attns), dim=1)
    outs = [
        branch.drop_path(branch.ls(_attention_output(branch.attn, branch.norm(x), part)))
        for branch, part in zip(block.attns, parts, strict=True)
    ]
    return x + torch.stack(outs).sum(dim=0)


def _feed_side_by_side(block: Any, x: Tensor) -> Tensor:
    return x + torch.stack([branch(x) for branch in block.ffns]).sum(dim=0)


def _mix_parallel(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Adds attention and feed-forward, which read the same input, to the residual stream."""
    hidden = block.in_split[0]
    bias = block.mlp_bias if block.in_proj.bias is None else block.in_proj.bias[:hidden]
    fed = F.linear(block.in_norm(x), block.in_proj.weight[:hidden], bias)
    fed = block.mlp_drop(block.mlp_act(fed))
    joined = _join_heads(block, attended)
    if block.out_proj is not None:
        out = block.out_proj(torch.cat([joined, fed], dim=-1))
    else:
        out = block.attn_out_proj(joined) + block.mlp_out_proj(fed)
    return x + block.drop_path(block.ls(out))


def _skip_feed(_: Any, x: Tensor) -> Tensor:
    """Changes nothing: `mix` has added the feed-forward already."""
    return x


BLOCK_KINDS = {
    "Block": (_mix_pre, _feed_pre),
    "ResPostBlock": (_mix_post, _feed_post),
    "ParallelThingsBlock": (_mix_side_by_side, _feed_side_by_side),
    "ParallelScalingBlock": (_mix_parallel, _skip_feed),
    "DiffParallelScalingBlock": (_mix_parallel, _skip_feed),
}
