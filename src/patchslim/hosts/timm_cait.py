"""timm's `Cait`: methods act in its self-attention blocks, whose heads talk to each other.

The class token enters after them, with two class-attention blocks, on the grid that is put back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._adapter import HostFacts
from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost
from patchslim.tokens.shapes import BlockShape

MODULE = "timm.models.cait"


class TimmCait(StageHost):
    """timm `Cait`."""

    family: ClassVar[str] = "timm Cait"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.Cait"})
    # All its blocks are in the stage, so what timm tells of them holds here, too.
    host_attributes: ClassVar[frozenset[str]] = StageHost.host_attributes | {
        "feature_info",
        "set_grad_checkpointing",
        "grad_checkpointing",
    }

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks and attentions."""
        methods = ("forward", "forward_features", "forward_head", "forward_cls")
        reason = overridden_reason(host, (MODULE,), methods)
        for block in () if reason else host.blocks:
            reason = (
                reason
                or foreign_class_reason("block", block, ("LayerScaleBlock",))
                or foreign_class_reason("attention", block.attn, ("TalkingHeadAttn",))
            )
        return reason

    def describe(self, host: Any) -> HostFacts:
        """Reads the host's facts; its heads are mixed."""
        facts = super().describe(host)
        return HostFacts(
            prefix=0,
            image_shape=facts.image_shape,
            scales=facts.scales,
            dropouts=facts.dropouts,
            has_class_token=False,
            rows_read=None,
            returns_rows=True,
            mixes_heads=True,
            recomputes_activations=bool(host.grad_checkpointing),
        )

    def blocks(self, host: Any) -> Any:
        """Lists the self-attention blocks."""
        return host.blocks

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embeds patches and adds positions."""
        grid = host.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        x = host.pos_drop(host.patch_embed(images) + host.pos_embed)
        return x, (int(grid[0]), int(grid[1]))

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        x: Tensor = host.patch_embed(images)
        return x

    def attend(
        self, host: Any, index: int, qkv: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        """Mixes the logits of the heads before the softmax, and their maps after it."""
        attn, (q, k, v) = host.blocks[index].attn, qkv
        logits = _mix_heads(attn.proj_l, (q * attn.scale) @ k.transpose(2, 3))
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        mixed = _mix_heads(attn.proj_w, weights)
        if bias is not None:  # what the layer adds to each key counts once for each of its patches
            mixed = mixed + attn.proj_w.bias[:, None, None] * (bias.exp() - 1)
        attended: Tensor = attn.attn_drop(mixed) @ v
        return attended

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Runs the class-attention blocks, norm and head."""
        if host.blocks_token_only is not None:
            x = host.forward_cls(x)
        return host.forward_head(host.norm(x))

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        """Counts one block: each query-key pair is also mixed over all heads, twice."""
        shape = super()._block_shape(host, index)
        mixing = int(host.blocks[index].attn.num_heads) ** 2
        return replace(
            shape,
            query_width=shape.query_width + mixing,
            value_width=shape.value_width + mixing,
        )


def _mix_heads(layer: Any, each: Tensor) -> Tensor:
    """Applies a linear layer over the heads of maps (B, heads, n, N)."""
    mixed: Tensor = layer(each.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return mixed
