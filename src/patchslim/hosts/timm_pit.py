"""timm's `PoolingVisionTransformer` (PiT): methods act in the middle one of its stages.

It has half of the blocks. The stage before it runs whole, and so does the one after it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost

MODULE = "timm.models.pit"


class TimmPit(StageHost):
    """timm `PoolingVisionTransformer`, distilled or not."""

    family: ClassVar[str] = "timm PoolingVisionTransformer"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.PoolingVisionTransformer"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks, other numbers of stages."""
        reason = overridden_reason(host, (MODULE,))
        if reason is None and len(host.transformers) != 3:
            reason = f"it has {len(host.transformers)} stages, and methods act in the second of 3."
        for block in () if reason else self.blocks(host):
            reason = (
                reason
                or foreign_class_reason("block", block, ("Block",))
                or foreign_class_reason("attention", block.attn, ("Attention",))
            )
        return reason

    def blocks(self, host: Any) -> Any:
        """Lists the blocks of the second stage."""
        return host.transformers[1].blocks

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Runs the first stage, and the pooling of the second."""
        x = host.pos_drop(host.patch_embed(images) + host.pos_embed)
        second = host.transformers[1]
        x, leading = host.transformers[0]((x, host.cls_token.expand(x.shape[0], -1, -1)))
        x, leading = second.pool(x, leading)
        grid = (int(x.shape[2]), int(x.shape[3]))
        rows: Tensor = second.norm(torch.cat((leading, x.flatten(2).transpose(1, 2)), dim=1))
        return rows, grid

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Runs the last stage, norm and classifiers."""
        leading, patches = x.split([host.num_tokens, x.shape[1] - host.num_tokens], dim=1)
        x = patches.transpose(1, 2).unflatten(2, grid)
        _, leading = host.transformers[2]((x, leading))
        return host.forward_head(host.norm(leading))

    def _prefix(self, host: Any) -> int:
        return int(host.num_tokens)
