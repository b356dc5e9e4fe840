"""Hugging Face's `YOLOS`: a ViT that detects by tokens of its own, which are never removed.

The host keeps detection tokens behind the patches. Here they stand before them, with the class
token, and are put back where rows are returned. Positions that are added between layers are looked
up by the grid cell that a token comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._adapter import Part
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.tokens import Tokens

DETECTORS = ("class_labels_classifier", "bbox_predictor")


class TransformersYolos(TransformersHost):
    """YOLOS, as a bare model or with its heads for classes and boxes."""

    family: ClassVar[str] = "transformers YOLOS"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "yolos": Layout(
            classes=("YolosModel", "YolosForObjectDetection"),
            inner="vit",
            layers="encoder.layer",
            attention="attention.attention",
            projections=("query", "key", "value"),
            norm="layernorm_before",
            mix=("attention.output.dense", "attention.output.dropout"),
            feed=("layernorm_after", "intermediate", "output.dense", "output.dropout"),
            any_size=True,
        )
    }

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses what every tower refuses, and a loss on the states of all layers."""
        reason = super().unsupported_reason(host)
        if reason is None and getattr(host.config, "auxiliary_loss", False):
            return (
                "its configuration asks for auxiliary_loss, which reads the states of all layers "
                "in the dense shape. Set model.config.auxiliary_loss = False."
            )
        return reason

    def prefix(self, host: Any) -> int:
        """Counts the class token and the detection tokens."""
        return 1 + int(host.config.num_detection_tokens)

    def rows_read(self, host: Any) -> int | None:
        """Says that all rows are read: each is returned."""
        return None

    def returns_rows(self, host: Any) -> bool:
        """Says that it returns its sequence, also beside what it detects."""
        return True

    def gives_states(self, host: Any) -> bool:
        """Says no: positions are added between layers, and rows stand in another order here."""
        return False

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embeddings, and puts detection tokens before the patches."""
        tokens, base = super().embed(host, images, options), self.base(host)
        behind = tokens.prefix - 1
        first, patches, detecting = tokens.x.tensor_split([1, tokens.x.shape[1] - behind], dim=1)
        table = None
        if base.encoder.interpolation is not None:
            added = base.encoder.interpolation(images.shape[2:])[:, 0]  # (layers - 1, rows, C)
            table = added[:, 1 : added.shape[1] - behind].transpose(0, 1)
        x = torch.cat([first, detecting, patches], dim=1)
        return Tokens(x=x, prefix=tokens.prefix, grid=tokens.grid, rotary=table)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies the layer's own norm and its three projections, to what enters the layer."""
        return super().project(host, index, self._enter(host, index, tokens), part)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Adds attention to what enters the layer."""
        return super().mix(host, index, self._enter(host, index, queries), attended)

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of the bare model."""
        rows = self._rows(host, tokens)
        return output_class(host, "BaseModelOutputWithPooling")(
            last_hidden_state=rows, pooler_output=self.pool(host, tokens, rows)
        )

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Calls the pooler, if there is one."""
        pooled: Tensor | None = None if host.pooler is None else host.pooler(rows)
        return pooled

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Takes the detection tokens."""
        return self.norm(host, tokens.x[:, 1 : tokens.prefix])

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Detects, or returns the rows in the host's order."""
        if not hasattr(host, "bbox_predictor"):
            return super().head(host, tokens, options)
        output = self.classify(host, tokens, options)
        wanted = options.get("return_dict")
        as_tuple = wanted is False or (wanted is None and not host.config.return_dict)
        return output.to_tuple() if as_tuple else output

    def classify(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Makes the output of the detector, with its losses if labels are given."""
        read, labels = self.read(host, tokens), options.get("labels")
        logits, boxes = (getattr(host, name)(read) for name in DETECTORS)
        boxes = boxes.sigmoid()
        losses = (None, None, None)
        if labels is not None:
            losses = host.loss_function(
                logits, labels, logits.device, boxes, host.config, None, None
            )
        return output_class(host, "YolosObjectDetectionOutput")(
            loss=losses[0],
            loss_dict=losses[1],
            logits=logits,
            pred_boxes=boxes,
            last_hidden_state=self._rows(host, tokens),
        )

    def head_macs(self, host: Any) -> tuple[int, int]:
        """Counts the multiply-adds of the pooler, or of detecting by every detection token."""
        if not hasattr(host, "bbox_predictor"):
            return linear_macs(host.pooler), 0
        detecting = sum(linear_macs(getattr(host, name)) for name in DETECTORS)
        return int(host.config.num_detection_tokens) * detecting, 0

    def _rows(self, host: Any, tokens: Tokens) -> Tensor:
        """Computes all rows in the host's order: class token, patches, detection tokens."""
        rows = self.norm(host, tokens.dense_features())
        first, detecting, patches = rows.tensor_split([1, tokens.prefix], dim=1)
        return torch.cat([first, patches, detecting], dim=1)

    def _enter(self, host: Any, index: int, tokens: Tokens) -> Tokens:
        """Adds the positions that the host adds before a layer; to the first it adds none."""
        encoder = self.base(host).encoder
        if encoder.interpolation is None or index == 0:
            return tokens
        of_all = encoder.interpolation.mid_position_embeddings[index - 1, 0]
        own = torch.cat([of_all[:1], of_all[1 - self.prefix(host) :]])
        images = tokens.prefix // len(own)  # in a packed batch each prefix row stands once an image
        added = own.repeat_interleave(images, dim=0).expand(tokens.x.shape[0], -1, -1)
        if tokens.rotary is not None and tokens.patches:
            of_patches = tokens.rotary[:, index - 1][tokens.cells()]
            added = torch.cat([added, of_patches], dim=1)
        return tokens.with_x(tokens.x + added)
