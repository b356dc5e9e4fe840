"""`StageHost`: a timm host of stages, of which the blocks of one attend to all of its grid.

Methods act in that stage. What comes before it runs whole, and so does what comes after it, on the
grid that is put back: a row that was merged stands in every cell that it stands for, and a cell
that was dropped gets the nearest row. So later stages need no change, and cost what they cost.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from patchslim.hosts import _timm_vit_blocks
from patchslim.hosts._adapter import Adapter, HostFacts, Part
from patchslim.hosts._timm import TimmHost, dropout_in_force
from patchslim.tokens.shapes import BlockShape, HostShape
from patchslim.tokens.tokens import Tokens

_COUNTED: WeakKeyDictionary[nn.Module, dict[Any, tuple[int, int, tuple[int, int]]]] = (
    WeakKeyDictionary()
)


class StageHost(TimmHost, ABC):
    """Takes a host apart into what is before a stage, the blocks of it, and what is after it."""

    host_attributes: ClassVar[frozenset[str]] = frozenset(
        """num_classes num_features head_hidden_size in_chans global_pool pretrained_cfg default_cfg
        no_weight_decay group_matcher get_classifier reset_classifier set_distilled_training
        distilled_training""".split()
    )

    @abstractmethod
    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Computes the rows that enter the stage (B, N, C), prefix first, and their grid."""

    @abstractmethod
    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Computes what the host returns, from all rows that leave the stage, in raster order."""

    def describe(self, host: Any) -> HostFacts:
        """Reads the host's facts. What comes after the stage reads all of its rows."""
        attentions = [self._attention(block) for block in self.blocks(host)]
        drops = [getattr(each, "attn_drop", None) for each in attentions]
        prefix = self._prefix(host)
        return HostFacts(
            prefix=prefix,
            image_shape=self._image_shape(host),
            scales=tuple([float(getattr(each, "scale", 1.0)) for each in attentions]),
            dropouts=tuple([0.0 if each is None else dropout_in_force(each) for each in drops]),
            has_class_token=prefix > 0,
            rows_read=None,
            returns_rows=True,
            has_relative_bias=self._has_relative_bias(host),
            feature_blocks=(len(attentions) - 1,),
        )

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses every size but the one that the host is made for."""
        return Adapter.size_mismatch(self, host, size, options)

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Runs what comes before the stage."""
        x, grid = self.before(host, images)
        rotary = self._rotary(host, grid)
        return Tokens(x=x, prefix=self._prefix(host), grid=grid, rotary=rotary)

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Raises an error: here, no patch embedding comes straight before the blocks."""
        return Adapter.embedding(self, host, images)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies the block's norm and projection."""
        return _timm_vit_blocks.project(self.blocks(host)[index], tokens.x, part)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies what the block does between attention and the residual sum."""
        return _timm_vit_blocks.mix(self.blocks(host)[index], queries.x, attended)

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies the feed-forward and its residual."""
        return _timm_vit_blocks.feed(self.blocks(host)[index], x)

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Returns x: no norm follows the stage directly."""
        return x

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Puts the grid back and runs what comes after the stage."""
        return self.after(host, tokens.dense_features(), tokens.grid)

    def pooled_classifiers(self, host: Any) -> list[nn.Module]:
        """Raises an error: the head does not read the rows of the stage."""
        return Adapter.pooled_classifiers(self, host)

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs; what is before and after the stage is counted without weights."""
        embed, head, grid = self._count_around(host, image_size or self._image_size(host))
        blocks = self.blocks(host)
        return HostShape(
            grid=grid,
            prefix=self._prefix(host),
            embed=embed,
            blocks=tuple(self._block_shape(host, index) for index in range(len(blocks))),
            head=head + self._bias_macs(host),
        )

    def _count_around(self, host: Any, size: tuple[int, int]) -> tuple[int, int, tuple[int, int]]:
        """Counts what is before and after the stage, and finds the grid in it.

        It is remembered while the host lives and its weights have these shapes: counting takes a
        tenth of a second or more, and a search asks often.
        """
        dtype = next(host.parameters()).dtype
        key = (*size, dtype, *(tuple(each.shape) for each in host.parameters()))
        known = _COUNTED.setdefault(host, {})
        if key not in known:
            weightless = copy_without_weights(host)
            channels = int(host.in_chans)
            images = torch.empty(1, channels, *size, device="meta", dtype=dtype)
            embed, (x, grid) = count(lambda: self.before(weightless, images))
            head, _ = count(lambda: self.after(weightless, x, grid))
            known[key] = embed, head, grid
        return known[key]

    def _attention(self, block: Any) -> Any:
        return _timm_vit_blocks.attentions(block)[0]

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        block: Any = self.blocks(host)[index]
        return _timm_vit_blocks.block_shape(block, int(self._attention(block).qkv.in_features))

    def _bias_macs(self, host: Any) -> int:
        """Counts what biases by relative position cost once for all rows."""
        return 0

    def _prefix(self, host: Any) -> int:
        """Counts the rows of the stage that are not patches."""
        return 0

    def _rotary(self, host: Any, grid: tuple[int, int]) -> Tensor | None:
        """Makes the table of rotary positions, one entry for each cell; None without."""
        return None

    def _pools_prefix(self, host: Any) -> bool:
        return False


def few_stages_reason(stages: int) -> str | None:
    """Says why a host of so few stages has no third one, in which methods act; None if it has."""
    return None if stages >= 3 else f"it has {stages} stages, and methods act in the third."


def copy_without_weights(host: nn.Module) -> Any:
    """Copies a host in evaluation mode to the meta device, and no weight of it."""
    kept = {}
    for tensor in (*host.parameters(), *host.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_weight = isinstance(tensor, nn.Parameter)
        kept[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_weight else empty
    return copy.deepcopy(host, kept).eval()


def count(run: Any) -> tuple[int, Any]:
    """Counts the multiply-adds of a call, and returns what it returns."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        returned = run()
    return int(counter.get_total_flops()) // 2, returned
