"""Options of the two timm families that no registered name uses, as small variants by hand.

If timm's constructors have no argument for an option (a gate in the attention), the module that
they made is replaced.
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

from timm_variants import DEFAULTS, HEADS, WIDTH, Variant

FAMILIES = {"vit": VisionTransformer, "distilled": VisionTransformerDistilled, "eva": Eva}
Prepare = Callable[[Any], object]


def make_variant(
    label: str, prepare: Prepare | None = None, dtype: torch.dtype = torch.float32, **args: Any
) -> Variant:
    """Makes a variant whose label begins with its family."""
    host = FAMILIES[label.partition(" ")[0]]
    return Variant(label, host, args, prepare=prepare, dtype=dtype)


def replace_attention(make: Callable[..., nn.Module], **args: Any) -> Prepare:
    """Replaces the attention in every block by another of timm's."""

    def prepare(host: Any) -> None:
        for block in host.blocks:
            block.attn = make(WIDTH, num_heads=HEADS, qkv_bias=True, **args)

    return prepare


def reset_classifier(*args: Any) -> Prepare:
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
    make_variant("vit map pool, class token", global_pool="map"),
    make_variant("vit map pool over the prefix", global_pool="map", pool_include_prefix=True),
    make_variant("vit map pool, registers", global_pool="map", reg_tokens=3, class_token=False),
    make_variant("vit avg pool, class token", global_pool="avg"),
    make_variant("vit avg pool over the prefix", global_pool="avg", pool_include_prefix=True),
    make_variant("vit avg pool, norm before", global_pool="avg", fc_norm=False),
    make_variant("vit avgmax pool", global_pool="avgmax", class_token=False),
    make_variant("vit avgmax pool over the prefix", global_pool="avgmax", pool_include_prefix=True),
    make_variant("vit max pool", global_pool="max"),
    make_variant("vit max pool over the prefix", global_pool="max", pool_include_prefix=True),
    make_variant("vit prr pool, class token", global_pool="prr"),
    make_variant("vit prr pool, average", global_pool="prr", class_token=False, reg_tokens=2),
    make_variant("vit no pool", global_pool=""),
    make_variant("vit no pool, no prefix", global_pool="", class_token=False, num_classes=0),
    make_variant("vit no classifier", num_classes=0),
    make_variant("vit no final norm, registers", final_norm=False, reg_tokens=1),
    make_variant("vit token pool, norm after", fc_norm=True, reg_tokens=2),
    make_variant("vit token pool over registers", no_embed_class=True, reg_tokens=5, pre_norm=True),
    make_variant("vit no positions", pos_embed="none", reg_tokens=1),
    make_variant("vit no biases", qkv_bias=False, proj_bias=False),
    make_variant(
        "vit scale norms, QK-norm", scale_attn_norm=True, scale_mlp_norm=True, qk_norm=True
    ),
    make_variant("vit LayerScale, RMSNorm", init_values=0.1, norm_layer=RmsNorm, qk_norm=True),
    make_variant("vit dropout everywhere", drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1),
    make_variant("vit drop path, attention dropout", drop_path_rate=0.2, attn_drop_rate=0.1),
    make_variant("vit embedding norm, dynamic", embed_norm_layer=RmsNorm, **DYNAMIC),
    make_variant("vit dynamic size", reg_tokens=2, **DYNAMIC),
    make_variant("vit dynamic size, padded", dynamic_img_pad=True, no_embed_class=True, **DYNAMIC),
    make_variant("vit dynamic size, no positions", pos_embed="none", **DYNAMIC, **NO_CLASS),
    make_variant("vit resized", resize(12, 24)),
    make_variant("vit classifier reset to average", reset_classifier(5, "avg"), reg_tokens=1),
    make_variant("vit map pool reset to token", reset_classifier(5, "token"), global_pool="map"),
    make_variant("vit classifier removed", reset_classifier(0, "")),
    make_variant("vit SwiGLU", mlp_layer=SwiGLU, scale_mlp_norm=True),
    make_variant("vit packed SwiGLU", mlp_layer=SwiGLUPacked, act_layer=nn.SiLU),
    make_variant("vit GLU", mlp_layer=GluMlp, **NO_CLASS),
    make_variant(
        "vit differential attention", attn_layer="diff", qk_norm=True, scale_attn_norm=True
    ),
    make_variant(
        "vit differential, dual lambda", replace_attention(DiffAttention, dual_lambda=True)
    ),
    make_variant(
        "vit post-norm, class token", block_fn=ResPostBlock, init_values=0.1, qk_norm=True
    ),
    make_variant(
        "vit post-norm, differential", block_fn=ResPostBlock, attn_layer="diff", reg_tokens=1
    ),
    make_variant("vit three branches", block_fn=partial(ParallelThingsBlock, num_parallel=3)),
    make_variant("vit branches, differential", block_fn=ParallelThingsBlock, attn_layer="diff"),
    make_variant("vit branches, scale norms", block_fn=ParallelThingsBlock, scale_attn_norm=True),
    make_variant("vit parallel, class token", block_fn=ParallelScalingBlock, init_values=0.1),
    make_variant(
        "vit parallel, no bias", block_fn=ParallelScalingBlock, qkv_bias=False, qk_norm=True
    ),
    make_variant(
        "vit parallel, fused out",
        block_fn=partial(ParallelScalingBlock, fuse_out_proj=True),
        proj_bias=False,
        reg_tokens=1,
    ),
    make_variant("vit parallel differential", block_fn=DiffParallelScalingBlock, qk_norm=True),
    make_variant(
        "vit parallel differential, dual lambda",
        block_fn=partial(DiffParallelScalingBlock, dual_lambda=True),
        qkv_bias=False,
    ),
    make_variant("vit float64", dtype=torch.float64, init_values=0.1, reg_tokens=1),
    make_variant("vit float16", dtype=torch.float16, init_values=0.1),
    make_variant("vit bfloat16", dtype=torch.bfloat16, global_pool="map", class_token=False),
    make_variant("distilled no classifier", num_classes=0),
    make_variant("distilled dynamic size", **DYNAMIC, no_embed_class=False),
    make_variant("distilled LayerScale, QK-norm", init_values=0.1, qk_norm=True),
    make_variant("distilled in training", lambda host: host.set_distilled_training()),
)

EVA = (
    make_variant("eva plain"),
    make_variant("eva token pool", global_pool="token", qk_norm=True),
    make_variant("eva map pool", global_pool="map", attn_pool_num_heads=2, **ROPE),
    make_variant("eva map pool, no class token", global_pool="map", class_token=False),
    make_variant("eva avgmax pool", global_pool="avgmax", num_reg_tokens=1),
    make_variant("eva max pool, no class token", global_pool="max", class_token=False),
    make_variant("eva no pool, no classifier", global_pool="", num_classes=0, **ROPE),
    make_variant("eva token pool, norm after", global_pool="token", use_fc_norm=True),
    make_variant("eva no positions", use_abs_pos_emb=False),
    make_variant("eva norm before the blocks", use_pre_transformer_norm=True, **ROPE),
    make_variant("eva both norms", use_post_transformer_norm=True, use_fc_norm=True),
    make_variant("eva separate projections", qkv_fused=False, use_rot_pos_emb=True, qk_norm=True),
    make_variant("eva shared keys", num_kv_heads=2, qkv_fused=False, qk_norm=True, **ROPE),
    make_variant("eva no biases", qkv_bias=False, **ROPE),
    make_variant("eva inner norms", scale_attn_inner=True, scale_mlp=True, swiglu_mlp=True),
    make_variant("eva SwiGLU", swiglu_mlp=True, init_values=0.1, **ROPE),
    make_variant("eva aligned SwiGLU", swiglu_mlp=True, swiglu_align_to=8, init_values=0.1),
    make_variant("eva LayerScale on attention", init_values=0.1, attn_only_layer_scale=True),
    make_variant("eva post-norm", use_post_norm=True, swiglu_mlp=True, scale_mlp=True, **ROPE),
    make_variant("eva post-norm, eva attention", use_post_norm=True, scale_attn_inner=True),
    make_variant("eva mixed rope", rope_type="mixed", **ROPE),
    make_variant("eva mixed rope, dynamic", rope_type="mixed", num_reg_tokens=2, **ROPE, **DYNAMIC),
    make_variant("eva dinov3 rope", rope_type="dinov3", rope_rotate_half=True, **ROPE),
    make_variant(
        "eva dinov3 rope, dynamic", rope_type="dinov3", class_token=False, **ROPE, **DYNAMIC
    ),
    make_variant("eva mrope", rope_type="mrope", num_reg_tokens=1, **MROPE, **ROPE),
    make_variant("eva mrope, dynamic", rope_type="mrope", **MROPE, **ROPE, **DYNAMIC),
    make_variant("eva rope, half, grid xy", rope_grid_indexing="xy", rope_rotate_half=True, **ROPE),
    make_variant("eva rope, dynamic, padded", dynamic_img_pad=True, **ROPE, **DYNAMIC),
    make_variant(
        "eva rope, augmented in training", rope_jitter_coords=2.0, rope_type="dinov3", **ROPE
    ),
    make_variant("eva resized", resize(12, 24), no_embed_class=True, **ROPE),
    make_variant(
        "eva map pool reset to token", reset_classifier(5, "token"), global_pool="map", **ROPE
    ),
    make_variant("eva float64", dtype=torch.float64, swiglu_mlp=True, **ROPE),
    make_variant("eva float16", dtype=torch.float16, global_pool="token", **ROPE),
    make_variant("eva bfloat16", dtype=torch.bfloat16, rope_type="dinov3", **ROPE),
)

GATED = (
    make_variant("vit gated attention", replace_attention(Attention, gated=True)),
    make_variant(
        "vit gated post-norm attention",
        replace_attention(Attention, gated=True),
        block_fn=ResPostBlock,
    ),
    make_variant(
        "vit gated, normed, other head width",
        replace_attention(
            Attention, gated=True, scale_norm=True, norm_layer=nn.LayerNorm, attn_head_dim=6
        ),
    ),
    make_variant(
        "eva gated attention", replace_attention(EvaAttention, gated=True, scale_norm=False)
    ),
    make_variant(
        "eva gated attention, separate bias",
        replace_attention(
            EvaAttention, gated=True, norm_layer=nn.LayerNorm, qkv_bias_separate=True
        ),
        use_rot_pos_emb=True,
    ),
    make_variant(
        "eva gated rotary attention, post-norm",
        replace_attention(AttentionRope, gated=True, attn_head_dim=8),
        use_post_norm=True,
        **ROPE,
    ),
)


def is_supported(each: Variant) -> bool:
    """Tells whether the installed timm has these arguments; older ones lack some."""
    gates = each not in GATED or "gated" in inspect.signature(Attention).parameters
    return gates and set(each.args) <= set(DEFAULTS[each.host])


OPTIONS = tuple(filter(is_supported, VIT + EVA + GATED))
