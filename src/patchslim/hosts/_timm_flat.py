"""`FlatHost`: a timm host whose blocks are those of its `VisionTransformer`, `Eva`, or alike."""

from __future__ import annotations

from abc import ABC
from typing import Any

from torch import Tensor

from patchslim.hosts import _timm_eva_blocks, _timm_vit_blocks
from patchslim.hosts._adapter import Part
from patchslim.hosts._timm import TimmHost
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class FlatHost(TimmHost, ABC):
    """Takes each block apart as its kind asks for."""

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projection of the block, and rotation where it has rotary positions."""
        block: Any = self.blocks(host)[index]
        if _is_eva(block):
            return _timm_eva_blocks.project(block, tokens, part, self._table(host, index, tokens))
        return _timm_vit_blocks.project(block, tokens.x, part)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies what the block does between attention and the residual sum."""
        block: Any = self.blocks(host)[index]
        blocks = _timm_eva_blocks if _is_eva(block) else _timm_vit_blocks
        return blocks.mix(block, queries.x, attended)

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies the feed-forward and its residual, as this kind of block does it."""
        block: Any = self.blocks(host)[index]
        blocks = _timm_eva_blocks if _is_eva(block) else _timm_vit_blocks
        return blocks.feed(block, x)

    def _attention(self, block: Any) -> Any:
        return block.attn if _is_eva(block) else _timm_vit_blocks.attentions(block)[0]

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        """Counts the multiply-adds of one block from its layers."""
        block: Any = self.blocks(host)[index]
        blocks = _timm_eva_blocks if _is_eva(block) else _timm_vit_blocks
        return blocks.block_shape(block, int(host.embed_dim), **self._score_macs(host))

    def _table(self, host: Any, index: int, tokens: Tokens) -> Tensor | None:
        """Finds the table of rotary positions for a block; None without."""
        return tokens.rotary


def _is_eva(block: Any) -> bool:
    """Tells whether a block is built as those of `Eva` are."""
    return type(block).__module__ in ("timm.models.eva", "timm.models.beit")
