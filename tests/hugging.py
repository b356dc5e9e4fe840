"""Small Hugging Face hosts with strongly random weights, one for each kind that is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from variants import randomise

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 7,
}
WIDE = {"intermediate_size": 48}
OBLONG = {**WIDE, "image_size": (16, 20)}
DINO = {"mlp_ratio": 2, "layerscale_value": 0.1}


@dataclass(frozen=True, eq=False)
class Hugging:
    """One kind of host: its class, what its configuration adds, and arguments of the class."""

    label: str
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32

    def build(self) -> Any:
        """The host, in evaluation mode."""
        cls = getattr(transformers, self.label.partition(" ")[0])
        config = cls.config_class(**{**SMALL, **self.settings})
        with torch.random.fork_rng(devices=[]):
            host = cls(config, **self.arguments)
        host.set_attn_implementation(self.attention)
        randomise(host)
        return host.eval().to(self.dtype)

    def __str__(self) -> str:
        return f"{self.label} ({self.attention})"


def kinds(attention: str) -> list[Hugging]:
    """Every kind of host, with one implementation of attention."""
    return [
        Hugging(label, settings, arguments, attention)
        for label, settings, arguments in (
            ("ViTModel", OBLONG, {}),
            ("ViTModel without pooler", OBLONG, {"add_pooling_layer": False}),
            ("ViTModel with mask token", {**OBLONG, "qkv_bias": False}, {"use_mask_token": True}),
            ("ViTForImageClassification", OBLONG, {}),
            ("ViTForImageClassification relu", {**OBLONG, "hidden_act": "relu"}, {}),
            ("DeiTModel", OBLONG, {}),
            ("DeiTModel without pooler", OBLONG, {"add_pooling_layer": False}),
            ("DeiTForImageClassification", OBLONG, {}),
            ("DeiTForImageClassificationWithTeacher", OBLONG, {}),
            ("Dinov2Model", DINO, {}),
            ("Dinov2Model swiglu", {**DINO, "use_swiglu_ffn": True}, {}),
            ("Dinov2ForImageClassification", {**DINO, "drop_path_rate": 0.1}, {}),
            ("Dinov2ForImageClassification swiglu", {**DINO, "use_swiglu_ffn": True}, {}),
            ("Dinov2WithRegistersModel", {**DINO, "num_register_tokens": 3}, {}),
            ("Dinov2WithRegistersModel none", {**DINO, "num_register_tokens": 0}, {}),
            ("Dinov2WithRegistersForImageClassification", DINO, {}),
            (
                "Dinov2WithRegistersForImageClassification swiglu",
                {**DINO, "use_swiglu_ffn": True, "hidden_dropout_prob": 0.1},
                {},
            ),
        )
    ]


HALVES = [
    Hugging("ViTForImageClassification half", OBLONG, dtype=torch.float16),
    Hugging("Dinov2ForImageClassification half", DINO, dtype=torch.bfloat16),
    Hugging("DeiTModel double", OBLONG, dtype=torch.float64),
]
HUGGING = [*kinds("sdpa"), *kinds("eager"), *HALVES]


def tiny_hf(label: str = "ViTForImageClassification", **settings: Any) -> Any:
    """A small host of this class, with these additions to its configuration."""
    own = DINO if label.startswith("Dinov2") else WIDE
    return Hugging(label, {**own, **settings}).build()


def pixels(host: Any, batch: int = 2, *, seed: int = 1) -> Tensor:
    """Random images that fit the host."""
    size = host.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=noise).to(host.dtype)
