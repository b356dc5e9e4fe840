"""LeViT as Evo-ViT published it, on timm's parts: a class token, and positions in place of biases.

Importing this module makes `timm.create_model("evo_levit_128s")` and its siblings known. The
module knows nothing of how tokens are reduced: called by itself, the model is dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.levit import (
    Attention,
    AttentionDownsample,
    Downsample,
    LevitDistilled,
    LevitDownsample,
)
from torch import Tensor, nn

from patchslim.errors import UnsupportedModel

SIZES: dict[str, dict[str, Any]] = {
    "evo_levit_128s": {
        "embed_dim": (128, 256, 384),
        "key_dim": 16,
        "num_heads": (4, 6, 8),
        "depth": (2, 3, 4),
    },
    "evo_levit_128": {
        "embed_dim": (128, 256, 384),
        "key_dim": 16,
        "num_heads": (4, 8, 12),
        "depth": (4, 4, 4),
    },
    "evo_levit_192": {
        "embed_dim": (192, 288, 384),
        "key_dim": 32,
        "num_heads": (3, 5, 6),
        "depth": (4, 4, 4),
    },
    "evo_levit_256": {
        "embed_dim": (256, 384, 512),
        "key_dim": 32,
        "num_heads": (4, 6, 8),
        "depth": (4, 4, 4),
    },
    "evo_levit_384": {
        "embed_dim": (384, 512, 768),
        "key_dim": 32,
        "num_heads": (6, 9, 12),
        "depth": (4, 4, 4),
        "drop_path_rate": 0.1,
    },
}

# What timm's create functions and its `train.py` ask of a model; there are no weights to load.
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.conv1.linear",
            "classifier": ("head.linear", "head_dist.linear"),
        }
        for name in SIZES
    }
)


# Official names, in the order in which they are replaced by timm's.
OFFICIAL_NAMES = {
    "patch_embed.0.": "stem.conv1.",
    "patch_embed.2.": "stem.conv2.",
    "patch_embed.4.": "stem.conv3.",
    "patch_embed.6.": "stem.conv4.",
    ".m1.m.qkv.": ".attn.qkv.",
    ".m1.m.proj.1.": ".attn.proj.ln.",
    ".m2.m.": ".m.",
    ".m.0.": ".mlp.ln1.",
    ".m.2.": ".mlp.ln2.",
    "downsample.kv.": "downsample.attn_downsample.kv.",
    "downsample.q.1.": "downsample.attn_downsample.q.ln.",
    "downsample.proj.1.": "downsample.attn_downsample.proj.ln.",
    ".c.": ".linear.",
    ".l.": ".linear.",
    "poss": "pos_embed",
}


class NoAttentionBias(nn.Module):
    """Removes the biases of timm's attentions, so that they take any number of rows."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        del self.attention_biases, self.attention_bias_idxs

    def get_attention_biases(self, device: torch.device) -> int:  # noqa: ARG002 (timm's words)
        """Returns 0, which timm adds to the attention logits."""
        return 0

    def reset_parameters(self) -> None:
        """Resets nothing: the module has no parameters of its own."""

    def init_non_persistent_buffers(self) -> None:
        """Makes nothing: the module has no such buffers."""


class EvoAttention(NoAttentionBias, Attention):  # type: ignore[misc]
    """timm's `Attention` without biases."""


class EvoAttentionDownsample(NoAttentionBias, AttentionDownsample):  # type: ignore[misc]
    """timm's `AttentionDownsample` without biases, whose queries keep the class row."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        q: Any = self.q
        q.down = ClassDownsample(q.down.stride, q.down.resolution)


class ClassDownsample(Downsample):  # type: ignore[misc]
    """Keeps every second row and column of the patches, after the class row."""

    def forward(self, x: Tensor) -> Tensor:
        """Picks the class row and the patches that become queries."""
        return torch.cat((x[:, :1], super().forward(x[:, 1:])), dim=1)


class EvoDownsample(LevitDownsample):  # type: ignore[misc]
    """timm's `LevitDownsample` that first adds positions to all rows."""

    def __init__(self, like: LevitDownsample, **dd: Any) -> None:
        nn.Module.__init__(self)
        old = like.attn_downsample
        width = old.kv.linear.in_features
        self.pos_embed = nn.Parameter(torch.empty(1, _row_count(old.resolution), width, **dd))
        self.attn_downsample = EvoAttentionDownsample(
            in_dim=width,
            out_dim=old.proj.ln.linear.out_features,
            stride=old.stride,
            **_attention_settings(old),
            **dd,
        )
        self.mlp = like.mlp
        self.drop_path = like.drop_path
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets the positions. The other modules reset themselves."""
        trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a quarter of the patches, and the class row."""
        result: Tensor = super().forward(x + self.pos_embed)
        return result


class EvoLevit(LevitDistilled):  # type: ignore[misc]
    """LeViT with a class token that passes every stage, and a head that pools the patches alone.

    The settings are those of timm's `Levit`. Sequences are (B, 1 + patches, C), class row first.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if self.use_conv:
            raise UnsupportedModel(
                "EvoLevit has a class token, and maps of use_conv=True have no row for it. "
                "Build it with use_conv=False."
            )
        dd = {name: settings.get(name) for name in ("device", "dtype")}
        rows = _row_count(self.stages[0].blocks[0].attn.resolution)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim[0], **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, rows, self.embed_dim[0], **dd))
        for stage in self.stages:
            if isinstance(stage.downsample, LevitDownsample):
                stage.downsample = EvoDownsample(stage.downsample, **dd)
            for block in stage.blocks:
                width = block.attn.qkv.linear.in_features
                block.attn = EvoAttention(dim=width, **_attention_settings(block.attn), **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets class token and positions. The other modules reset themselves."""
        nn.init.zeros_(self.cls_token)
        trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Embeds images: the class token before the patches, with their positions."""
        x = self.stem(images).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes the final sequence, class row first."""
        x = self.embed(x)
        run = checkpoint_seq(self.stages, x) if self.grad_checkpointing else self.stages(x)
        result: Tensor = run
        return result

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Averages both heads; returns both outputs in distilled training."""
        return super().forward_head(x[:, 1:], pre_logits)

    def forward_intermediates(self, *_: Any, **__: Any) -> Any:
        """Raises UnsupportedModel: timm's code would take the class row for a patch."""
        raise UnsupportedModel(
            "EvoLevit gives no feature maps (features_only, forward_intermediates): its sequences "
            "hold a class token. Use forward_features."
        )

    def no_weight_decay(self) -> set[str]:
        """Lists the names of the positions, as published."""
        return {name for name, _ in self.named_parameters() if name.endswith("pos_embed")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002
        """Returns timm's own groups; class token and positions are in the first."""
        return {**super().group_matcher(coarse), "stem": r"^stem|^cls_token|^pos_embed"}


def convert_official_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the weights of an official Evo-LeViT checkpoint (its "model") to our names.

    Left out: the second copy of each block (`stage_blocks`), the heads on the class token, which
    only training uses, and the learned trade-offs, which belong to the method.
    """
    places = _block_paths(state)
    renamed = {}
    for name, value in state.items():
        top, _, rest = name.partition(".")
        if top in ("stage_blocks", "head_cls", "head_cls_dist") or name.endswith("learn_tradeoff"):
            continue
        if top == "blocks":
            index, _, rest = rest.partition(".")
            name = f"{places[int(index)]}.{rest}"
        for official, ours in OFFICIAL_NAMES.items():
            name = name.replace(official, ours)
        renamed[name] = value
    return renamed


def read_official_tradeoffs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads the learned trade-offs of an official checkpoint, by the names that `evo` has.

    Load them into the method: `slimmed.method.load_state_dict(..., strict=False)`.
    """
    tradeoffs: dict[str, Tensor] = {}
    block = 0
    for index in range(len(_block_paths(state))):
        for inner in ("m1.m.learn_tradeoff", "learn_tradeoff"):
            if f"blocks.{index}.{inner}" in state:
                tradeoffs[f"mixing.{block}"] = state[f"blocks.{index}.{inner}"].reshape(())
                block += 1
    return tradeoffs


def _block_paths(state: Mapping[str, Tensor]) -> list[str]:
    """Maps each of the official `blocks` to a block, or to one of a downsampling's parts."""
    places: list[str] = []
    stage, block = 0, 0
    while any(name.startswith(f"blocks.{len(places)}.") for name in state):
        start = f"blocks.{len(places)}."
        if f"{start}m1.m.qkv.c.weight" in state:
            places.append(f"stages.{stage}.blocks.{block}")
            block += 1
            continue
        if f"{start}kv.c.weight" in state:
            stage, block = stage + 1, 0
        places.append(f"stages.{stage}.downsample")
    return places


def _row_count(resolution: tuple[int, int]) -> int:
    """Counts the class row and the patches of a grid."""
    return 1 + resolution[0] * resolution[1]


def _attention_settings(attn: Attention | AttentionDownsample) -> dict[str, Any]:
    """Reads the arguments that one of timm's attentions was built with, without its widths."""
    return {
        "key_dim": attn.key_dim,
        "num_heads": attn.num_heads,
        "attn_ratio": attn.val_dim / attn.key_dim,
        "resolution": attn.resolution,
        "act_layer": type(attn.proj.act),
    }


def _create(name: str, settings: Mapping[str, Any]) -> EvoLevit:
    maps = {"feature_cls": "getter", "out_indices": (0, 1, 2)}
    chosen = {"pretrained": False, "feature_cfg": maps, **SIZES[name], **settings}
    model: EvoLevit = build_model_with_cfg(EvoLevit, name, **chosen)
    return model


def evo_levit_128s(**settings: Any) -> EvoLevit:
    """Builds Evo-LeViT-128S."""
    return _create("evo_levit_128s", settings)


def evo_levit_128(**settings: Any) -> EvoLevit:
    """Builds Evo-LeViT-128."""
    return _create("evo_levit_128", settings)


def evo_levit_192(**settings: Any) -> EvoLevit:
    """Builds Evo-LeViT-192."""
    return _create("evo_levit_192", settings)


def evo_levit_256(**settings: Any) -> EvoLevit:
    """Builds Evo-LeViT-256."""
    return _create("evo_levit_256", settings)


def evo_levit_384(**settings: Any) -> EvoLevit:
    """Builds Evo-LeViT-384."""
    return _create("evo_levit_384", settings)


for _size in (evo_levit_128s, evo_levit_128, evo_levit_192, evo_levit_256, evo_levit_384):
    register_model(_size)
