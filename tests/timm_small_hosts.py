"""Small variants of timm's other families, by every argument that changes what a host does.

A variant is a name of timm's registry with other arguments, so that its recipe is there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
from timm.models.metaformer import (
    Attention,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    SepConv,
)
from timm.models.nest import Nest
from timm.models.pit import PoolingVisionTransformer
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from timm_variants import randomise


@dataclass(frozen=True, eq=False)
class SmallHost:
    """One variant: a name of timm's or a class of its, and arguments that make it small.

    `slow` variants are left to the slow suite. `prepare` is done to the built host before its
    weights are drawn.
    """

    label: str
    name: str | type
    args: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    slow: bool = False
    prepare: Callable[[Any], object] | None = field(default=None)

    def build(self) -> Any:
        """Builds a small host with strongly random weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            make = (
                partial(timm.create_model, self.name) if isinstance(self.name, str) else self.name
            )
            host: Any = make(num_classes=7, **self.args)
        if self.prepare is not None:
            self.prepare(host)
        randomise(host)
        for module in host.modules():  # tables that follow from the arguments
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()
        return host.eval().to(self.dtype)

    def __str__(self) -> str:
        return self.label


def small_hosts(
    name: str | type, base: Mapping[str, Any], variants: Mapping[str, Mapping[str, Any]]
) -> tuple[SmallHost, ...]:
    """Makes variants of one name, of which all but the first three are slow.

    Entries of a variant that begin with an underscore are fields of `SmallHost`.
    """
    made = []
    for label, args in variants.items():
        every = {**base, **args}
        fields = {key[1:]: value for key, value in every.items() if key.startswith("_")}
        own = {key: each for key, each in every.items() if each is not LEFT_OUT and key[0] != "_"}
        rest = {"slow": len(made) >= 3, "name": name, **fields}
        made.append(SmallHost(label, args=own, **rest))
    return tuple(made)


LEFT_OUT = object()  # an argument that this variant does not have
FLAT = {"img_size": (16, 20), "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
DROPS = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.2}

RELPOS = small_hosts(
    "vit_relpos_small_patch16_224",
    FLAT,
    {
        "relpos, table": {"rel_pos_type": "bias"},
        "relpos, network": {"rel_pos_type": "mlp", "rel_pos_dim": 16, "class_token": True},
        "relpos, post-norm": {
            "_name": "vit_srelpos_small_patch16_224",
            "rel_pos_dim": 16,
            "class_token": True,
        },
        "relpos, class token": {
            "rel_pos_type": "bias",
            "class_token": True,
            "global_pool": "token",
            "init_values": None,
        },
        "relpos, Swin's network": {"rel_pos_type": "mlp-swin", "rel_pos_dim": 8, "qk_norm": True},
        "relpos, norm after the mean": {"fc_norm": True, "rel_pos_type": "bias", **DROPS},
        "relpos, sequence": {"global_pool": "", "rel_pos_type": "bias", "class_token": True},
        "relpos, post-norm kept apart": {
            "_name": "vit_relpos_base_patch32_plus_rpn_256",
            "rel_pos_dim": 8,
            "class_token": True,
        },
        "relpos, resized": {
            "rel_pos_dim": 8,
            "class_token": True,
            "_prepare": lambda host: host.set_input_size(img_size=(12, 24)),
        },
        "relpos, float16": {"rel_pos_type": "bias", "_dtype": torch.float16},
    },
)
BEIT = small_hosts(
    "beit_base_patch16_224",
    FLAT,
    {
        "beit": {},
        "beit, class token": {"global_pool": "token", "use_abs_pos_emb": True},
        "beit, one bias for all blocks": {
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
        },
        "beit, both biases": {"use_shared_rel_pos_bias": True, "init_values": None, **DROPS},
        "beit, no bias": {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "qkv_bias": False},
        "beit, SwiGLU": {"swiglu_mlp": True, "scale_mlp": True, "use_fc_norm": False},
        "beit, sequence": {"global_pool": ""},
        "beit, bfloat16": {"_dtype": torch.bfloat16},
    },
)


def say_input_size(host: Any) -> None:
    """Says what size of images a host is meant for, which its arguments do not."""
    host.pretrained_cfg = {**host.pretrained_cfg, "input_size": (3, 16, 20)}


NAFLEX = small_hosts(
    "naflexvit_base_patch16_gap",
    {
        **{name: value for name, value in FLAT.items() if name != "img_size"},
        "pos_embed_grid_size": (4, 5),
        "_prepare": say_input_size,
    },
    {
        "naflex, mean": {},
        "naflex, pooling query, registers": {
            "_name": "naflexvit_base_patch16_map",
            "reg_tokens": 2,
        },
        "naflex, rotary": {"rope_type": "axial", "reg_tokens": 1, "pos_embed": "none"},
        "naflex, class token": {
            "global_pool": "token",
            "class_token": True,
            "pos_embed": "factorized",
            "init_values": 0.1,
        },
        "naflex, mixed rotary": {"rope_type": "mixed", "swiglu_mlp": True},
        "naflex, dinov3 rotary": {"rope_type": "dinov3", "class_token": True, **DROPS},
        "naflex, shared keys": {
            "rope_type": "axial",
            "num_kv_heads": 2,
            "qkv_fused": False,
            "attn_type": "rope",
        },
        "naflex, gated": {"attn_gated": True, "qk_norm": True, "global_pool": "avgmax"},
        "naflex, differential": {"attn_layer": "diff", "scale_attn_inner_norm": True},
        "naflex, convolution, norm first": {"embed_proj_type": "conv", "pre_norm": True},
        "naflex, mean over the prefix": {"pool_include_prefix": True, "reg_tokens": 2},
        "naflex, sequence": {"global_pool": "", "class_token": True},
        "naflex, largest over all": {"global_pool": "max", "reg_tokens": 1, "fc_norm": False},
        "naflex, padded": {"dynamic_img_pad": True, "pos_embed_grid_size": (3, 3)},
        "naflex, float16": {"rope_type": "axial", "_dtype": torch.float16},
    },
)


def unfuse(host: Any) -> None:
    """Takes timm's fused attention away: ONNX has none of the five axes that windows have here."""
    for module in host.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


NEST = small_hosts(
    Nest,
    {
        "img_size": 64,
        "embed_dims": (8, 16, 32),
        "num_heads": (1, 2, 4),
        "depths": (1, 1, 3),
        "drop_path_rate": 0.0,
        "_dtype": torch.float64,
        "_prepare": unfuse,
    },
    {
        "nest": {},
        "nest, padded as in jax": {"pad_type": "same", "qkv_bias": False},
        "nest, drop path": {"drop_path_rate": 0.2, "global_pool": "max"},
        "nest, two levels": {
            "num_levels": 2,
            "depths": (1, 2),
            "embed_dims": (8, 32),
            "num_heads": 4,
        },
    },
)
PIT = small_hosts(
    PoolingVisionTransformer,
    {
        "img_size": 32,
        "patch_size": 6,
        "stride": 3,
        "base_dims": (8, 8, 8),
        "heads": (1, 2, 4),
        "depth": (1, 2, 1),
    },
    {
        "pit": {},
        "pit, distilled": {"distilled": True},
        "pit, drop path": {**DROPS, "img_size": (32, 38)},
        "pit, float64": {"_dtype": torch.float64},
    },
)
HIERA = small_hosts(
    "hiera_tiny_224",
    {
        "img_size": (64, 96),
        "embed_dim": 8,
        "stages": (1, 1, 3, 1),
        "head_init_scale": 1.0,
        "_prepare": unfuse,
    },
    {
        "hiera": {},
        "hiera, positions of windows": {"abs_win_pos_embed": True, "init_values": 0.1},
        "hiera, drop path": {"drop_path_rate": 0.2, "stages": (1, 1, 2, 2)},
        "hiera, pooled copies": {"use_expand_proj": False, "_dtype": torch.float64},
    },
)


def freeze_what_softmax_hides(host: Any) -> None:
    """Freezes what is added to all logits alike, which a softmax does not show."""
    for name, parameter in host.named_parameters():
        hidden = name.endswith(("rel_pos.mlp.fc2.bias", "proj_l.bias", "attn.k.bias"))
        parameter.requires_grad_(not hidden)


def freeze_biases(host: Any) -> None:
    """Freezes all biases: those before a batch norm do not show."""
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))


COATNET = small_hosts(
    "coatnet_0_rw_224",
    {
        "img_size": 64,
        "embed_dim": (8, 8, 16, 16),
        "depths": (1, 1, 3, 1),
        "stem_width": (8, 8),
        "transformer_dim_head": 4,
        "head_hidden_size": None,
    },
    {
        "coatnet": {},
        "coatnet, network": {
            "_name": "coatnet_rmlp_0_rw_224",
            "transformer_rel_pos_dim": 8,
            "_prepare": freeze_what_softmax_hides,
        },
        "coatnet, tensorflow's": {
            "_name": "coatnet_0_224",
            "head_hidden_size": 16,
            "_dtype": torch.float64,
        },
        "coatnet, batch norms": {"_name": "coatnet_bn_0_rw_224", "_prepare": freeze_biases},
        "coatnext": {"_name": "coatnext_nano_rw_224", "drop_path_rate": 0.2},
        "coatnet, float64": {"_dtype": torch.float64, "img_size": (64, 96)},
    },
)
METAFORMER = small_hosts(
    MetaFormer,
    {
        "dims": (8, 8, 16, 16),
        "depths": (1, 1, 3, 1),
        "token_mixers": [SepConv, SepConv, Attention, Attention],
        "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        "head_dim": 8,
        "_prepare": lambda host: setattr(host, "pretrained_cfg", {"input_size": (3, 64, 80)}),
    },
    {
        "caformer": {},
        "caformer, LayerScale everywhere": {"layer_scale_init_values": 0.1},
        "caformer, no head norm": {"output_norm": torch.nn.Identity, "use_mlp_head": False},
        "caformer, drop path": {"drop_path_rate": 0.2, "_dtype": torch.float64},
    },
)
CAIT = small_hosts(
    "cait_xxs24_224",
    {**FLAT, "init_values": 0.5, "_prepare": freeze_what_softmax_hides},
    {
        "cait": {},
        "cait, no bias": {"qkv_bias": False, "num_heads": 2},
        "cait, drop path": {**DROPS, "depth_token_only": 1},
        "cait, sequence": {"global_pool": ""},
        "cait, float64": {"_dtype": torch.float64},
    },
)
VOLO = small_hosts(
    timm.models.volo.VOLO,
    {
        "img_size": (48, 64),
        "layers": (1, 2, 1),
        "embed_dims": (16, 32, 32),
        "num_heads": (2, 4, 4),
        "downsamples": (True, False, False),
        "outlook_attention": (True, False, False),
        "stem_hidden_dim": 8,
        "_dtype": torch.float64,
    },
    {
        "volo": {},
        "volo, mean": {"global_pool": "avg", "qkv_bias": True},
        "volo, one head": {"use_aux_head": False},
        "volo, sequence": {"global_pool": "", "use_aux_head": False, "drop_path_rate": 0.2},
    },
)
QWEN3 = small_hosts(
    "qwen3_vit_88m",
    {
        "img_size": (16, 24),
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "pos_embed_grid_size": 4,
    },
    {
        "qwen3": {},
        "qwen3, projector": {"encoder_pool": "merge", "out_features": 12},
        "deepseek": {
            "_name": "deepseek_vit_412m",
            "encoder_pool": "align",
            "out_features": 12,
            "pos_embed_grid_size": LEFT_OUT,
        },
        "qwen3, sequence": {"global_pool": "", **DROPS},
        "qwen3, float64": {"_dtype": torch.float64, "final_norm": False},
    },
)
SWIN = small_hosts(
    SwinTransformer,
    {
        "img_size": 64,
        "embed_dim": 8,
        "depths": (1, 1, 3, 1),
        "num_heads": (1, 2, 4, 4),
        "window_size": 4,
        "drop_path_rate": 0.0,
        "_prepare": unfuse,
    },
    {
        "swin": {},
        "swin v2": {"_name": SwinTransformerV2},
        "swin v2, no bias": {"_name": SwinTransformerV2, "qkv_bias": False, "drop_path_rate": 0.2},
        "swin, oblong": {"img_size": (64, 96), "window_size": (4, 6), "head_dim": 6},
        "swin v2, float64": {"_name": SwinTransformerV2, "_dtype": torch.float64},
    },
)
GEMMA4 = small_hosts(
    "gemma4_vit_167m",
    {
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "head_dim": 8,
        "intermediate_size": 48,
        "num_kv_heads": 4,
        "pooling_kernel_size": 1,
        "use_clipped_linears": False,  # its limits are buffers, and random ones leave no gradient
        "_prepare": say_input_size,
    },
    {
        "gemma4": {},
        "gemma4, soft tokens": {"encoder_pool": "soft"},
        "gemma4, shared keys": {"num_kv_heads": 2},
        "gemma4, sequence": {"global_pool": "", "drop_path_rate": 0.2},
        "gemma4, float64": {"_dtype": torch.float64},
    },
)
SMALL_HOSTS = {
    "timm_beit": BEIT,
    "timm_cait": CAIT,
    "timm_coatnet": COATNET,
    "timm_gemma4": GEMMA4 if timm.is_model("gemma4_vit_167m") else (),  # as of Qwen 3
    "timm_hiera": HIERA,
    "timm_metaformer": METAFORMER,
    "timm_naflex": NAFLEX,
    "timm_nest": NEST,
    "timm_pit": PIT,
    "timm_qwen3": QWEN3 if timm.is_model("qwen3_vit_88m") else (),  # older versions have none
    "timm_relpos": RELPOS,
    "timm_swin": SWIN,
    "timm_volo": VOLO,
}
