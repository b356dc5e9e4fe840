"""Options of the two timm families that no registered name uses, as small variants by hand.

What timm's constructors have no argument for (a gate in the attention) is put in place of the
module that they made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.layers.attention import Attention, AttentionRope
from timm.layers.diff_attention import DiffAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

from variants import DEFAULTS, HEADS, WIDTH, Variant

KNOWN = {"vit": VisionTransformer, "distilled": VisionTransformerDistilled, "eva": Eva}
Prepare = Callable[[Any], object]


def variant(
    label: str, prepare: Prepare | None = None, dtype: torch.dtype = torch.float32, **args: Any
) -> Variant:
    """A variant whose label begins with its family."""
    host = KNOWN[label.partition(" ")[0]]
    return Variant(label, host, args, prepare=prepare, dtype=dtype)


def with_attention(make: Callable[..., nn.Module], **args: Any) -> Prepare:
    """Puts another attention of timm's in every block."""

    def prepare(host: Any) -> None:
        for block in host.blocks:
            block.attn = make(WIDTH, num_heads=HEADS, qkv_bias=True, **args)

    return prepare


def reset(*args: Any) -> Prepare:
    """Calls the host's own reset_classifier."""
    return lambda host: host.reset_classifier(*args)


def resize(height: int, width: int) -> Prepare:
    """Calls the host's own set_input_size."""
    return lambda host: host.set_input_size(img_size=(height, width))


NO_CLASS = {"class_token": False, "global_pool": "avg"}
ROPE = {"use_rot_pos_emb": True, "attn_type": "rope"}
MROPE = {"rope_mrope_section": (2, 1, 1)}
DYNAMIC = {"dynamic_img_size": True}

VIT = (
    variant("vit map pool, class token", global_pool="map"),
    variant("vit map pool over the prefix", global_pool="map", pool_include_prefix=True),
    variant("vit map pool, registers", global_pool="map", reg_tokens=3, class_token=False),
    variant("vit avg pool, class token", global_pool="avg"),
    variant("vit avg pool over the prefix", global_pool="avg", pool_include_prefix=True),
    variant("vit avg pool, norm before", global_pool="avg", fc_norm=False),
    variant("vit avgmax pool", global_pool="avgmax", class_token=False),
    variant("vit avgmax pool over the prefix", global_pool="avgmax", pool_include_prefix=True),
    variant("vit max pool", global_pool="max"),
    variant("vit max pool over the prefix", global_pool="max", pool_include_prefix=True),
    variant("vit prr pool, class token", global_pool="prr"),
    variant("vit prr pool, average", global_pool="prr", class_token=False, reg_tokens=2),
    variant("vit no pool", global_pool=""),
    variant("vit no pool, no prefix", global_pool="", class_token=False, num_classes=0),
    variant("vit no classifier", num_classes=0),
    variant("vit no final norm, registers", final_norm=False, reg_tokens=1),
    variant("vit token pool, norm after", fc_norm=True, reg_tokens=2),
    variant("vit token pool over registers", no_embed_class=True, reg_tokens=5, pre_norm=True),
    variant("vit no positions", pos_embed="none", reg_tokens=1),
    variant("vit no biases", qkv_bias=False, proj_bias=False),
    variant("vit scale norms, QK-norm", scale_attn_norm=True, scale_mlp_norm=True, qk_norm=True),
    variant("vit LayerScale, RMSNorm", init_values=0.1, norm_layer=RmsNorm, qk_norm=True),
    variant("vit dropout everywhere", drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1),
    variant("vit drop path, attention dropout", drop_path_rate=0.2, attn_drop_rate=0.1),
    variant("vit embedding norm, dynamic", embed_norm_layer=RmsNorm, **DYNAMIC),
    variant("vit dynamic size", reg_tokens=2, **DYNAMIC),
    variant("vit dynamic size, padded", dynamic_img_pad=True, no_embed_class=True, **DYNAMIC),
    variant("vit dynamic size, no positions", pos_embed="none", **DYNAMIC, **NO_CLASS),
    variant("vit resized", resize(12, 24)),
    variant("vit classifier reset to average", reset(5, "avg"), reg_tokens=1),
    variant("vit map pool reset to token", reset(5, "token"), global_pool="map"),
    variant("vit classifier removed", reset(0, "")),
    variant("vit SwiGLU", mlp_layer=SwiGLU, scale_mlp_norm=True),
    variant("vit packed SwiGLU", mlp_layer=SwiGLUPacked, act_layer=nn.SiLU),
    variant("vit GLU", mlp_layer=GluMlp, **NO_CLASS),
    variant("vit differential attention", attn_layer="diff", qk_norm=True, scale_attn_norm=True),
    variant("vit differential, dual lambda", with_attention(DiffAttention, dual_lambda=True)),
    variant("vit post-norm, class token", block_fn=ResPostBlock, init_values=0.1, qk_norm=True),
    variant("vit post-norm, differential", block_fn=ResPostBlock, attn_layer="diff", reg_tokens=1),
    variant("vit three branches", block_fn=partial(ParallelThingsBlock, num_parallel=3)),
    variant("vit branches, differential", block_fn=ParallelThingsBlock, attn_layer="diff"),
    variant("vit branches, scale norms", block_fn=ParallelThingsBlock, scale_attn_norm=True),
    variant("vit parallel, class token", block_fn=ParallelScalingBlock, init_values=0.1),
    variant("vit parallel, no bias", block_fn=ParallelScalingBlock, qkv_bias=False, qk_norm=True),
    variant(
        "vit parallel, fused out",
        block_fn=partial(ParallelScalingBlock, fuse_out_proj=True),
        proj_bias=False,
        reg_tokens=1,
    ),
    variant("vit parallel differential", block_fn=DiffParallelScalingBlock, qk_norm=True),
    variant(
        "vit parallel differential, dual lambda",
        block_fn=partial(DiffParallelScalingBlock, dual_lambda=True),
        qkv_bias=False,
    ),
    variant("vit float64", dtype=torch.float64, init_values=0.1, reg_tokens=1),
    variant("vit float16", dtype=torch.float16, init_values=0.1),
    variant("vit bfloat16", dtype=torch.bfloat16, global_pool="map", class_token=False),
    variant("distilled no classifier", num_classes=0),
    variant("distilled dynamic size", **DYNAMIC, no_embed_class=False),
    variant("distilled LayerScale, QK-norm", init_values=0.1, qk_norm=True),
    variant("distilled in training", lambda host: host.set_distilled_training()),
)

EVA = (
    variant("eva plain"),
    variant("eva token pool", global_pool="token", qk_norm=True),
    variant("eva map pool", global_pool="map", attn_pool_num_heads=2, **ROPE),
    variant("eva map pool, no class token", global_pool="map", class_token=False),
    variant("eva avgmax pool", global_pool="avgmax", num_reg_tokens=1),
    variant("eva max pool, no class token", global_pool="max", class_token=False),
    variant("eva no pool, no classifier", global_pool="", num_classes=0, **ROPE),
    variant("eva token pool, norm after", global_pool="token", use_fc_norm=True),
    variant("eva no positions", use_abs_pos_emb=False),
    variant("eva norm before the blocks", use_pre_transformer_norm=True, **ROPE),
    variant("eva both norms", use_post_transformer_norm=True, use_fc_norm=True),
    variant("eva separate projections", qkv_fused=False, use_rot_pos_emb=True, qk_norm=True),
    variant("eva shared keys", num_kv_heads=2, qkv_fused=False, qk_norm=True, **ROPE),
    variant("eva no biases", qkv_bias=False, **ROPE),
    variant("eva inner norms", scale_attn_inner=True, scale_mlp=True, swiglu_mlp=True),
    variant("eva SwiGLU", swiglu_mlp=True, init_values=0.1, **ROPE),
    variant("eva aligned SwiGLU", swiglu_mlp=True, swiglu_align_to=8, init_values=0.1),
    variant("eva LayerScale on attention", init_values=0.1, attn_only_layer_scale=True),
    variant("eva post-norm", use_post_norm=True, swiglu_mlp=True, scale_mlp=True, **ROPE),
    variant("eva post-norm, eva attention", use_post_norm=True, scale_attn_inner=True),
    variant("eva mixed rope", rope_type="mixed", **ROPE),
    variant("eva mixed rope, dynamic", rope_type="mixed", num_reg_tokens=2, **ROPE, **DYNAMIC),
    variant("eva dinov3 rope", rope_type="dinov3", rope_rotate_half=True, **ROPE),
    variant("eva dinov3 rope, dynamic", rope_type="dinov3", class_token=False, **ROPE, **DYNAMIC),
    variant("eva mrope", rope_type="mrope", num_reg_tokens=1, **MROPE, **ROPE),
    variant("eva mrope, dynamic", rope_type="mrope", **MROPE, **ROPE, **DYNAMIC),
    variant("eva rope, half, grid xy", rope_grid_indexing="xy", rope_rotate_half=True, **ROPE),
    variant("eva rope, dynamic, padded", dynamic_img_pad=True, **ROPE, **DYNAMIC),
    variant("eva rope, augmented in training", rope_jitter_coords=2.0, rope_type="dinov3", **ROPE),
    variant("eva resized", resize(12, 24), no_embed_class=True, **ROPE),
    variant("eva map pool reset to token", reset(5, "token"), global_pool="map", **ROPE),
    variant("eva float64", dtype=torch.float64, swiglu_mlp=True, **ROPE),
    variant("eva float16", dtype=torch.float16, global_pool="token", **ROPE),
    variant("eva bfloat16", dtype=torch.bfloat16, rope_type="dinov3", **ROPE),
)

GATED = (
    variant("vit gated attention", with_attention(Attention, gated=True)),
    variant(
        "vit gated post-norm attention",
        with_attention(Attention, gated=True),
        block_fn=ResPostBlock,
    ),
    variant(
        "vit gated, normed, other head width",
        with_attention(
            Attention, gated=True, scale_norm=True, norm_layer=nn.LayerNorm, attn_head_dim=6
        ),
    ),
    variant("eva gated attention", with_attention(EvaAttention, gated=True, scale_norm=False)),
    variant(
        "eva gated attention, separate bias",
        with_attention(EvaAttention, gated=True, norm_layer=nn.LayerNorm, qkv_bias_separate=True),
        use_rot_pos_emb=True,
    ),
    variant(
        "eva gated rotary attention, post-norm",
        with_attention(AttentionRope, gated=True, attn_head_dim=8),
        use_post_norm=True,
        **ROPE,
    ),
)


def built_here(each: Variant) -> bool:
    """Whether the installed timm has these arguments; older ones lack some."""
    gates = each not in GATED or "gated" in inspect.signature(Attention).parameters
    return gates and set(each.args) <= set(DEFAULTS[each.host])


OPTIONS = tuple(filter(built_here, VIT + EVA + GATED))
