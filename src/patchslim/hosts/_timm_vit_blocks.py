"""The blocks of timm's `VisionTransformer`, and those of other files that are built like them.

Five kinds: pre-norm, post-norm, branches side by side, attention and feed-forward in parallel with
plain or differential attention. Parallel attentions and differential maps are served as more heads
of one attention call. A block is all that is known here: no host, no positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.hosts._adapter import Part
from patchslim.hosts._columns import QKV_COLUMNS, linear_columns
from patchslim.hosts._macs import linear_macs
from patchslim.tokens.shapes import BlockShape


def project(block: Any, x: Tensor, part: Part) -> tuple[Tensor, ...]:
    """Applies the block's norm and projection. Several attentions count as more heads."""
    each = [project_heads(attn, y, part) for attn, y in _attention_inputs(block, x)]
    if len(each) == 1:
        return each[0]
    return tuple(torch.cat(same, dim=1) for same in zip(*each, strict=True))


def mix(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Applies gate, projection, LayerScale, drop path, residual, as this kind of block does."""
    mixed: Tensor = BLOCK_KINDS.get(type(block).__name__, PRE_NORM)[0](block, x, attended)
    return mixed


def feed(block: Any, x: Tensor) -> Tensor:
    """Applies the feed-forward and its residual, as this kind of block does it."""
    fed: Tensor = BLOCK_KINDS.get(type(block).__name__, PRE_NORM)[1](block, x)
    return fed


def block_shape(block: Any, width: int, **score: int) -> BlockShape:
    """Counts the multiply-adds of one block from its layers."""
    attns = attentions(block)
    maps = 2 if hasattr(attns[0], "lambda_init") else 1
    channels = _head_width(attns[0])
    inner = len(attns) * count_heads(attns[0]) * maps * channels
    parallel = "Scaling" in type(block).__name__
    # Whatever a projection has beside its columns, such as a low-rank update, counts here, too.
    out = sum(map(linear_macs, [block] if parallel else attns)) - 3 * width * inner
    out -= sum(linear_macs(getattr(attn, name, None)) for attn in attns for name in NOT_BY_ROW)
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
        **{"score": inner, **score},
    )


def _head_width(attn: Any) -> int:
    """Reads the channels of one head's key."""
    width = getattr(attn, "head_dim", None)
    return int(attn.qkv.out_features // (3 * count_heads(attn)) if width is None else width)


def count_heads(attn: Any) -> int:
    """Counts the heads of an attention."""
    return int(getattr(attn, "num_heads", None) or attn.heads)


def attentions(block: Any) -> list[Any]:
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
    return [(block.attn, x if type(block).__name__ in POST_NORM else block.norm1(x))]


def project_heads(attn: Any, y: Tensor, part: Part) -> tuple[Tensor, ...]:
    """Computes queries, keys and values of one attention, split into heads and normed.

    Differential attention has two maps a head over one value: each map becomes a head.
    """
    flat = _project_flat(attn, y, part)
    maps = 2 if hasattr(attn, "lambda_init") else 1
    every: list[Tensor] = []
    for name, t in zip(part, flat, strict=True):
        if name == "v":
            value = t.unflatten(2, (count_heads(attn), -1)).transpose(1, 2)
            every.append(value.repeat_interleave(maps, dim=1) if maps > 1 else value)
            continue
        t = t.unflatten(2, (count_heads(attn) * maps, -1)).transpose(1, 2)
        norm = getattr(attn, f"{name}_norm", None)
        every.append(t if norm is None else norm(t))
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


def attention_output(attn: Any, y: Tensor, attended: Tensor) -> Tensor:
    """Applies an attention's gate, norm and output projection. The gate reads the input `y`."""
    joined = _join_heads(attn, attended)
    if hasattr(attn, "norm"):
        joined = attn.norm(joined)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        joined = joined * gate(y).sigmoid()
    out: Tensor = attn.proj(joined)
    drop = getattr(attn, "proj_drop", None)
    return out if drop is None else drop(out)


def _mix_pre(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    y = x if getattr(block.attn, "gate", None) is None else block.norm1(x)
    out = _scale(block, "1", attention_output(block.attn, y, attended))
    return x + _drop_path(block, "1")(out)


def _feed_pre(block: Any, x: Tensor) -> Tensor:
    return x + _drop_path(block, "2")(_scale(block, "2", block.mlp(block.norm2(x))))


def _scale(block: Any, number: str, out: Tensor) -> Tensor:
    """Applies a block's LayerScale: a layer, a plain parameter, or none."""
    layer, factor = (getattr(block, f"{name}{number}", None) for name in ("ls", "gamma_"))
    if layer is not None:
        out = layer(out)
    return out if factor is None else factor * out


def _drop_path(block: Any, number: str) -> Any:
    """Finds a block's drop path: one for each half, or one for both."""
    return getattr(block, f"drop_path{number}", None) or block.drop_path


def _mix_post(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    return x + block.drop_path1(block.norm1(attention_output(block.attn, x, attended)))


def _feed_post(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _mix_side_by_side(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    parts = attended.chunk(len(block.attns), dim=1)
    outs = [
        branch.drop_path(branch.ls(attention_output(branch.attn, branch.norm(x), part)))
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


NOT_BY_ROW = (
    "cpb_mlp",
    "rel_pos",
    "proj_l",
    "proj_w",
)  # parts of an attention that do not run once for each row
POST_NORM = ("ResPostBlock", "ResPostRelPosBlock", "SwinTransformerV2Block")
PRE_NORM = (_mix_pre, _feed_pre)  # of `Block`, and of blocks of other files with its parts
BLOCK_KINDS = {
    "Block": PRE_NORM,
    "ResPostBlock": (_mix_post, _feed_post),
    "ResPostRelPosBlock": (_mix_post, _feed_post),
    "SwinTransformerV2Block": (_mix_post, _feed_post),
    "ParallelThingsBlock": (_mix_side_by_side, _feed_side_by_side),
    "ParallelScalingBlock": (_mix_parallel, _skip_feed),
    "DiffParallelScalingBlock": (_mix_parallel, _skip_feed),
}
