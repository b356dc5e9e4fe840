"""Small hosts of every kind, by the rows that their head reads and how, for laws of the surface."""

from __future__ import annotations

from typing import Any

import pytest

import patchslim
from options import KNOWN
from patchslim.model.model import SlimModel
from variants import Variant


def small(family: str, **args: Any) -> Variant:
    """A small host of a family, with these arguments."""
    return Variant(family, KNOWN[family], args)


# Every kind of host, small: by the rows that its head reads, and how.
HOSTS = {
    "class token": small("vit"),
    "distilled": small("distilled"),
    "registers, no class token": small("vit", reg_tokens=3, class_token=False, global_pool="avg"),
    "average over the prefix": small("vit", global_pool="avg", pool_include_prefix=True),
    "average and maximum": small("vit", global_pool="avgmax"),
    "query": small("vit", global_pool="map", class_token=False),
    "query over the prefix": small("vit", global_pool="map", pool_include_prefix=True),
    "refined": small("vit", global_pool="prr"),
    "rotary average": small("eva", use_rot_pos_emb=True, rope_type="mixed", num_reg_tokens=1),
    "rotary class token": small("eva", use_rot_pos_emb=True, global_pool="token"),
    "rotary query": small("eva", use_rot_pos_emb=True, global_pool="map"),
}
every_host = pytest.mark.parametrize("variant", HOSTS.values(), ids=HOSTS)


def slimmed(host: Any, method: str = "tome", **budget: Any) -> SlimModel:
    """The host with about a third of its patches gone half way."""
    return patchslim.slim(host, method, **(budget or {"keep_rate": 0.7, "at": (0, 1)}))
