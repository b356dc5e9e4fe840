"""Small variants of torchvision's vision transformer, by every argument that changes what it does.

torchvision's registry builds one variant of the class in five sizes. The others are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

from timm_variants import randomise

SMALL = {
    "image_size": 20,
    "patch_size": 4,
    "num_layers": 3,
    "num_heads": 4,
    "hidden_dim": 32,
    "mlp_dim": 48,
    "num_classes": 7,
}
STEM = {
    "image_size": 48,
    "patch_size": 8,
    "conv_stem_configs": [ConvStemConfig(width, 3, 2) for width in (8, 16, 24)],
}
SILU_STEM = {
    **STEM,
    "conv_stem_configs": [
        ConvStemConfig(width, 5, 2, nn.BatchNorm2d, nn.SiLU) for width in (8, 16, 24)
    ],
}


@dataclass(frozen=True, eq=False)
class Variant:
    """One variant of a host: what it is called, and its arguments beside `SMALL`."""

    label: str
    args: Mapping[str, Any]
    dtype: torch.dtype = torch.float32

    def build(self) -> Any:
        """Builds a small host with strongly random weights, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            host = VisionTransformer(**{**SMALL, **self.args})
        randomise(host)
        return host.eval().to(self.dtype)

    def __str__(self) -> str:
        return self.label


VARIANTS = (
    Variant("vit", {}),
    Variant("vit one head", {"num_heads": 1}),
    Variant("vit representation", {"representation_size": 12}),
    Variant("vit dropout", {"dropout": 0.1, "attention_dropout": 0.2}),
    Variant("vit convolutional stem", STEM),
    Variant("vit SiLU stem, representation", {**SILU_STEM, "representation_size": 12}),
    Variant("vit float64", {}, torch.float64),
    Variant("vit float16", {}, torch.float16),
    Variant("vit bfloat16", {}, torch.bfloat16),
)


def variants(family: str) -> tuple[Variant, ...]:
    """Lists small variants of a family of this library."""
    return {"torchvision_vit": VARIANTS}[family]


def random_images(host: Any, batch: int = 2, *, seed: int = 1) -> Tensor:
    """Makes random images that fit the host."""
    noise = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, host.image_size, host.image_size, generator=noise)
    return images.to(next(host.parameters()).dtype)
