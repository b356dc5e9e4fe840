"""Small variants of vit-pytorch's `ViT` and `SimpleViT`, if it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from timm_variants import randomise

SMALL = {
    "image_size": 20,
    "patch_size": 4,
    "num_classes": 7,
    "dim": 32,
    "depth": 3,
    "heads": 4,
    "mlp_dim": 48,
    "dim_head": 8,
}


@dataclass(frozen=True, eq=False)
class Variant:
    """One variant of a host: what it is called, its class, and its arguments beside `SMALL`."""

    label: str
    name: str
    args: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    slow: bool = True

    def build(self) -> Any:
        """Builds a small host with strongly random weights, in evaluation mode."""
        import vit_pytorch

        with torch.random.fork_rng(devices=[]):
            host = getattr(vit_pytorch, self.name)(**{**SMALL, **self.args})
        randomise(host)
        for parameter in host.parameters():
            parameter.requires_grad_(parameter.numel() > 0)  # no class token is one of no rows
        return host.eval().to(self.dtype)

    def __str__(self) -> str:
        return self.label


VARIANTS = (
    Variant("vit", "ViT", {}, slow=False),
    Variant("vit mean", "ViT", {"pool": "mean"}, slow=False),
    Variant("simple vit", "SimpleViT", {}, slow=False),
    Variant("vit sequence", "ViT", {"num_classes": 0}),
    Variant("vit dropout", "ViT", {"dropout": 0.1, "emb_dropout": 0.1}),
    Variant("vit one head", "ViT", {"heads": 1, "dim_head": 32}),
    Variant("vit oblong patches", "ViT", {"image_size": (20, 30), "patch_size": (4, 6)}),
    Variant("simple vit grey", "SimpleViT", {"channels": 1, "dim_head": 16}),
    Variant("simple vit double", "SimpleViT", {}, torch.float64),
)


def variants(family: str) -> tuple[Variant, ...]:
    """Lists small variants of a family of this library; none where it is not installed."""
    return VARIANTS if importlib.util.find_spec("vit_pytorch") else ()


def is_combination(variant: Variant) -> bool:
    """Tells whether it is left to the slow suite."""
    return variant.slow
