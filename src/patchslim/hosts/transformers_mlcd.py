"""Hugging Face's `MLCD`: CLIP's tower with rotary positions, the class token's learned.

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
from patchslim.hosts._transformers_layout import Layout
from patchslim.tokens.tokens import Tokens


class TransformersMlcd(TransformersHost):
    """The vision encoder of MLCD, which LLaVA-like models build on."""

    family: ClassVar[str] = "transformers MLCD"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "mlcd": Layout(
            classes=("MLCDVisionModel",),
            layers="encoder.layers",
            patches="embeddings.patch_embedding",
            first="pre_layrnorm",
            final="post_layernorm",
            attention="self_attn",
            norm="layer_norm1",
            mix=("self_attn.out_proj",),
            feed=("layer_norm2", "mlp"),
            any_size=True,
        )
    }

    def prefix(self, host: Any) -> int:
        """Counts the class token."""
        return 1

    def rows_read(self, host: Any) -> int | None:
        """Says that all rows are read: each is returned."""
        return None

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embeddings, and notes cosines and sines of rotary positions."""
        tokens = super().embed(host, images, options)
        down, across = (torch.arange(side, device=images.device) for side in tokens.grid)
        cells = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).flatten(0, 1)
        table = torch.cat(host.vision_rotary_embedding(tokens.x, cells), dim=-1)
        return Tokens(x=tokens.x, prefix=tokens.prefix, grid=tokens.grid, rotary=table)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projections, and turns queries and keys, in float32 as the host does."""
        projected = super().project(host, index, tokens, part)
        return tuple(
            each if name == "v" else _turn(host, tokens, each.float()).to(each.dtype)
            for name, each in zip(part, projected, strict=True)
        )

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Leaves rows as they are: the host norms what it pools."""
        return x

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Norms the class token."""
        pooled: Tensor = host.post_layernorm(rows[:, 0])
        return pooled

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Says that there is no classifier."""
        raise NotImplementedError


def _turn(host: Any, tokens: Tokens, t: Tensor) -> Tensor:
    """Turns queries or keys (B, H, N, d): patches by their cells, the class token as learned."""
    leading, patches = rotate_halves(tokens, t).split([1, t.shape[2] - 1], dim=2)
    angle = torch.cat([host.class_pos_emb, host.class_pos_emb], dim=-1)
    first, second = leading.chunk(2, dim=-1)
    leading = leading * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()
    return torch.cat([leading, patches], dim=2)
