"""Small variants of transformers' families: every class, option and attention."""

from __future__ import annotations

from hf_hosts import EAGER_BY_DEFAULT, HF_HOSTS, HfHost
from hf_towers import (
    AST_TOWERS,
    BEIT_TOWERS,
    CLIP_TOWERS,
    DINOV3_TOWERS,
    MLCD_TOWERS,
    PIXTRAL_TOWERS,
    SMOLVLM_TOWERS,
    VIDEO_TOWERS,
    VIT_TOWERS,
    YOLOS_TOWERS,
    Tower,
)

VARIANTS: dict[str, tuple[HfHost | Tower, ...]] = {
    "transformers_vit": (*HF_HOSTS, *VIT_TOWERS),
    "transformers_clip": CLIP_TOWERS,
    "transformers_dinov3": DINOV3_TOWERS,
    "transformers_beit": BEIT_TOWERS,
    "transformers_yolos": YOLOS_TOWERS,
    "transformers_ast": AST_TOWERS,
    "transformers_mlcd": MLCD_TOWERS,
    "transformers_pixtral": PIXTRAL_TOWERS,
    "transformers_smolvlm": SMOLVLM_TOWERS,
    "transformers_video": VIDEO_TOWERS,
}


def variants(family: str) -> tuple[HfHost | Tower, ...]:
    """Lists small variants of a family of this library."""
    return VARIANTS[family]


def is_combination(variant: HfHost | Tower) -> bool:
    """Tells whether it is left to the slow suite, since quicker variants show what it is about."""
    if isinstance(variant, Tower):
        return variant.slow
    return variant.attention == "eager" and variant.label not in EAGER_BY_DEFAULT
