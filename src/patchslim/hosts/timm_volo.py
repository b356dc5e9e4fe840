"""timm's `VOLO`: methods act in its transformer blocks, which attend to all of the grid.

The outlookers before them read windows of a finer grid and run whole. The class token enters after
the transformer blocks, with two class-attention blocks, on the grid that is put back.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost

MODULE = "timm.models.volo"
FIRST = 2  # of the modules of `network`: an outlooker stage and a downsampling are before it


class TimmVolo(StageHost):
    """timm `VOLO`."""

    family: ClassVar[str] = "timm VOLO"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.VOLO"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, and outlookers or downsamplings further on."""
        methods = ("forward", "forward_features", "forward_head", "forward_tokens", "forward_cls")
        reason = overridden_reason(host, (MODULE,), methods)
        for stage in () if reason else host.network[FIRST:]:
            for block in stage.children():
                reason = reason or foreign_class_reason("block", block, ("Transformer",))
        return reason

    def blocks(self, host: Any) -> Any:
        """Lists the transformer blocks of all stages after the outlookers."""
        return nn.ModuleList([block for stage in host.network[FIRST:] for block in stage])

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Runs stem, outlookers and downsampling, and adds positions."""
        x = host.patch_embed(images).permute(0, 2, 3, 1)
        for part in host.network[:FIRST]:
            x = part(x)
        x = host.pos_drop(x + host.pos_embed)
        return x.flatten(1, 2), (int(x.shape[1]), int(x.shape[2]))

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Runs the class-attention blocks, norm and both heads."""
        if host.post_network is not None:
            x = host.forward_cls(x)
        return host.forward_head(host.norm(x))

    def _image_size(self, host: Any) -> tuple[int, int]:
        step = int(host.patch_embed.proj.stride[0]) * 2 * int(host.pooling_scale)
        height, width = (int(side) * step for side in host.pos_embed.shape[1:3])
        return height, width
