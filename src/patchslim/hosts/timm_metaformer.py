"""timm's CAFormers (`MetaFormer` with attention): methods act in the third of its four stages.

It attends to all of its grid and has most of the attention. The convolutional stages before it run
whole, and so does the last stage. A PoolFormer or ConvFormer has no attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._adapter import Part
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost, few_stages_reason
from patchslim.hosts._timm_vit_blocks import attention_output, project_heads
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MODULE = "timm.models.metaformer"
STAGE = 2


class TimmMetaformer(StageHost):
    """timm `MetaFormer` whose third stage attends."""

    family: ClassVar[str] = "timm MetaFormer"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.MetaFormer"})
    names_served: ClassVar[tuple[str, ...]] = ("caformer",)

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, and a third stage without attention."""
        reason = overridden_reason(host, (MODULE,)) or few_stages_reason(len(host.stages))
        for block in () if reason else self.blocks(host):
            if type(block.token_mixer).__name__ != "Attention":
                return (
                    "its third stage mixes by pooling or convolution, which need the whole grid. "
                    "Take a CAFormer (caformer_*), which attends there."
                )
            reason = (
                reason
                or foreign_class_reason("block", block, ("MetaFormerBlock",))
                or foreign_class_reason("attention", block.token_mixer, ("Attention",))
            )
        return reason

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses nothing: the host has no positions."""
        return None

    def blocks(self, host: Any) -> Any:
        """Lists the blocks of the third stage."""
        return host.stages[STAGE].blocks

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Runs the stem, two stages, and what leads to the third."""
        x = host.stages[STAGE].downsample(host.stages[:STAGE](host.stem(images)))
        return x.flatten(2).transpose(1, 2), (int(x.shape[2]), int(x.shape[3]))

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Runs the last stage and the head."""
        x = host.stages[STAGE + 1 :](x.transpose(1, 2).unflatten(2, grid))
        return host.forward_head(x)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projection."""
        block: Any = self.blocks(host)[index]
        return project_heads(block.token_mixer, block.norm1(tokens.x), part)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies projection, drop path, both scales and residual."""
        block: Any = self.blocks(host)[index]
        out = attention_output(block.token_mixer, queries.x, attended)
        mixed: Tensor = block.res_scale1(queries.x) + block.layer_scale1(block.drop_path1(out))
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies feed-forward, drop path, both scales and residual."""
        block: Any = self.blocks(host)[index]
        out = block.layer_scale2(block.drop_path2(block.mlp(block.norm2(x))))
        fed: Tensor = block.res_scale2(x) + out
        return fed

    def _attention(self, block: Any) -> Any:
        return block.token_mixer

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        block: Any = self.blocks(host)[index]
        attn = block.token_mixer
        width, inner = int(attn.qkv.in_features), int(attn.attention_dim)
        return BlockShape(
            width=width,
            q=width * inner,
            k=width * inner,
            v=width * inner,
            query_width=inner,
            value_width=inner,
            key_width=int(attn.head_dim),
            out=linear_macs(attn) - 3 * width * inner,
            feed=linear_macs(block.mlp),
            score=inner,
        )

    def _image_size(self, host: Any) -> tuple[int, int]:
        said = (getattr(host, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
        return int(said[1]), int(said[2])
