"""timm's `Nest` (NesT): methods act in the last level, whose blocks attend to all of its grid.

The levels before it attend in blocks of their grids, and run whole.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost
from patchslim.tokens.tokens import Tokens

MODULE = "timm.models.nest"


class TimmNest(StageHost):
    """timm `Nest`."""

    family: ClassVar[str] = "timm Nest"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.Nest"})

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks, a last level in several blocks."""
        reason = overridden_reason(host, (MODULE,))
        last = host.levels[-1]
        if reason is None and last.pos_embed.shape[1] > 1:
            reason = "its last level attends in blocks, and not to all of its grid."
        for block in () if reason else last.transformer_encoder:
            reason = reason or foreign_class_reason("block", block, ("TransformerLayer",))
        return reason

    def blocks(self, host: Any) -> Any:
        """Lists the blocks of the last level."""
        return host.levels[-1].transformer_encoder

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Runs the levels before the last, its pooling, and adds its positions."""
        last = host.levels[-1]
        x = last.pool(host.levels[:-1](host.patch_embed(images)))
        grid = (int(x.shape[2]), int(x.shape[3]))
        return x.flatten(2).transpose(1, 2) + last.pos_embed[:, 0], grid

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Joins heads as this host does, channel by channel, before the projection."""
        joined = attended.permute(0, 2, 3, 1).flatten(2)
        return super().mix(host, index, queries, joined.unsqueeze(1))

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Applies norm, pooling and classifier."""
        return host.forward_head(host.norm(x).transpose(1, 2).unflatten(2, grid))
