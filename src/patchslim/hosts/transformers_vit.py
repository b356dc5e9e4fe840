"""Hugging Face's plain vision transformers: `ViT`, `DeiT`, `DINOv2` and their kin.

ViTMSN, I-JEPA, DINOv2 with registers, TIPSv2, Pixio, and the encoders of InternVL, ViTPose and DPT.
Bare models, image classifiers, DeiT's classifier with a teacher, and backbones. Outputs are the
host's own output classes; attention maps of a reduced sequence are not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._pooling import mean_of_patches
from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_backbone import is_backbone
from patchslim.hosts._transformers_layout import Layout
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.tokens import Tokens

# Kinds whose bare model returns its rows alone, and the class of its output.
UNPOOLED = {
    "vit_msn": "BaseModelOutput",
    "internvl": "InternVLVisionModelOutputWithPooling",
}
POOLED = {"dpt": "BaseModelOutputWithPoolingAndIntermediateActivations"}


def _vit(*classes: str, inner: str) -> Layout:
    """Says where ViT and its kin keep their parts."""
    return Layout(
        classes=classes,
        inner=inner,
        norm="layernorm_before",
        mix=("attention.o_proj", "dropout"),
        feed=("layernorm_after", "mlp", "dropout"),
        interpolates=True,
    )


def _dinov2(*classes: str, inner: str = "") -> Layout:
    """Says where DINOv2 keeps its parts."""
    return Layout(
        classes=classes,
        inner=inner,
        layers="encoder.layer",
        norm="norm1",
        mix=("attention.o_proj", "layer_scale1", "drop_path"),
        feed=("norm2", "mlp", "layer_scale2", "drop_path"),
        any_size=True,
    )


class TransformersVit(TransformersHost):
    """Plain vision transformers of transformers 5 that share one layout."""

    family: ClassVar[str] = "transformers ViT / DeiT / DINOv2"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "vit": _vit("ViTModel", "ViTForImageClassification", inner="vit"),
        "deit": _vit(
            "DeiTModel",
            "DeiTForImageClassification",
            "DeiTForImageClassificationWithTeacher",
            inner="deit",
        ),
        "vit_msn": _vit("ViTMSNModel", "ViTMSNForImageClassification", inner="vit"),
        "ijepa": _vit("IJepaModel", "IJepaForImageClassification", inner="ijepa"),
        "dinov2": _dinov2(
            "Dinov2Model", "Dinov2ForImageClassification", "Dinov2Backbone", inner="dinov2"
        ),
        "dinov2_with_registers": _dinov2(
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersBackbone",
            inner="dinov2_with_registers",
        ),
        "tipsv2": _dinov2("Tipsv2VisionModel", "Tipsv2VisionBackbone"),
        "pixio": Layout(
            classes=("PixioModel", "PixioBackbone"),
            inner="pixio",
            norm="layernorm_before",
            mix=("attention.o_proj", "dropout", "drop_path"),
            feed=("layernorm_after", "mlp", "dropout", "drop_path"),
            any_size=True,
        ),
        "internvl": Layout(
            classes=("InternVLVisionModel",),
            layers="encoder.layer",
            norms={"q": "q_norm", "k": "k_norm"},
            norm="layernorm_before",
            mix=("attention.projection_layer", "attention.projection_dropout", "lambda_1"),
            feed=("layernorm_after", "mlp", "dropout", "lambda_2"),
            any_size=True,
        ),
        "dpt": Layout(
            classes=("DPTModel",),
            layers="encoder.layer",
            attention="attention.attention",
            projections=("query", "key", "value"),
            norm="layernorm_before",
            mix=("attention.output.dense", "attention.output.dropout"),
            feed=("layernorm_after", "intermediate", "output.dense", "output.dropout"),
            any_size=True,
        ),
        "vitpose_backbone": Layout(
            classes=("VitPoseBackbone",),
            layers="encoder.layer",
            attention="attention.attention",
            projections=("query", "key", "value"),
            norm="layernorm_before",
            mix=("attention.output.dense", "attention.output.dropout"),
            feed=("layernorm_after", "mlp"),
        ),
    }

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses what every tower refuses, ViTPose's experts, and DPT with a network before it."""
        if getattr(getattr(host, "config", None), "is_hybrid", False):
            return (
                "with is_hybrid=True a convolutional network makes its tokens, and its neck reads "
                "maps of that, too. Take a DPT without, such as Intel/dpt-large."
            )
        reason = super().unsupported_reason(host)
        if reason is None and getattr(host.config, "num_experts", 1) > 1:
            return (
                f"with num_experts={host.config.num_experts} it chooses an expert by the "
                "dataset_index of every call, and a slimmed model takes images alone."
            )
        return reason

    def prefix(self, host: Any) -> int:
        """Counts class tokens, distillation token and registers; I-JEPA and ViTPose have none."""
        kind, config = self._kind(host), self.base(host).config
        if kind in ("dinov2_with_registers", "tipsv2"):
            return 1 + int(config.num_register_tokens)
        if kind == "pixio":
            return int(config.n_cls_tokens)
        return {"deit": 2, "ijepa": 0, "vitpose_backbone": 0}.get(kind or "", 1)

    def rows_read(self, host: Any) -> int | None:
        """Counts the rows that the head reads: 1 or 2, or None for a mean of patches."""
        if type(host).__name__.endswith("WithTeacher"):
            return 2
        is_classifier = type(host).__name__.endswith("ForImageClassification")
        reads_class_token = self._kind(host) in ("vit", "deit", "vit_msn")
        return 1 if is_classifier and reads_class_token else None

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm; a Pixio backbone has one of its own around its model."""
        is_outer = self._kind(host) == "pixio" and is_backbone(host)
        normed: Tensor = host.layernorm(x) if is_outer else super().norm(host, x)
        return normed

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of a bare model; some have nothing pooled."""
        kind = self._kind(host) or ""
        rows = self.norm(host, tokens.dense_features())
        if kind in UNPOOLED:
            return output_class(host, UNPOOLED[kind])(last_hidden_state=rows)
        pooled = self.pool(host, tokens, rows)
        name = POOLED.get(kind, "BaseModelOutputWithPooling")
        return output_class(host, name)(last_hidden_state=rows, pooler_output=pooled)

    def feature_map(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor:
        """Makes the map of a stage; ViTPose's is always normed, and rows."""
        if self._kind(host) == "vitpose_backbone":
            return self.norm(host, rows)
        return super().feature_map(host, tokens, rows)

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Takes the class token of DINOv2, averages Pixio's, and calls the pooler of the others."""
        if _is_dinov2(self._kind(host)):
            return rows[:, 0]
        if self._kind(host) == "pixio":
            return rows[:, : tokens.prefix].mean(dim=1)
        pooled: Tensor | None = None if host.pooler is None else host.pooler(rows)
        return pooled

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Takes the class token, the mean of the patches, or both."""
        kind, x = self._kind(host), self.norm(host, tokens.x)
        if kind == "ijepa":
            return mean_of_patches(tokens, x)
        if _is_dinov2(kind):
            return torch.cat([x[:, 0], mean_of_patches(tokens, x)], dim=1)
        return x[:, 0]

    def classify(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Makes the output of a classifier; DeiT's two heads are averaged."""
        if not type(host).__name__.endswith("WithTeacher"):
            return super().classify(host, tokens, options)
        x = self.norm(host, tokens.x)
        of_class, distilled = host.cls_classifier(x[:, 0]), host.distillation_classifier(x[:, 1])
        return output_class(host, "DeiTForImageClassificationWithTeacherOutput")(
            logits=(of_class + distilled) / 2, cls_logits=of_class, distillation_logits=distilled
        )

    def _grid(self, host: Any, size: Any) -> tuple[int, int]:
        """Computes the grid; ViTPose pads images by two pixels on each side."""
        if self._kind(host) == "vitpose_backbone":
            size = [side + 4 for side in size]
        return super()._grid(host, size)


def _is_dinov2(kind: str | None) -> bool:
    """Tells whether this kind has DINOv2's layer layout."""
    return kind in ("dinov2", "dinov2_with_registers", "tipsv2")
