"""timm's `Levit`, and `EvoLevit` on its parts: a pyramid of three grids, as one row of blocks.

A stage's downsampling is a block of its own, whose queries are every second row and column of the
grid. LeViT's positions are a bias of attention; Evo-LeViT has a class token and added positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.hosts._adapter import Adapter, HostFacts, Part
from patchslim.hosts._macs import convolution_macs, linear_macs
from patchslim.hosts._maps import as_map, as_rows
from patchslim.hosts._timm import TimmHost, foreign_class_reason
from patchslim.tokens.rows import take, with_prefix
from patchslim.tokens.shapes import BlockShape, HostShape
from patchslim.tokens.tokens import Tokens

KNOWN_MODULES = ("timm.models.levit", "patchslim.architectures.evo_levit")


class TimmLevit(TimmHost):
    """timm `Levit` and `LevitDistilled`, and our `EvoLevit`."""

    family: ClassVar[str] = "timm Levit"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{KNOWN_MODULES[0]}.Levit"})
    host_attributes: ClassVar[frozenset[str]] = frozenset(
        """num_classes num_features head_hidden_size embed_dim in_chans global_pool feature_info
        pretrained_cfg default_cfg no_weight_decay group_matcher get_classifier reset_classifier
        set_grad_checkpointing grad_checkpointing set_distilled_training
        distilled_training""".split()
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes and blocks, pooled queries, fused norms."""
        for name in ("forward", "forward_features", "forward_head"):
            if getattr(type(host), name).__module__ not in KNOWN_MODULES:
                return f"{type(host).__name__} overrides {name}, and only timm's own is known."
        if host.global_pool != "avg":
            return "its head does not pool. Build it with global_pool='avg'."
        for block in _all_blocks(host):
            names = ("LevitBlock", "LevitDownsample", "EvoDownsample")
            reason = _foreign_class_reason("block", block, names)
            if reason is None and _is_downsampling(block) and _pools_queries(block):
                reason = "its queries are pooled (use_pool=True), not every second row and column."
            if reason is not None:
                return reason
            if not hasattr(_attention(block).proj.ln, "bn"):
                return "its batch norms are fused into its layers. Slim it first, and fuse then."
        return None

    def describe(self, host: Any) -> HostFacts:
        """Reads the host's facts. Evo-LeViT has a class token, LeViT none; both average patches."""
        blocks = _all_blocks(host)
        starts = [index for index, block in enumerate(blocks) if _is_downsampling(block)]
        return HostFacts(
            prefix=int(_has_class_token(host)),
            image_shape=_image_shape(host),
            scales=tuple([float(_attention(block).scale) for block in blocks]),
            dropouts=(0.0,) * len(blocks),
            has_class_token=_has_class_token(host),
            rows_read=None,
            has_relative_bias=True,
            strides=tuple([_stride(block) for block in blocks]),
            feature_blocks=(*(start - 1 for start in starts), len(blocks) - 1),
        )

    def pooled_classifiers(self, host: Any) -> list[nn.Module]:
        """Lists the two heads of Evo-LeViT; the second one learns from the teacher."""
        if not _has_class_token(host) or host.num_classes == 0:
            return Adapter.pooled_classifiers(self, host)
        return [host.head, host.head_dist]

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses every size but the one that its positions are made for."""
        _, height, width = _image_shape(host)
        if size == (height, width):
            return None
        return f"this host takes {height}x{width} pixels. Resize them, or build it with img_size=."

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Applies the convolutional stem; adds class token and positions if there are any."""
        placed = _has_class_token(host)
        x = host.embed(images) if placed else self.embedding(host, images)
        grid = _attention(_all_blocks(host)[0]).resolution
        return Tokens(x=x, prefix=int(_has_class_token(host)), grid=(int(grid[0]), int(grid[1])))

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Applies the convolutional stem."""
        x: Tensor = host.stem(images)
        return x.flatten(2).transpose(1, 2)

    def blocks(self, host: Any) -> nn.ModuleList:
        """Lists the blocks of all stages, each downsampling before those of its stage."""
        return nn.ModuleList(_all_blocks(host))

    def bias(self, host: Any, index: int, queries: Tokens, keys: Tokens) -> Tensor | None:
        """Looks up LeViT's learned bias for each distance; Evo-LeViT has none."""
        attn = _attention(_all_blocks(host)[index])
        if not hasattr(attn, "attention_biases"):
            return None
        if queries.position is None and keys.position is None:
            whole: Tensor = attn.get_attention_biases(keys.x.device)
            return whole.unsqueeze(0)
        apart = attn.attention_bias_idxs[queries.cells().unsqueeze(2), keys.cells().unsqueeze(1)]
        by_head: Tensor = attn.attention_biases[:, apart]
        return by_head.transpose(0, 1)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies the block's own projection, which contains the norm."""
        block = _all_blocks(host)[index]
        attn = _attention(block)
        widths = {"q": attn.key_dim, "k": attn.key_dim, "v": attn.val_dim}
        if not _is_downsampling(block):
            return _project_heads(attn.qkv, tokens.x, attn.num_heads, widths, part)
        x = tokens.x
        if hasattr(block, "pos_embed"):
            x = x + _select_positions(block.pos_embed, tokens, attn.stride, attn.resolution)
        if part == "q":
            return _project_heads(attn.q.ln, x, attn.num_heads, {"q": attn.key_dim}, part)
        del widths["q"]
        return _project_heads(attn.kv, x, attn.num_heads, widths, part)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies activation, projection and residual; a downsampling has no residual there."""
        block = _all_blocks(host)[index]
        out = _run(host, _attention(block).proj, attended.transpose(1, 2).flatten(2))
        if _is_downsampling(block):
            return out
        mixed: Tensor = queries.x + block.drop_path1(out)
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies the feed-forward and its residual."""
        block = _all_blocks(host)[index]
        drop = block.drop_path if _is_downsampling(block) else block.drop_path2
        fed: Tensor = x + drop(_run(host, block.mlp, x))
        return fed

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Returns x: the only norm is in the head."""
        return x

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Applies the host's own heads; in the mean, a row counts for all patches it stands for."""
        x = tokens.x
        if tokens.size is not None or tokens.alive is not None:
            weight = tokens.sizes() if tokens.alive is None else tokens.sizes() * tokens.alive
            share = weight / weight.sum(dim=1, keepdim=True)
            mean = (x[:, tokens.prefix :] * share.to(x.dtype).unsqueeze(2)).sum(dim=1, keepdim=True)
            x = torch.cat([x[:, : tokens.prefix], mean], dim=1)
        return host.forward_head(x.transpose(1, 2).unsqueeze(3) if _keeps_maps(host) else x)

    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """Calls `timm.create_model`, which knows Evo-LeViT once it is imported."""
        import patchslim.architectures.evo_levit  # noqa: F401 (registers its names)

        return super().rebuild(recipe)

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs, read off the host's own modules."""
        size = _image_shape(host)
        parts = _all_blocks(host)
        grid = _attention(parts[0]).resolution
        return HostShape(
            grid=(int(grid[0]), int(grid[1])),
            prefix=int(_has_class_token(host)),
            embed=convolution_macs(host.stem, size),
            blocks=tuple(self._block_shape(host, index) for index in range(len(parts))),
            head=sum(map(linear_macs, self._classifiers(host))),
            strided=_grids_after_stride(parts),
        )

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        """Counts the multiply-adds of one block from its layers."""
        block = _all_blocks(host)[index]
        attn = _attention(block)
        keys, values = attn.num_heads * attn.key_dim, attn.num_heads * attn.val_dim
        width = int((attn.kv if _is_downsampling(block) else attn.qkv).linear.weight.shape[1])
        return BlockShape(
            width=width,
            q=width * keys,
            k=width * keys,
            v=width * values,
            query_width=keys,
            value_width=values,
            key_width=attn.key_dim,
            out=linear_macs(attn.proj),
            feed=linear_macs(block.mlp),
            score=keys,
        )

    def _attention(self, block: Any) -> Any:
        return _attention(block)

    def _pools_prefix(self, host: Any) -> bool:
        return False


def _all_blocks(host: Any) -> list[Any]:
    """Lists the blocks of all stages, each downsampling before those of its stage."""
    parts: list[Any] = []
    for stage in host.stages:
        if not isinstance(stage.downsample, nn.Identity):
            parts.append(stage.downsample)
        parts.extend(stage.blocks)
    return parts


def _has_class_token(host: Any) -> bool:
    """Tells whether it is Evo-LeViT."""
    return hasattr(host, "cls_token")


def _keeps_maps(host: Any) -> bool:
    """Tells whether the host keeps its tokens in maps (`levit_conv_*`)."""
    return bool(getattr(host, "use_conv", False))


def _run(host: Any, layer: Any, x: Tensor) -> Tensor:
    """Applies a layer that reads row by row, as rows or as a map, as the host does."""
    y: Tensor = as_rows(layer(as_map(x)), x) if _keeps_maps(host) else layer(x)
    return y


def _pools_queries(block: Any) -> bool:
    """Tells whether a downsampling pools its queries, and does not take every second one."""
    down = block.attn_downsample.q.down
    return down.kernel_size != 1 if isinstance(down, nn.AvgPool2d) else down.pool is not None


def _image_shape(host: Any) -> tuple[int, int, int]:
    """Reads channels, height and width, which its positions fix."""
    down = int(host.feature_info[0]["reduction"])
    height, width = _attention(_all_blocks(host)[0]).resolution
    return int(host.in_chans), int(height) * down, int(width) * down


def _stride(block: Any) -> int:
    """Lists each block's stride: 2 where a stage begins with a smaller grid, else 1."""
    return int(block.attn_downsample.stride) if _is_downsampling(block) else 1


def _grids_after_stride(blocks: list[Any]) -> dict[int, tuple[int, int]]:
    """Maps the block that makes each later stage's grid to that grid."""
    grids = {}
    for index, block in enumerate(blocks):
        if _is_downsampling(block):
            down = block.attn_downsample
            height, width = (-(-side // down.stride) for side in down.resolution)
            grids[index] = (height, width)
    return grids


def _is_downsampling(block: Any) -> bool:
    """Tells whether a block is a downsampling."""
    return hasattr(block, "attn_downsample")


def _attention(block: Any) -> Any:
    """Finds the attention of a block."""
    return block.attn_downsample if _is_downsampling(block) else block.attn


def _project_heads(
    layer: Any, x: Tensor, heads: int, widths: Mapping[str, int], part: Part
) -> tuple[Tensor, ...]:
    """Splits a projection into heads, and each head into parts of these widths."""
    names = list(widths)
    before = sum(widths[name] for name in names[: names.index(part[0])])
    wanted = sum(widths[name] for name in part)
    per = sum(widths.values())
    if layer.training or wanted == per:  # in training the norm counts all rows of all columns
        y = as_rows(layer(as_map(x)), x) if isinstance(layer.linear, nn.Conv2d) else layer(x)
        y = y.unflatten(2, (heads, per))[..., before : before + wanted]
    else:
        columns = torch.arange(heads * per, device=x.device).view(heads, per)
        chosen = columns[:, before : before + wanted].flatten()
        y = _project_columns(layer, x, chosen).unflatten(2, (heads, wanted))
    split = y.split([widths[name] for name in part], dim=3)
    return tuple(each.transpose(1, 2) for each in split)


def _project_columns(layer: Any, x: Tensor, columns: Tensor) -> Tensor:
    """Computes some columns of a linear layer and its batch norm, in evaluation."""
    norm, y = layer.bn, F.linear(x, layer.linear.weight[columns].flatten(1))
    mean, var = norm.running_mean[columns], norm.running_var[columns]
    weight, bias = norm.weight[columns], norm.bias[columns]
    flat = F.batch_norm(y.flatten(0, 1), mean, var, weight, bias, eps=norm.eps)
    return flat.view_as(y)


def _select_positions(
    positions: Tensor, tokens: Tokens, stride: int, resolution: tuple[int, int]
) -> Tensor:
    """Picks the positions of all rows, or of every `stride`-th row and column of the grid."""
    height, width = resolution
    if tokens.grid == (height, width) and tokens.position is None:
        return positions
    cells = tokens.cells()
    if tokens.grid != (height, width):
        cells = cells // tokens.grid[1] * stride * width + cells % tokens.grid[1] * stride
    return take(positions.expand(cells.shape[0], -1, -1), with_prefix(cells, tokens.prefix))


def _foreign_class_reason(part: str, module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Says why a module is neither timm's own nor ours."""
    if type(module).__module__ == KNOWN_MODULES[1] and type(module).__name__ in names:
        return None
    return foreign_class_reason(part, module, names)
