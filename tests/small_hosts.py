"""Small hosts of every kind, by which rows their head reads and how, for the host API."""

from __future__ import annotations

from typing import Any

import pytest

import patchslim
from patchslim.model.model import SlimModel
from timm_options import FAMILIES
from timm_variants import Variant


def small_variant(family: str, **args: Any) -> Variant:
    """Makes a small host of a family, with these arguments."""
    return Variant(family, FAMILIES[family], args)


# Every kind of host, small, by which rows its head reads and how.
HOSTS = {
    "class token": small_variant("vit"),
    "distilled": small_variant("distilled"),
    "registers, no class token": small_variant(
        "vit", reg_tokens=3, class_token=False, global_pool="avg"
    ),
    "average over the prefix": small_variant("vit", global_pool="avg", pool_include_prefix=True),
    "average and maximum": small_variant("vit", global_pool="avgmax"),
    "query": small_variant("vit", global_pool="map", class_token=False),
    "query over the prefix": small_variant("vit", global_pool="map", pool_include_prefix=True),
    "refined": small_variant("vit", global_pool="prr"),
    "rotary average": small_variant(
        "eva", use_rot_pos_emb=True, rope_type="mixed", num_reg_tokens=1
    ),
    "rotary class token": small_variant("eva", use_rot_pos_emb=True, global_pool="token"),
    "rotary query": small_variant("eva", use_rot_pos_emb=True, global_pool="map"),
}
every_host = pytest.mark.parametrize("variant", HOSTS.values(), ids=HOSTS)


def slim_host(host: Any, method: str = "tome", **budget: Any) -> SlimModel:
    """Slims the host by about a third of its patches halfway."""
    return patchslim.slim(host, method, **(budget or {"keep_rate": 0.7, "at": (0, 1)}))
