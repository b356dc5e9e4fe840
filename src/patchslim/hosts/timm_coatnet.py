"""timm's CoAtNets (`MaxxVit` without windows): methods act in the third of its four stages.

It attends to all of its grid and has most of the transformer blocks. The convolutions before it,
its first block, which pools, and the last stage run whole. MaxViTs attend in windows and in grids
of far cells, and are refused.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.hosts._adapter import Part
from patchslim.hosts._columns import QKV_COLUMNS
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._maps import as_map, as_rows
from patchslim.hosts._relative import pick_bias
from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost, few_stages_reason
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MODULE = "timm.models.maxxvit"
STAGE = 2
TABLES = ("RelPosMlp", "RelPosBias", "RelPosBiasTf")


class TimmCoatnet(StageHost):
    """timm `MaxxVit` whose third stage has transformer blocks alone."""

    family: ClassVar[str] = "timm MaxxVit"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.MaxxVit"})
    names_served: ClassVar[tuple[str, ...]] = ("coatnet", "coatnext", "test_coatnet")

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses windows, convolutions between the blocks, overridden forward passes."""
        reason = overridden_reason(host, (MODULE,)) or few_stages_reason(len(host.stages))
        if reason is not None:
            return reason
        kinds = {type(block).__name__ for stage in host.stages for block in stage.blocks}
        if kinds & {"MaxxVitBlock", "ParallelMaxxVitBlock"}:
            return (
                "MaxViT attends in windows and in grids of far cells, each of which needs all of "
                "its cells. Take a CoAtNet (coatnet_*), which attends to its whole grid."
            )
        third = [type(block).__name__ for block in host.stages[STAGE].blocks]
        if set(third) != {"TransformerBlock2d"}:
            return (
                "its third stage has convolutions between its attentions, which need the grid. "
                "Take a CoAtNet that has none there, such as coatnet_nano_rw_224."
            )
        if len(third) == 1:
            return "its third stage has one block, which pools, and no other in which to reduce."
        for block in self.blocks(host):
            table = block.attn.rel_pos
            reason = foreign_class_reason("attention", block.attn, ("Attention2d",))
            if reason is None and table is not None:
                reason = foreign_class_reason("relative position", table, TABLES)
            if reason is not None:
                return reason
        cure = "this timm does not say for which images it is. Install a newer one: timm>=1.0.31."
        return None if hasattr(host, "img_size") else cure

    def blocks(self, host: Any) -> Any:
        """Lists the blocks of the third stage but its first, which pools."""
        return host.stages[STAGE].blocks[1:]

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Runs the stem, two stages, and the first block of the third."""
        x = host.stages[STAGE].blocks[0](host.stages[:STAGE](host.stem(images)))
        return x.flatten(2).transpose(1, 2), (int(x.shape[2]), int(x.shape[3]))

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Runs the last stage and the head."""
        x = host.stages[STAGE + 1 :](x.transpose(1, 2).unflatten(2, grid))
        return host.forward_head(host.norm(x))

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projection, whose columns stand head by head, or part by part."""
        block: Any = self.blocks(host)[index]
        attn, columns = block.attn, QKV_COLUMNS[part]
        y = block.norm1(as_map(tokens.x))
        heads, width = int(attn.num_heads), int(attn.dim_head)
        order = (heads, len(part), width) if attn.head_first else (len(part), heads, width)
        if part == "qkv":
            flat = attn.qkv(y)
        else:
            whole = (heads, 3, width) if attn.head_first else (3, heads, width)
            rows = torch.arange(3 * heads * width, device=y.device).view(whole)
            rows = rows[:, columns] if attn.head_first else rows[columns]
            bias = None if attn.qkv.bias is None else attn.qkv.bias[rows.flatten()]
            flat = F.conv2d(y, attn.qkv.weight[rows.flatten()], bias)
        apart = as_rows(flat, tokens.x).unflatten(2, order).unbind(3 if attn.head_first else 2)
        return tuple(each.transpose(1, 2) for each in apart)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies projection, LayerScale, drop path and residual."""
        block: Any = self.blocks(host)[index]
        joined = as_map(attended.transpose(1, 2).flatten(2))
        out = block.ls1(block.attn.proj_drop(block.attn.proj(joined)))
        mixed: Tensor = queries.x + block.drop_path1(as_rows(out, queries.x))
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies feed-forward, LayerScale, drop path and residual."""
        block: Any = self.blocks(host)[index]
        out = block.ls2(block.mlp(block.norm2(as_map(x))))
        fed: Tensor = x + block.drop_path2(as_rows(out, x))
        return fed

    def bias(self, host: Any, index: int, queries: Tokens, keys: Tokens) -> Tensor | None:
        """Picks the bias of these rows from that of all rows."""
        block: Any = self.blocks(host)[index]
        if block.attn.rel_pos is None:
            return None
        whole = block.attn.rel_pos.get_bias()
        return pick_bias(whole if whole.ndim == 4 else whole.unsqueeze(0), queries, keys)

    def _attention(self, block: Any) -> Any:
        return block.attn

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        block: Any = self.blocks(host)[index]
        attn = block.attn
        width, inner = int(attn.qkv.in_channels), int(attn.num_heads * attn.dim_head)
        return BlockShape(
            width=width,
            q=width * inner,
            k=width * inner,
            v=width * inner,
            query_width=inner,
            value_width=inner,
            key_width=int(attn.dim_head),
            out=linear_macs(attn.proj),
            feed=linear_macs(block.mlp),
            score=inner,
        )

    def _bias_macs(self, host: Any) -> int:
        """Counts what makes each bias: a small network, or lookups by matrix products."""
        return sum(map(_table_macs, (block.attn.rel_pos for block in self.blocks(host))))

    def _has_relative_bias(self, host: Any) -> bool:
        return any(block.attn.rel_pos is not None for block in self.blocks(host))

    def _image_size(self, host: Any) -> tuple[int, int]:
        return int(host.img_size[0]), int(host.img_size[1])


def _table_macs(table: Any) -> int:
    """Counts what one bias by relative position costs."""
    if table is None:
        return 0
    if hasattr(table, "mlp"):
        return linear_macs(table.mlp) * int(table.rel_coords_log[..., 0].numel())
    if hasattr(table, "height_lookup"):
        heads, tall, wide = table.bias_shape
        height, width = table.window_size
        return int(heads * height * height * wide * (tall + width * width))
    return 0
