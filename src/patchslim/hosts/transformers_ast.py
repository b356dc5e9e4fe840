"""Hugging Face's `AST`: a ViT on spectrograms, whose patches overlap.

A spectrogram is (frames of time, bins of frequency), without channels. The grid of its patches has
a row for each band of frequency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout
from patchslim.tokens.tokens import Tokens


class TransformersAst(TransformersHost):
    """The audio spectrogram transformer, as a bare model or a classifier."""

    family: ClassVar[str] = "transformers AST"
    classifier_output: ClassVar[str] = "SequenceClassifierOutput"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "audio_spectrogram_transformer": Layout(
            classes=("ASTModel", "ASTForAudioClassification"),
            inner="audio_spectrogram_transformer",
            norm="layernorm_before",
            mix=("attention.o_proj", "dropout"),
            feed=("layernorm_after", "mlp", "dropout"),
        )
    }

    def prefix(self, host: Any) -> int:
        """Counts the class token and the distillation token."""
        return 2

    def rows_read(self, host: Any) -> int | None:
        """Says that a classifier reads these two."""
        return None if self.returns_rows(host) else 2

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses spectrograms of other lengths: each patch has a position of its own."""
        frames, bins = self._image_shape(host)
        if size == (frames, bins):
            return None
        return f"this host takes spectrograms of {frames} frames and {bins} bins; pad or cut them."

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        layer = self.base(host).embeddings.patch_embeddings
        projected: Tensor = layer(images.to(layer.projection.weight.dtype))
        return projected

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Averages the class token and the distillation token."""
        return (rows[:, 0] + rows[:, 1]) / 2

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Averages the class token and the distillation token, after the last norm."""
        normed = self.norm(host, tokens.x[:, :2])
        return (normed[:, 0] + normed[:, 1]) / 2

    def _image_shape(self, host: Any) -> tuple[int, ...]:
        """Reads frames and bins from the configuration."""
        return int(host.config.max_length), int(host.config.num_mel_bins)

    def _grid(self, host: Any, size: Any) -> tuple[int, int]:
        """Computes the grid of spectrograms of this size: bands of frequency, steps of time."""
        config = host.config
        bands = (size[1] - config.patch_size) // config.frequency_stride + 1
        return bands, (size[0] - config.patch_size) // config.time_stride + 1
