"""timm's vision encoders of Qwen3-VL and DeepSeek (`Qwen3Vit*`, `DeepseekVit*`).

All tokens attend to all, with rotary positions. The projector after the blocks joins squares of
patches, so it gets the whole grid, put back: a merged row in every cell that it stands for.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts import _timm_eva_blocks
from patchslim.hosts._adapter import Part
from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MODULES = ("timm.models.qwen3_vit", "timm.models.deepseek_vit")


class TimmQwen3(StageHost):
    """timm `Qwen3VitEncoder`, `DeepseekVitEncoder`, and their classifiers."""

    family: ClassVar[str] = "timm Qwen3Vit / DeepseekVit"
    host_classes: ClassVar[frozenset[str]] = frozenset(
        {
            f"{module}.{name}{kind}"
            for module, name in zip(MODULES, ("Qwen3Vit", "DeepseekVit"), strict=True)
            for kind in ("Encoder", "Classifier")
        }
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions."""
        reason = overridden_reason(host, MODULES)
        for block in () if reason else self.blocks(host):
            reason = (
                reason
                or foreign_class_reason("block", block, ("EvaBlock", "DeepseekVitBlock"))
                or foreign_class_reason("attention", block.attn, ("AttentionRope",))
            )
        return reason

    def size_mismatch(self, host: Any, size: tuple[int, int], options: Any) -> str | None:
        """Refuses sizes that are no multiple of the patch, or of what the projector joins."""
        encoder = _encoder(host)
        side = int(encoder.patch_embed.patch_size[0])
        if getattr(encoder, "merger", None) is not None:
            side *= int(encoder.merge_size)
        if encoder.patch_embed.dynamic_img_pad or not (size[0] % side or size[1] % side):
            return None
        return f"height and width must be multiples of {side}."

    def blocks(self, host: Any) -> Any:
        """Lists the blocks of the encoder."""
        return _encoder(host).blocks

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embeds patches and adds positions."""
        encoder = _encoder(host)
        x = encoder.patch_embed(images)
        rows, _ = encoder._pos_embed(x)
        return rows, (int(x.shape[1]), int(x.shape[2]))

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        x: Tensor = _encoder(host).patch_embed(images).flatten(1, 2)
        return x

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projection, and rotates by each patch's cell."""
        block: Any = self.blocks(host)[index]
        return _timm_eva_blocks.project(block, tokens, part, tokens.rotary)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies what the block does between attention and the residual sum."""
        return _timm_eva_blocks.mix(self.blocks(host)[index], queries.x, attended)

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies the feed-forward and its residual."""
        return _timm_eva_blocks.feed(self.blocks(host)[index], x)

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the encoder's last norm, which only DeepSeek's has."""
        final = getattr(_encoder(host), "norm", None)
        normed: Tensor = x if final is None else final(x)
        return normed

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Applies the last norm, projector or mean, and the classifier if there is one."""
        encoder = _encoder(host)
        x = self.norm(host, x).unflatten(1, grid)
        projector = getattr(encoder, "merger", None) or getattr(encoder, "aligner", None)
        if projector is not None:
            x = projector(x)
        elif encoder.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        return x if encoder is host else host.forward_head(x)

    def _rotary(self, host: Any, grid: tuple[int, int]) -> Tensor | None:
        table: Tensor = _encoder(host).rope.get_embed(shape=grid)
        return table

    def _attention(self, block: Any) -> Any:
        return block.attn

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        block: Any = self.blocks(host)[index]
        return _timm_eva_blocks.block_shape(block, int(_encoder(host).embed_dim))

    def _image_size(self, host: Any) -> tuple[int, int]:
        height, width = _encoder(host).patch_embed.img_size
        return int(height), int(width)


def _encoder(host: Any) -> Any:
    """Finds the encoder: the host, or what a classifier keeps."""
    return getattr(host, "encoder", host)
