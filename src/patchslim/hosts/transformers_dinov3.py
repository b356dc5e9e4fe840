"""Hugging Face's `DINOv3` (ViT), with registers and rotary positions.

A token keeps the rotary position of the grid cell it comes from, wherever it stands in the
sequence; a merged token keeps that of the token into which the group was merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._adapter import Part
from patchslim.hosts._rotary import rotate_halves
from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_backbone import lay_out_map
from patchslim.hosts._transformers_layout import Layout
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.tokens import Tokens


class TransformersDinov3(TransformersHost):
    """DINOv3's vision transformer, as a bare model or as a backbone that returns the last stage."""

    family: ClassVar[str] = "transformers DINOv3"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "dinov3_vit": Layout(
            classes=("DINOv3ViTModel", "DINOv3ViTBackbone"),
            layers="model.layer",
            patches="embeddings.patch_embeddings",
            final="norm",
            norm="norm1",
            mix=("attention.o_proj", "layer_scale1", "drop_path"),
            feed=("norm2", "mlp", "layer_scale2", "drop_path"),
            any_size=True,
        )
    }

    def prefix(self, host: Any) -> int:
        """Counts the class token and the registers."""
        return 1 + int(host.config.num_register_tokens)

    def rows_read(self, host: Any) -> int | None:
        """Says that all rows are read: each is returned."""
        return None

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embeddings, and notes cosines and sines of rotary positions."""
        tokens = super().embed(host, images, options)
        images = images.to(tokens.x.dtype)
        table = torch.cat(host.rope_embeddings(images), dim=1)
        return Tokens(x=tokens.x, prefix=tokens.prefix, grid=tokens.grid, rotary=table)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projections, and turns queries and keys of patches."""
        projected = super().project(host, index, tokens, part)
        return tuple(
            each if name == "v" else rotate_halves(tokens, each)
            for name, each in zip(part, projected, strict=True)
        )

    def feature_maps(self, host: Any, tokens: Tokens, stages: Mapping[str, Tensor]) -> Any:
        """Makes the output of a backbone; the last stage is normed whatever is configured."""
        last = self.norm(host, tokens.dense_features())
        asked, end = host.config, host.stage_names[-1]
        every = [
            last if name == end else self.norm(host, rows) if asked.apply_layernorm else rows
            for name, rows in stages.items()
        ]
        if asked.reshape_hidden_states:
            maps = tuple(lay_out_map(tokens, rows) for rows in every)
        else:
            maps = tuple(rows[:, tokens.prefix :] for rows in every)
        with_class = getattr(asked, "return_class_token", False)
        output = output_class(host, "DINOv3ViTBackboneOutput")(
            feature_maps=maps,
            cls_tokens=tuple(rows[:, 0] for rows in every) if with_class else None,
        )
        output.last_hidden_state = last  # as the host does: beside the fields of its class
        return output

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Takes the class token."""
        return rows[:, 0]

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Takes the class token."""
        return self.norm(host, tokens.x[:, 0])
