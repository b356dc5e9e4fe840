"""Hugging Face's `MLCD`: CLIP's layers with rotary positions, of which the class has a learned one.

The class token is turned by an angle of its own, the patches by the grid cells they come from.
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
    """The vision encoder of MLCD, alone or in models that have it."""

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
        return Tokens(x=tokens.x, prefix=1, grid=tokens.grid, rotary=table)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projections, and turns queries and keys."""
        projected = super().project(host, index, tokens, part)
        return tuple(
            each if name == "v" else _turn(host, tokens, each)
            for name, each in zip(part, projected, strict=True)
        )

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Leaves rows as they are: the host norms only what it pools."""
        return x

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Norms the class token."""
        pooled: Tensor = host.post_layernorm(rows[:, 0])
        return pooled


def _turn(host: Any, tokens: Tokens, t: Tensor) -> Tensor:
    """Turns queries or keys in float32, as the host does: first patches, then the class token."""
    turned = rotate_halves(tokens, t.float())
    leading, patches = turned[:, :, :1], turned[:, :, 1:]
    angle = host.class_pos_emb.repeat(1, 2)
    first, second = leading.chunk(2, dim=-1)
    across = torch.cat([-second, first], dim=-1)
    leading = leading * angle.cos().float() + across * angle.sin().float()
    return torch.cat([leading, patches], dim=2).to(t.dtype)
