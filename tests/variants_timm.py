"""Small variants of timm's families: those of its registry, and options that no name in it uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.levit import Levit, LevitDistilled
from torch import nn

from patchslim.architectures.evo_levit import EvoLevit
from timm_options import OPTIONS
from timm_small_hosts import SMALL_HOSTS, SmallHost
from timm_variants import Variant, randomise, registered_variants

LEVIT = {
    "img_size": (80, 112),
    "embed_dim": (16, 24, 32),
    "key_dim": 4,
    "num_heads": (2, 3, 4),
    "depth": (2, 1, 2),
    "num_classes": 7,
}
SMALL_STEM = {"stem_type": "s8", "img_size": (40, 56)}
TWO_STAGES = {"img_size": 96, "embed_dim": (16, 32), "num_heads": 2, "depth": (1, 2)}


@dataclass(frozen=True, eq=False)
class LevitVariant:
    """A small LeViT; in float64, since its weights magnify rounding."""

    label: str
    host: type[nn.Module]
    args: Mapping[str, Any]

    def build(self) -> Any:
        """Builds a small host with strongly random weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            host = self.host(**{**LEVIT, **self.args})
        randomise(host)
        if getattr(host, "use_conv", False):  # a norm over two images leaves gradients of rounding
            host.head.bn.eps = 1.0
        return host.double().eval()

    def __str__(self) -> str:
        return self.label


LEVIT_VARIANTS = (
    LevitVariant("Levit", Levit, {}),
    LevitVariant("LevitDistilled", LevitDistilled, {}),
    LevitVariant(
        "LevitDistilled at stride 8, other ratios",
        LevitDistilled,
        {**SMALL_STEM, "attn_ratio": (1, 3, 2), "mlp_ratio": (1, 2, 3)},
    ),
    LevitVariant("Levit with maps", Levit, {"use_conv": True}),
    LevitVariant("EvoLevit", EvoLevit, {}),
    LevitVariant(
        "EvoLevit, two stages, other ratios",
        EvoLevit,
        {**TWO_STAGES, "attn_ratio": 1.5, "mlp_ratio": 3.0, "drop_path_rate": 0.1},
    ),
)
VIT_AND_EVA: tuple[Variant, ...] = (*registered_variants(), *OPTIONS)


# Families whose hosts, or some of them, older versions of timm build otherwise.
IS_OLD = tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31)
NEW = ("timm_beit", "timm_cait", "timm_coatnet", "timm_naflex", "timm_relpos")


def variants(family: str) -> tuple[Variant, ...] | tuple[LevitVariant, ...] | tuple[SmallHost, ...]:
    """Lists small variants of a family of this library."""
    if family in SMALL_HOSTS:
        return () if IS_OLD and family in NEW else SMALL_HOSTS[family]
    if family == "timm_levit":
        return LEVIT_VARIANTS
    of_eva = {"timm_eva": True, "timm_vit": False}[family]
    return tuple(each for each in VIT_AND_EVA if issubclass(each.host, Eva) == of_eva)


def is_combination(variant: Variant | LevitVariant | SmallHost) -> bool:
    """Tells whether it combines options each of which another variant has by itself, or is slow."""
    if isinstance(variant, SmallHost):
        return variant.slow
    return isinstance(variant, Variant) and bool(variant.names)
