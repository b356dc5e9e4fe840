"""The blocks of timm's `Eva` and `Beit`, pre-norm and post-norm, with rotary positions or none.

A block is all that is known here: no host, and of positions only the table that is handed over.
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
from patchslim.tokens.tokens import Tokens


def project(
    block: Any, tokens: Tokens, part: Part, table: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Applies norm, projection, QK-norm and rotation by the table; repeats shared keys."""
    attn = block.attn
    y = tokens.x if _is_post_norm(block) else block.norm1(tokens.x)
    flat = (
        _project_fused(attn, y, part)
        if getattr(attn, "qkv", None) is not None
        else _project_separately(attn, y, part)
    )
    every = {
        name: t.unflatten(2, (-1, head_width(attn))).transpose(1, 2) for name, t in flat.items()
    }
    dtype = y.dtype if "v" not in every else every["v"].dtype
    for name in "qk":
        if name in every:
            norm = getattr(attn, f"{name}_norm", None)
            each = every[name] if norm is None else norm(every[name])
            every[name] = _rotate(block, tokens, each, table, dtype)
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        shared = {
            name: every[name].repeat_interleave(groups, dim=1) for name in "kv" if name in every
        }
        every.update(shared)
    return tuple(every[name] for name in part)


def mix(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Applies inner norm, gate, projection, LayerScale, drop path and residual."""
    attn, post = block.attn, _is_post_norm(block)
    joined = attended.transpose(1, 2).flatten(2)
    if hasattr(attn, "norm"):
        joined = attn.norm(joined)
    if getattr(attn, "gate", None) is not None:
        joined = joined * attn.gate(x if post else block.norm1(x)).sigmoid()
    out = attn.proj_drop(attn.proj(joined))
    if post:
        out = block.norm1(out)
    elif getattr(block, "gamma_1", None) is not None:
        out = block.gamma_1 * out
    mixed: Tensor = x + block.drop_path1(out)
    return mixed


def feed(block: Any, x: Tensor) -> Tensor:
    """Applies feed-forward, LayerScale, drop path and residual."""
    if _is_post_norm(block):
        out = block.norm2(block.mlp(x))
    else:
        out = block.mlp(block.norm2(x))
        if getattr(block, "gamma_2", None) is not None:
            out = block.gamma_2 * out
    fed: Tensor = x + block.drop_path2(out)
    return fed


def block_shape(block: Any, width: int, **score: int) -> BlockShape:
    """Counts multiply-adds of one block; shared keys are projected once a group."""
    attn = block.attn
    inner = int(attn.num_heads * head_width(attn))
    shared = inner // int(getattr(attn, "num_kv_groups", 1))
    return BlockShape(
        width=width,
        q=width * inner,
        k=width * shared,
        v=width * shared,
        query_width=inner,
        value_width=inner,
        key_width=head_width(attn),
        out=linear_macs(attn) - width * (inner + 2 * shared),
        feed=linear_macs(block.mlp),
        **{"score": inner, **score},
    )


def head_width(attn: Any) -> int:
    """Reads the channels of one head."""
    width = getattr(attn, "head_dim", None)
    return int(attn.qkv.out_features // (3 * attn.num_heads) if width is None else width)


def _is_post_norm(block: Any) -> bool:
    """Tells whether norms follow attention and feed-forward."""
    return type(block).__name__ == "EvaBlockPostNorm"


def _rotate(
    block: Any, tokens: Tokens, t: Tensor, table: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Rotates queries or keys (B, H, N, d) by each patch's position in the grid."""
    from timm.layers import apply_rot_embed_cat

    if table is None or not tokens.patches:
        return t
    if tokens.position is not None:
        table = table[..., tokens.position, :]
        table = table.transpose(0, 1) if table.ndim == 4 else table.unsqueeze(1)
    prefix, half = tokens.prefix, bool(getattr(block.attn, "rotate_half", False))
    turned = apply_rot_embed_cat(t[:, :, prefix:], table, half=half)
    return torch.cat([t[:, :, :prefix], turned], dim=2).to(dtype)


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
