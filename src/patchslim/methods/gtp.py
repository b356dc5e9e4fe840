"""`gtp`: drops the patches that matter least to others, and hands what they hold to neighbours.

Xu et al., "GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation" (WACV 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.errors import BadSetting
from patchslim.methods import Method, Placement, Signals
from patchslim.settings import Range, check_value
from patchslim.tokens.reduction import Keep
from patchslim.tokens.rows import mark_diagonal, take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Propagate(Keep):
    """Keeps rows, and adds to each a `share` (B, m, r) of every row of `gone` (B, r)."""

    kind: ClassVar[str] = "hybrid"
    gone: Tensor
    share: Tensor

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Takes the kept rows, and adds the shares; plain numbers of a row do not spread."""
        out = super().move(t, prefix=prefix)
        if t.ndim == 2:
            return out
        spread = self.share.to(t.dtype) @ take(t, self.gone, prefix).flatten(2)
        kept = out[:, prefix:] + spread.view_as(out[:, prefix:])
        return torch.cat([out[:, :prefix], kept], dim=1) if prefix else kept


class GTP(Method):
    """Keeps patches that attend to themselves and are attended to; the others go to neighbours.

    Neighbours of a patch are the eight around it, and as many more as `neighbours` says, which were
    most similar to it when they entered the first block. `alpha` is how much of a patch that goes
    is added to those that stay.
    """

    placement: ClassVar[Placement] = Placement.EVERY_BLOCK

    def __init__(self, *, alpha: float = 0.1, neighbours: int = 0) -> None:
        super().__init__()
        self.alpha: float = check_value("alpha", alpha, float, Range(0, 1))
        self.neighbours: int = check_value("neighbours", neighbours, int, Range(0, 2**16))
        self.reads = ("q", "k", "entering") if neighbours else ("q", "k")

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Propagate:
        """Keeps the `keep` best patches, and spreads the others along the edges of the graph."""
        attention = signals.attention()[:, :, :, signals.prefix :]
        own = attention[:, :, signals.prefix :]  # not `diagonal`, which OpenVINO does not have
        itself = (own * mark_diagonal(own)).sum(dim=3).amax(dim=1)
        broadcast = attention.sum(dim=2).amax(dim=1)
        order = (itself * broadcast).topk(tokens.patches, dim=1).indices
        kept, gone = order[:, :keep], order[:, keep:]
        cells = tokens.cells()
        edges = take(self._graph(tokens), cells.gather(1, kept)).transpose(1, 2)
        edges = take(edges, cells.gather(1, gone)).transpose(1, 2)
        return Propagate(kept, gone=gone, share=edges * self.alpha)

    def _graph(self, tokens: Tokens) -> Tensor:
        """Makes the graph of all cells of the grid, normalised by their degrees (B, HW, HW)."""
        batch, (height, width) = tokens.x.shape[0], tokens.grid
        cells = torch.arange(height * width, device=tokens.x.device)
        down, right = cells // width, cells % width
        near = (down - down.unsqueeze(1)).abs() <= 1
        near = near & ((right - right.unsqueeze(1)).abs() <= 1)
        near = near.expand(batch, -1, -1)
        if self.neighbours:
            near = near | self._alike(tokens)
        edges = (near & (cells != cells.unsqueeze(1))).to(tokens.sizes().dtype)
        scale = edges.sum(dim=2).clamp(min=1) ** -0.5
        return edges * scale.unsqueeze(1) * scale.unsqueeze(2)

    def _alike(self, tokens: Tokens) -> Tensor:
        """Tells which cells are among the most similar ones to each, itself included."""
        shown = None if tokens.content is None else tokens.content()
        if shown is None or shown.shape[1] != tokens.grid[0] * tokens.grid[1]:
            raise BadSetting(
                "gtp compares patches as they enter the first block, and these tokens lack that. "
                "Use neighbours=0."
            )
        x = F.normalize(shown.to(tokens.sizes().dtype), dim=2)
        similarity = x @ x.transpose(1, 2)
        most = min(self.neighbours + 1, shown.shape[1])
        return similarity >= similarity.topk(most, dim=2).values.amin(dim=2, keepdim=True)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the attention map, a second time, the similarities, and what is handed on."""
        spread = (block.left - prefix) * (rows - block.left) * block.width
        alike = block.cells * block.cells * block.width if self.neighbours else 0
        return rows * rows * block.query_width + alike + spread
