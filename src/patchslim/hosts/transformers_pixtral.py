"""Hugging Face's encoder of `Pixtral`, with rotary positions, and images of any size.

The host lays all images of a batch in one row, and no image attends to another. A slimmed one runs
images of one size as a batch, and lays out the same row at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.errors import WrongInput
from patchslim.hosts._adapter import Part
from patchslim.hosts._rotary import rotate_halves
from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.tokens import Tokens

SIZES = "image_sizes"


class TransformersPixtral(TransformersHost):
    """The vision encoder of Pixtral and Mistral, alone or in their models."""

    family: ClassVar[str] = "transformers Pixtral"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "pixtral": Layout(
            classes=("PixtralVisionModel",),
            layers="transformer.layers",
            patches="patch_conv",
            norm="attention_norm",
            mix=("attention.o_proj",),
            feed=("ffn_norm", "feed_forward"),
            any_size=True,
        )
    }

    def prefix(self, host: Any) -> int:
        """Says that all rows are patches."""
        return 0

    def rows_read(self, host: Any) -> int | None:
        """Says that all rows are read: each is returned."""
        return None

    def options(self, host: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Accepts the kind of return value, and the sizes of images, which `embed` compares."""
        sizes = {SIZES: given[SIZES]} if given.get(SIZES) is not None else {}
        others = {name: given[name] for name in given if name != SIZES}
        return {**super().options(host, others), **sizes}

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds patches, norms them, and notes cosines and sines of rotary positions."""
        size = [*images.shape[-2:]]
        others = [each for each in options.get(SIZES, ()) if [int(side) for side in each] != size]
        if others:
            height, width = map(int, others[0])
            raise WrongInput(
                f"{SIZES} has an image of {height}x{width} pixels in a batch of {size[0]}x"
                f"{size[1]}, and a slimmed {type(host).__name__} takes images without padding. "
                "Give images of one size at a time."
            )
        rows, grid = host.ln_pre(self.embedding(host, images)), self._grid(host, size)
        down, across = (torch.arange(side, device=images.device) for side in grid)
        cells = torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1).flatten(0, 1)
        table = torch.cat(host.patch_positional_embedding(rows, cells), dim=-1)
        return Tokens(x=rows, prefix=0, grid=grid, rotary=table)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projections, and turns queries and keys of patches."""
        projected = super().project(host, index, tokens, part)
        return tuple(
            each if name == "v" else rotate_halves(tokens, each)
            for name, each in zip(part, projected, strict=True)
        )

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Leaves rows as they are: there is no final norm."""
        return x

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of the bare model: the rows of all images in one."""
        rows = self.lay_out(tokens.dense_features())
        return output_class(host, "BaseModelOutputWithPooling")(last_hidden_state=rows)

    def lay_out(self, rows: Tensor) -> Tensor:
        """Lays the rows of all images in one."""
        return rows.flatten(0, 1).unsqueeze(0)

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Says that nothing is pooled."""
        return None
