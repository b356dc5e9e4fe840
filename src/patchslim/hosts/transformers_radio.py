"""Hugging Face's `RADIO`, with several class tokens, registers, and images of any size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.tokens import Tokens


class TransformersRadio(TransformersHost):
    """RADIO on images of one size at a time."""

    family: ClassVar[str] = "transformers RADIO"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "radio": Layout(
            classes=("RadioModel",),
            layers="encoder.layer",
            patches="embeddings.patch_projection",
            norm="norm1",
            mix=("attention.o_proj", "layer_scale1", "drop_path"),
            feed=("norm2", "mlp", "layer_scale2", "drop_path"),
            any_size=True,
        )
    }

    def prefix(self, host: Any) -> int:
        """Counts class tokens and registers."""
        return int(host.config.num_summary_tokens)

    def rows_read(self, host: Any) -> int | None:
        """Says that all rows are read: each is returned."""
        return None

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses sizes that are no whole number of patches."""
        patch = int(host.config.patch_size)
        if size[0] % patch or size[1] % patch or 0 in size:
            return f"height and width must be multiples of the patch, {patch}x{patch}."
        return None

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own normalisation and embeddings."""
        images = host.input_conditioner(images.to(self._patches(host).weight.dtype))
        grid = self._grid(host, images.shape[-2:])
        return Tokens(x=host.embeddings(images), prefix=self.prefix(host), grid=grid)

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        layer = self._patches(host)
        images = host.input_conditioner(images.to(layer.weight.dtype))
        size = int(host.config.patch_size)
        cells = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        projected: Tensor = layer(cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        return projected

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Leaves rows as they are: there is no final norm."""
        return x

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of the model: summary, patches, and all rows in the dense order."""
        rows = tokens.dense_features()
        return output_class(host, "RadioModelOutput")(
            summary=rows[:, host.summary_idxs].flatten(1),
            features=rows[:, tokens.prefix :],
            last_hidden_state=rows,
        )

    def logits(self, output: Any) -> Tensor:
        """Returns all rows."""
        rows: Tensor = output[2] if isinstance(output, tuple) else output["last_hidden_state"]
        return rows

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Says that nothing else is pooled."""
        return None
