"""timm's `Hiera`: methods act in the third stage, which attends to all of its grid.

It has most of the blocks. The two stages before it attend in windows and run whole, as does the
first block of the third, which pools, and the last stage.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost, few_stages_reason

MODULE = "timm.models.hiera"
STAGE = 2


class TimmHiera(StageHost):
    """timm `Hiera`."""

    family: ClassVar[str] = "timm Hiera"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.Hiera"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks, windows in the third stage."""
        reason = overridden_reason(host, (MODULE,)) or few_stages_reason(len(host.stage_ends))
        if reason is None and host.patch_drop_rate:
            reason = (
                "it drops patches at random (patch_drop_rate). Build it with patch_drop_rate=0."
            )
        if reason is None and not len(self.blocks(host)):
            reason = "its third stage has one block, which pools, and no other in which to reduce."
        for block in () if reason else self.blocks(host):
            reason = reason or foreign_class_reason("block", block, ("HieraBlock",))
            if reason is None and (block.attn.use_mask_unit_attn or block.do_expand):
                reason = "its third stage attends in windows (mask_unit_attn)."
        return reason

    def blocks(self, host: Any) -> Any:
        """Lists the blocks of the third stage but its first, which pools."""
        return host.blocks[self._first(host) : host.stage_ends[STAGE] + 1]

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Runs the stages before the third and its first block; puts rows in raster order."""
        x = host.unroll(host._pos_embed(host.patch_embed(images, mask=None)))
        first = self._first(host)
        for block in host.blocks[:first]:
            x = block(x)
        x = host.reroll(x, first)
        grid = (int(x.shape[1]), int(x.shape[2]))
        return x.flatten(1, 2), grid

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Puts rows back in the host's own order; runs the last stage and the head."""
        from timm.models.hiera import Unroll

        schedule, _ = host.reroll.schedule[self._first(host)]
        x = Unroll(grid, (1, 1), schedule)(x)
        for block in host.blocks[host.stage_ends[STAGE] + 1 :]:
            x = block(x)
        return host.forward_head(x)

    def _first(self, host: Any) -> int:
        """Finds the second block of the third stage."""
        return int(host.stage_ends[STAGE - 1]) + 2

    def _image_size(self, host: Any) -> tuple[int, int]:
        height, width = (
            int(cells * side)
            for cells, side in zip(host.tokens_spatial_shape, host.patch_stride, strict=True)
        )
        return height, width
