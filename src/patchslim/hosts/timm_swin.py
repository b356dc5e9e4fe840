"""timm's `SwinTransformer` and `SwinTransformerV2` whose third stage has one window: all its grid.

So it is where the window is as large as the grid (`swin_s3_*`, `swinv2_*_window16_256`): methods
act in that stage, which has most of the blocks. The stages before it and after run whole. Others
attend in several windows, each of which needs all of its cells, and are refused.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.hosts import _timm_vit_blocks
from patchslim.hosts._adapter import Part
from patchslim.hosts._columns import QKV_COLUMNS
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._relative import pick_bias
from patchslim.hosts._timm import foreign_class_reason, overridden_reason
from patchslim.hosts._timm_stage import StageHost, few_stages_reason
from patchslim.tokens.tokens import Tokens

MODULES = ("timm.models.swin_transformer", "timm.models.swin_transformer_v2")
STAGE = 2
SHARPEST = 4.605170185988092  # the logarithm of 100, at which Swin V2 stops its scales
SPAN = 16.0  # of the biases of Swin V2


class TimmSwin(StageHost):
    """timm `SwinTransformer` and `SwinTransformerV2`, if one window is the grid of stage 3."""

    family: ClassVar[str] = "timm SwinTransformer"
    host_classes: ClassVar[frozenset[str]] = frozenset(
        {f"{MODULES[0]}.SwinTransformer", f"{MODULES[1]}.SwinTransformerV2"}
    )
    names_served: ClassVar[tuple[str, ...]] = (
        "swin_s3",
        "swinv2_base_window12",
        "swinv2_base_window16",
        "swinv2_large_window12",
        "swinv2_small_window16",
        "swinv2_tiny_window16",
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses several windows, overridden forward passes, foreign blocks."""
        reason = overridden_reason(host, MODULES) or few_stages_reason(len(host.layers))
        for block in () if reason else self.blocks(host):
            names = ("SwinTransformerBlock", "SwinTransformerV2Block")
            reason = reason or foreign_class_reason("block", block, names)
            if reason is None and tuple(block.window_size) != tuple(block.input_resolution):
                return (
                    "Swin attends in windows, each of which needs all of its cells. Take one whose "
                    "third stage is one window (swin_s3_*, swinv2_*_window16_256), or a ViT, "
                    "CoAtNet, CAFormer, NesT or Hiera."
                )
            if reason is None and (any(block.shift_size) or getattr(block, "dynamic_mask", False)):
                return "its windows are shifted, or masked as images come (dynamic_mask)."
        return reason

    def blocks(self, host: Any) -> Any:
        """Lists the blocks of the third stage."""
        return host.layers[STAGE].blocks

    def before(self, host: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Runs two stages, and what leads to the third."""
        x = host.layers[STAGE].downsample(host.layers[:STAGE](host.patch_embed(images)))
        return x.flatten(1, 2), (int(x.shape[1]), int(x.shape[2]))

    def after(self, host: Any, x: Tensor, grid: tuple[int, int]) -> Any:
        """Runs the last stage, norm and head."""
        x = host.layers[STAGE + 1 :](x.unflatten(1, grid))
        return host.forward_head(host.norm(x))

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm and projection; in V2, the cosine with the scale of each head."""
        block: Any = self.blocks(host)[index]
        attn = block.attn
        if not _is_v2(block):
            return _timm_vit_blocks.project(block, tokens.x, part)
        third, columns = int(attn.qkv.out_features) // 3, QKV_COLUMNS[part]
        rows = slice(columns.start * third, columns.stop * third)
        bias = None
        if attn.q_bias is not None:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))[rows]
        flat = F.linear(tokens.x, attn.qkv.weight[rows], bias).chunk(len(part), dim=2)
        every = dict(zip(part, (_split(attn, each) for each in flat), strict=True))
        for name in "qk":
            if name in every:
                every[name] = F.normalize(every[name], dim=-1)
        if "q" in every:
            every["q"] = every["q"] * attn.logit_scale.clamp(max=SHARPEST).exp()
        return tuple(every[name] for name in part)

    def bias(self, host: Any, index: int, queries: Tokens, keys: Tokens) -> Tensor | None:
        """Picks the bias of these rows from that of all rows."""
        block: Any = self.blocks(host)[index]
        attn = block.attn
        if not _is_v2(block):
            return pick_bias(attn._get_rel_pos_bias(), queries, keys)
        table = attn.cpb_mlp(attn.relative_coords_table).view(-1, attn.num_heads)
        cells = len(attn.relative_position_index)
        whole = table[attn.relative_position_index.view(-1)].view(cells, cells, -1)
        whole = SPAN * whole.permute(2, 0, 1).sigmoid()
        return pick_bias(whole.unsqueeze(0), queries, keys)

    def _bias_macs(self, host: Any) -> int:
        return sum(
            linear_macs(block.attn.cpb_mlp) * int(block.attn.relative_coords_table[..., 0].numel())
            for block in self.blocks(host)
            if _is_v2(block)
        )

    def _has_relative_bias(self, host: Any) -> bool:
        return True

    def _image_size(self, host: Any) -> tuple[int, int]:
        height, width = host.patch_embed.img_size
        return int(height), int(width)


def _is_v2(block: Any) -> bool:
    """Tells whether a block compares by cosine and norms after its parts."""
    return type(block).__name__ == "SwinTransformerV2Block"


def _split(attn: Any, t: Tensor) -> Tensor:
    """Splits rows into heads (B, heads, N, d)."""
    return t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
