"""Small variants of open_clip's vision transformer, by every argument that changes what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU, VisionTransformer
from torch import nn

from timm_variants import randomise

SMALL = {
    "image_size": (16, 20),
    "patch_size": 4,
    "width": 32,
    "layers": 3,
    "heads": 4,
    "mlp_ratio": 1.5,
    "output_dim": 12,
}
CUSTOM = {"qk_norm": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}


@dataclass(frozen=True, eq=False)
class Variant:
    """One variant of a host: what it is called, and its arguments beside `SMALL`."""

    label: str
    args: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    slow: bool = True

    def build(self) -> Any:
        """Builds a small host with strongly random weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            host = VisionTransformer(**{**SMALL, **self.args})
        randomise(host)
        return host.eval().to(self.dtype)

    def __str__(self) -> str:
        return self.label


VARIANTS = (
    Variant("tower", {}, slow=False),
    Variant("tower, mean of patches", {"pool_type": "avg"}, slow=False),
    Variant("tower with all tokens", {"output_tokens": True}, slow=False),
    Variant("tower, mean and tokens", {"pool_type": "avg", "output_tokens": True}),
    Variant("tower, sequence", {"pool_type": "none"}),
    Variant("tower, norm after the mean", {"pool_type": "avg", "final_ln_after_pool": True}),
    Variant(
        "tower, other epsilon, tanh GELU",
        {
            "norm_layer": partial(LayerNorm, eps=0.1),
            "act_layer": partial(nn.GELU, approximate="tanh"),
        },
    ),
    Variant("tower, quick GELU", {"act_layer": QuickGELU, "no_ln_pre": True}),
    Variant("tower, LayerScale", {"ls_init_value": 0.1, "norm_layer": LayerNormFp32}),
    Variant("tower, other blocks", {"block_type": "custom", **CUSTOM}),
    Variant("tower, scaled heads", {"block_type": "custom", "scale_heads": True}),
    Variant("tower, fixed positions", {"image_size": 16, "pos_embed_type": "sin_cos_2d"}),
    Variant("tower double", {}, torch.float64),
    Variant("tower half", {}, torch.float16),
)


def variants(family: str) -> tuple[Variant, ...]:
    """Lists small variants of a family of this library."""
    return {"open_clip_vit": VARIANTS}[family]


def is_combination(variant: Variant) -> bool:
    """Tells whether it is left to the slow suite."""
    return variant.slow
