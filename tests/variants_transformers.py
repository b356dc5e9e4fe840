"""Small variants of transformers' families: every class, option and attention."""

from __future__ import annotations

from hf_hosts import EAGER_BY_DEFAULT, HF_HOSTS, HfHost


def variants(family: str) -> tuple[HfHost, ...]:
    """Lists small variants of a family of this library."""
    return {"transformers_vit": tuple(HF_HOSTS)}[family]


def is_combination(variant: HfHost) -> bool:
    """Tells whether it combines a class and an attention each of which another variant has."""
    return variant.attention == "eager" and variant.label not in EAGER_BY_DEFAULT
