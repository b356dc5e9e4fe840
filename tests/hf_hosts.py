"""Small Hugging Face hosts with strongly random weights, one for each kind that is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from timm_variants import randomise

SMALL_CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 7,
}
VIT_CONFIG = {"intermediate_size": 48}
OBLONG_CONFIG = {**VIT_CONFIG, "image_size": (16, 20)}
DINO_CONFIG = {"mlp_ratio": 2, "layerscale_value": 0.1}


@dataclass(frozen=True, eq=False)
class HfHost:
    """One kind of host: its class, what its configuration adds, and arguments of the class."""

    label: str
    settings: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    dtype: torch.dtype = torch.float32

    def build(self) -> Any:
        """Builds the host, in evaluation mode."""
        cls = getattr(transformers, self.label.partition(" ")[0])
        config = cls.config_class(**{**SMALL_CONFIG, **self.settings})
        with torch.random.fork_rng(devices=[]):
            host = cls(config, **self.arguments)
        host.set_attn_implementation(self.attention)
        randomise(host)
        return host.eval().to(self.dtype)

    def __str__(self) -> str:
        return f"{self.label} ({self.attention})"


def list_hosts(attention: str) -> list[HfHost]:
    """Lists every kind of host, with one implementation of attention."""
    return [
        HfHost(label, settings, arguments, attention)
        for label, settings, arguments in (
            ("ViTModel", OBLONG_CONFIG, {}),
            ("ViTModel without pooler", OBLONG_CONFIG, {"add_pooling_layer": False}),
            (
                "ViTModel with mask token",
                {**OBLONG_CONFIG, "qkv_bias": False},
                {"use_mask_token": True},
            ),
            ("ViTForImageClassification", OBLONG_CONFIG, {}),
            ("ViTForImageClassification relu", {**OBLONG_CONFIG, "hidden_act": "relu"}, {}),
            ("DeiTModel", OBLONG_CONFIG, {}),
            ("DeiTModel without pooler", OBLONG_CONFIG, {"add_pooling_layer": False}),
            ("DeiTForImageClassification", OBLONG_CONFIG, {}),
            ("DeiTForImageClassificationWithTeacher", OBLONG_CONFIG, {}),
            ("Dinov2Model", DINO_CONFIG, {}),
            ("Dinov2Model swiglu", {**DINO_CONFIG, "use_swiglu_ffn": True}, {}),
            ("Dinov2ForImageClassification", {**DINO_CONFIG, "drop_path_rate": 0.1}, {}),
            ("Dinov2ForImageClassification swiglu", {**DINO_CONFIG, "use_swiglu_ffn": True}, {}),
            ("Dinov2WithRegistersModel", {**DINO_CONFIG, "num_register_tokens": 3}, {}),
            ("Dinov2WithRegistersModel none", {**DINO_CONFIG, "num_register_tokens": 0}, {}),
            ("Dinov2WithRegistersForImageClassification", DINO_CONFIG, {}),
            (
                "Dinov2WithRegistersForImageClassification swiglu",
                {**DINO_CONFIG, "use_swiglu_ffn": True, "hidden_dropout_prob": 0.1},
                {},
            ),
        )
    ]


OTHER_DTYPES = [
    HfHost("ViTForImageClassification half", OBLONG_CONFIG, dtype=torch.float16),
    HfHost("Dinov2ForImageClassification half", DINO_CONFIG, dtype=torch.bfloat16),
    HfHost("DeiTModel double", OBLONG_CONFIG, dtype=torch.float64),
]
# Attention is chosen apart from everything else: by default few classes write it out themselves.
EAGER_BY_DEFAULT = ("ViTForImageClassification", "DeiTModel", "Dinov2WithRegistersModel")
HF_HOSTS = [*list_hosts("sdpa"), *list_hosts("eager"), *OTHER_DTYPES]


def tiny_hf(label: str = "ViTForImageClassification", **settings: Any) -> Any:
    """Makes a small host of this class, with these additions to its configuration."""
    own = DINO_CONFIG if label.startswith("Dinov2") else VIT_CONFIG
    return HfHost(label, {**own, **settings}).build()


def random_pixels(host: Any, batch: int = 2, *, seed: int = 1) -> Tensor:
    """Makes random images that fit the host."""
    size = host.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=noise).to(host.dtype)
