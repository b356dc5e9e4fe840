"""Hugging Face's encoders of videos that attend to all patches at once.

`VideoMAE`, `ViViT`, and the encoder of `V-JEPA 2`. Their grids have three axes: `Tokens.frames`
says how many frames there are, and in `Tokens.grid` these stand one below another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._adapter import Part
from patchslim.hosts._pooling import mean_of_patches
from patchslim.hosts._transformers import TransformersHost
from patchslim.hosts._transformers_layout import Layout, find_part
from patchslim.hosts._transformers_outputs import output_class
from patchslim.tokens.tokens import Tokens


class TransformersVideo(TransformersHost):
    """VideoMAE and ViViT, as bare models or classifiers, and the encoder of V-JEPA 2."""

    family: ClassVar[str] = "transformers VideoMAE / ViViT / V-JEPA 2"
    layouts: ClassVar[Mapping[str, Layout]] = {
        "videomae": Layout(
            classes=("VideoMAEModel", "VideoMAEForVideoClassification"),
            inner="videomae",
            layers="encoder.layer",
            attention="attention.attention",
            projections=("query", "key", "value"),
            norm="layernorm_before",
            mix=("attention.output.dense", "attention.output.dropout"),
            feed=("layernorm_after", "intermediate", "output.dense", "output.dropout"),
        ),
        "vivit": Layout(
            classes=("VivitModel", "VivitForVideoClassification"),
            inner="vivit",
            norm="layernorm_before",
            mix=("attention.o_proj", "dropout"),
            feed=("layernorm_after", "mlp", "dropout"),
        ),
        "vjepa2": Layout(
            classes=("VJEPA2Encoder",),
            layers="layer",
            patches="embeddings.patch_embeddings.proj",
            projections=("query", "key", "value"),
            norm="norm1",
            mix=("attention.proj", "drop_path"),
            feed=("norm2", "mlp", "drop_path"),
        ),
    }

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses what every tower refuses, and a classifier that reads one patch."""
        reason = super().unsupported_reason(host)
        if reason is not None or self._kind(host) != "videomae" or self.returns_rows(host):
            return reason
        if host.fc_norm is None:
            return (
                "with use_mean_pooling=False its classifier reads the first patch alone, and a "
                "reduced sequence may not have that. Slim the model in it, model.videomae."
            )
        return None

    def prefix(self, host: Any) -> int:
        """Counts ViViT's class token; the others have none."""
        return 1 if self._kind(host) == "vivit" else 0

    def rows_read(self, host: Any) -> int | None:
        """Says that ViViT's classifier reads the class token, and all others all rows."""
        return None if self._kind(host) != "vivit" or self.returns_rows(host) else 1

    def returns_rows(self, host: Any) -> bool:
        """Tells whether it returns its sequence."""
        return not type(host).__name__.endswith("ForVideoClassification")

    def gives_states(self, host: Any) -> bool:
        """Tells whether the host gives them: V-JEPA's encoder leaves that to its model."""
        return self._kind(host) != "vjepa2"

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embeddings."""
        embeddings, images = self.base(host).embeddings, images.to(self._patches(host).weight.dtype)
        masked = {"bool_masked_pos": None} if self._kind(host) == "videomae" else {}
        grid, frames = self._grid(host, images.shape[-2:]), self._tubelets(host)
        x = embeddings(images, **masked)
        return Tokens(x=x, prefix=self.prefix(host), grid=grid, frames=frames)

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        layer = self._patches(host)
        projected: Tensor = layer(images.to(layer.weight.dtype).transpose(1, 2))
        return projected.flatten(2).transpose(1, 2)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projections; V-JEPA's queries and keys are turned by their cell."""
        projected = super().project(host, index, tokens, part)
        if self._kind(host) != "vjepa2":
            return projected
        attention: Any = self.blocks(host)[index].attention
        places = attention.get_position_ids(tokens.x, masks=tokens.position)
        return tuple(
            each if name == "v" else attention.apply_rotary_embeddings(each, places)
            for name, each in zip(part, projected, strict=True)
        )

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm, if there is one."""
        final = find_part(self.base(host), self.layout(host).final)
        normed: Tensor = x if final is None else final(x)
        return normed

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of the bare model; only ViViT's has something pooled."""
        if self._kind(host) == "vivit":
            return super().features(host, tokens)
        rows = self.norm(host, tokens.dense_features())
        return output_class(host, "BaseModelOutput")(last_hidden_state=rows)

    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Calls ViViT's pooler, if there is one."""
        pooled: Tensor | None = None if host.pooler is None else host.pooler(rows)
        return pooled

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Takes the class token, or the mean of the patches and its norm."""
        x = self.norm(host, tokens.x)
        if tokens.prefix:
            return x[:, 0]
        pooled: Tensor = host.fc_norm(mean_of_patches(tokens, x))
        return pooled

    def _tubelet(self, host: Any) -> tuple[int, int, int]:
        """Reads the frames, the height and the width of a patch."""
        config = self.base(host).config
        if self._kind(host) == "vivit":
            frames, height, width = config.tubelet_size
            return int(frames), int(height), int(width)
        return int(config.tubelet_size), int(config.patch_size), int(config.patch_size)

    def _tubelets(self, host: Any) -> int:
        """Counts the frames of the grid."""
        return self._image_shape(host)[0] // self._tubelet(host)[0]

    def _image_shape(self, host: Any) -> tuple[int, ...]:
        """Reads frames, channels, height and width from the configuration."""
        config = self.base(host).config
        if self._kind(host) == "vjepa2":
            return config.frames_per_clip, config.in_chans, config.crop_size, config.crop_size
        channels, height, width = super()._image_shape(host)
        return config.num_frames, channels, height, width

    def _grid(self, host: Any, size: Any) -> tuple[int, int]:
        """Computes the grid of videos of this size, with frames one below another."""
        _, height, width = self._tubelet(host)
        return self._tubelets(host) * (size[0] // height), size[1] // width
