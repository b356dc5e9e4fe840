"""Hugging Face's encoders of `SmolVLM`, `Idefics3` and `Idefics2`: SigLIP's layers, any size.

They take a mask of patches for images that were padded. A slimmed one takes images without padding,
of which the mask is true everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.errors import WrongInput
from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout
from patchslim.tokens.tokens import Tokens

MASK = "patch_attention_mask"


def _smolvlm(*classes: str) -> Layout:
    """Says where these encoders keep their parts."""
    return Layout(
        classes=classes,
        layers="encoder.layers",
        patches="embeddings.patch_embedding",
        final="post_layernorm",
        attention="self_attn",
        norm="layer_norm1",
        mix=("self_attn.out_proj",),
        feed=("layer_norm2", "mlp"),
        any_size=True,
    )


class TransformersSmolvlm(TransformersHost):
    """The vision encoders of SmolVLM and Idefics, alone or in their models."""

    family: ClassVar[str] = "transformers SmolVLM / Idefics"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "smolvlm": _smolvlm("SmolVLMVisionTransformer"),
        "idefics3": _smolvlm("Idefics3VisionTransformer"),
        "idefics2": _smolvlm("Idefics2VisionTransformer"),
    }

    def prefix(self, host: Any) -> int:
        """Says that all rows are patches."""
        return 0

    def rows_read(self, host: Any) -> int | None:
        """Says that all rows are read: each is returned."""
        return None

    def returns_rows(self, host: Any) -> bool:
        """Says that it returns its sequence."""
        return True

    def options(self, host: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Accepts the kind of return value, and a mask that hides nothing."""
        mask = given.get(MASK)
        if mask is not None and not bool(mask.all()):
            raise WrongInput(
                f"{MASK} hides patches of images that were padded, and a slimmed "
                f"{type(host).__name__} takes images without padding. Give images of one size."
            )
        return super().options(host, {name: given[name] for name in given if name != MASK})

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embeddings, with a mask that hides nothing."""
        images = images.to(self._patches(host).weight.dtype)
        grid = self._grid(host, images.shape[-2:])
        mask = torch.ones(images.shape[0], *grid, dtype=torch.bool, device=images.device)
        rows = host.embeddings(pixel_values=images, patch_attention_mask=mask)
        return Tokens(x=rows, prefix=0, grid=grid)

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Says that nothing is pooled."""
        return None
