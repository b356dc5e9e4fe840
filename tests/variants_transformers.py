"""Small variants of transformers' families: every class, option and attention."""

from __future__ import annotations

from hf_hosts import HF_HOSTS, HfHost


def variants(family: str) -> tuple[HfHost, ...]:
    """Lists small variants of a family of this library."""
    return {"transformers_vit": tuple(HF_HOSTS)}[family]
