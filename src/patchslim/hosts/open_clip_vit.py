"""open_clip's own `VisionTransformer`: the image tower of its CLIP models.

By itself, or as `model.visual` of a model: `model.visual = patchslim.slim(model.visual, ...)`, and
`model.encode_image` runs the slimmed tower. A tower that is a timm model is slimmed as such:
`model.visual.trunk`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.errors import BadFile
from patchslim.hosts._adapter import Adapter, HostFacts, Part
from patchslim.hosts._building import check_arguments
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._pooling import mean_of_patches
from patchslim.tokens.shapes import BlockShape, HostShape
from patchslim.tokens.tokens import Tokens

MODULE = "open_clip.transformer"
PLACES = {"q": 0, "k": 1, "v": 2}  # among the three in the rows of `in_proj_weight`
NORMS = ("LayerNorm", "LayerNormFp32")
ACTIVATIONS = ("GELU", "QuickGELU")
PRESERVED = ("preprocess_cfg", "image_mean", "image_std")
# The attention in each of open_clip's blocks.
ATTENTIONS = {
    "ResidualAttentionBlock": "MultiheadAttention",
    "CustomResidualAttentionBlock": "Attention",
}
PLAIN_ARGUMENTS = frozenset(
    """image_size patch_size width layers heads mlp_ratio ls_init_value output_dim no_ln_pre
    pool_type final_ln_after_pool output_tokens block_type qk_norm scale_heads scale_attn_inner
    scale_attn scale_fc""".split()
)


class OpenClipVit(Adapter):
    """open_clip `VisionTransformer`."""

    family: ClassVar[str] = "open_clip VisionTransformer"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.VisionTransformer"})
    host_attributes: ClassVar[frozenset[str]] = frozenset(
        """image_size patch_size grid_size output_dim output_tokens pool_type final_ln_after_pool
        set_grad_checkpointing no_weight_decay lock preprocess_cfg image_mean image_std""".split()
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks, attention pooling, patch dropout."""
        for name in ("forward", "_embeds", "_pool", "_global_pool"):
            if getattr(type(host), name).__module__ != MODULE:
                return f"{type(host).__name__} overrides {name}, and only open_clip's is known."
        if host.attn_pool is not None:
            return "its head pools with queries of its own (CoCa's attentional_pool)."
        if not isinstance(host.patch_dropout, nn.Identity):
            return (
                "it drops patches at random in training (patch_dropout). Set "
                "model.patch_dropout = torch.nn.Identity()."
            )
        reasons = (_foreign_block_reason(block) for block in self.blocks(host))
        return next((reason for reason in reasons if reason is not None), None)

    def describe(self, host: Any) -> HostFacts:
        """Reads the host's facts. Its positions fix the image size."""
        attentions = [block.attn for block in host.transformer.resblocks]
        return HostFacts(
            prefix=1,
            image_shape=(host.conv1.in_channels, int(host.image_size[0]), int(host.image_size[1])),
            scales=tuple([float(each.head_dim) ** -0.5 for each in attentions]),
            dropouts=(0.0,) * len(attentions),  # open_clip builds none with a dropout
            has_class_token=True,
            rows_read=None if _returns_rows(host) or host.pool_type != "tok" else 1,
            returns_rows=_returns_rows(host),
            recomputes_activations=bool(host.transformer.grad_checkpointing),
        )

    def blocks(self, host: Any) -> nn.ModuleList:
        """Lists the blocks."""
        blocks: nn.ModuleList = host.transformer.resblocks
        return blocks

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embedding, with its norm before the first block."""
        grid = (int(host.grid_size[0]), int(host.grid_size[1]))
        return Tokens(x=host._embeds(images), prefix=1, grid=grid)

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        patches: Tensor = host.conv1(images).flatten(2).transpose(1, 2)
        return patches

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies norm, the rows of the attention's weight that `part` names, and QK-norm."""
        block: Any = self.blocks(host)[index]
        attn, y = block.attn, block.ln_1(tokens.x)
        width, bias = attn.in_proj_weight.shape[1], attn.in_proj_bias
        rows = slice(PLACES[part[0]] * width, (PLACES[part[-1]] + 1) * width)
        projected = F.linear(y, attn.in_proj_weight[rows], None if bias is None else bias[rows])
        heads = (len(part), int(attn.num_heads), int(attn.head_dim))
        every = projected.unflatten(2, heads).permute(2, 0, 3, 1, 4).unbind(0)
        norms = {"q": getattr(attn, "ln_q", None), "k": getattr(attn, "ln_k", None)}
        named = [(norms.get(name), each) for name, each in zip(part, every, strict=True)]
        return tuple([each if norm is None else norm(each) for norm, each in named])

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies what the block does between attention and the residual sum."""
        block: Any = self.blocks(host)[index]
        attn = block.attn
        if isinstance(attn, nn.MultiheadAttention):  # which does not call its own out_proj
            joined = attended.transpose(1, 2).flatten(2)
            out = F.linear(joined, attn.out_proj.weight, attn.out_proj.bias)
        else:
            if attn.head_scale is not None:
                attended = attended * attn.head_scale
            joined = attn.ln_inner(attended.transpose(1, 2).flatten(2))
            out = block.ln_attn(attn.out_drop(attn.out_proj(joined)))
        mixed: Tensor = queries.x + block.ls_1(out)
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies norm, feed-forward, LayerScale and residual."""
        block: Any = self.blocks(host)[index]
        fed: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
        return fed

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm, unless the host applies it to what is pooled alone."""
        normed: Tensor = x if host.final_ln_after_pool else host.ln_post(x)
        return normed

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Pools and projects as the host does; in a mean, merged rows weigh as many patches."""
        rows = tokens.dense_features() if _returns_rows(host) else tokens.x
        x = self.norm(host, rows)
        pooled, patches = host._global_pool(x)
        if host.pool_type == "avg":
            pooled = mean_of_patches(tokens, x if rows is tokens.x else self.norm(host, tokens.x))
        if host.final_ln_after_pool:
            pooled = host.ln_post(pooled)
        if host.proj is not None:
            pooled = pooled @ host.proj
        return (pooled, patches) if host.output_tokens else pooled

    def logits(self, output: Any) -> Tensor:
        """Picks the image's embedding."""
        tensor: Tensor = output[0] if isinstance(output, tuple) else output
        return tensor

    def recipe(self, host: Any) -> dict[str, Any] | None:
        """Notes the arguments of the class, read off the layers, and how images are prepared."""
        block: Any = self.blocks(host)[0]
        attn, mlp = block.attn, block.mlp
        norm, activation = type(host.ln_post).__name__, type(mlp.gelu).__name__
        known = norm in NORMS and activation in ACTIVATIONS
        if not known or host.proj is None or not hasattr(mlp.c_fc, "out_features"):
            return None
        width = int(host.conv1.out_channels)
        special = type(block).__name__ == "CustomResidualAttentionBlock"
        has = {
            "qk_norm": special and not isinstance(attn.ln_q, nn.Identity),
            "scale_heads": special and attn.head_scale is not None,
            "scale_attn_inner": special and not isinstance(attn.ln_inner, nn.Identity),
            "scale_attn": special and not isinstance(block.ln_attn, nn.Identity),
            "scale_fc": special and not isinstance(mlp.ln, nn.Identity),
        }
        scaled = not isinstance(block.ls_1, nn.Identity)
        return {
            "image_size": [int(side) for side in host.image_size],
            "patch_size": [int(side) for side in host.patch_size],
            "width": width,
            "layers": len(self.blocks(host)),
            "heads": int(attn.num_heads),
            "mlp_ratio": int(mlp.c_fc.out_features) / width,
            "ls_init_value": 1.0 if scaled else None,
            "output_dim": int(host.proj.shape[1]),
            "no_ln_pre": isinstance(host.ln_pre, nn.Identity),
            "pool_type": host.pool_type,
            "final_ln_after_pool": bool(host.final_ln_after_pool),
            "output_tokens": bool(host.output_tokens),
            "block_type": "custom" if special else None,
            **has,
            "norm_layer": norm,
            "norm_eps": float(host.ln_post.eps),
            "act_layer": activation,
            "approximate": getattr(mlp.gelu, "approximate", None),
            "preserved": {name: getattr(host, name) for name in PRESERVED if hasattr(host, name)},
        }

    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """Builds the class with these arguments and random weights."""
        from open_clip import transformer

        arguments = dict(recipe)
        preserved = arguments.pop("preserved")
        norm, eps = arguments.pop("norm_layer"), float(arguments.pop("norm_eps"))
        activation, approximate = arguments.pop("act_layer"), arguments.pop("approximate")
        if norm not in NORMS or activation not in ACTIVATIONS:
            raise BadFile(f"open_clip has no {str(norm)[:100]} or {str(activation)[:100]}.")
        check_arguments("open_clip's VisionTransformer", arguments, PLAIN_ARGUMENTS)
        host: nn.Module = transformer.VisionTransformer(
            **arguments,
            norm_layer=partial(getattr(transformer, norm), eps=eps),
            act_layer=(
                transformer.QuickGELU
                if activation == "QuickGELU"
                else partial(nn.GELU, approximate=approximate)
            ),
        )
        for name in PRESERVED:
            if name in preserved:
                setattr(host, name, preserved[name])
        return host

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs, read off the host's own layers."""
        grid = (int(host.grid_size[0]), int(host.grid_size[1]))
        facts = self.describe(host)
        every = grid[0] * grid[1] + 1
        projection = 0 if host.proj is None else int(host.proj.numel())
        return HostShape(
            grid=grid,
            prefix=1,
            embed=grid[0] * grid[1] * int(host.conv1.weight.numel()),
            blocks=tuple(_block_shape(block) for block in self.blocks(host)),
            head=projection * (every if host.pool_type == "none" else 1),
            read=facts.rows_read,
        )


def _foreign_block_reason(block: Any) -> str | None:
    """Says why a block is none of open_clip's own whose attention is known; None if it is one."""
    kind, attention = type(block), block.attn
    if kind.__module__ != MODULE or kind.__name__ not in ATTENTIONS:
        return f"it has a block of {kind.__name__}, and only open_clip's own are known."
    if type(attention).__name__ != ATTENTIONS[kind.__name__]:
        return (
            f"its attention is a {type(attention).__name__}, and in this block only "
            f"{ATTENTIONS[kind.__name__]} is known. Slim it before layers are replaced."
        )
    if getattr(attention, "scaled_cosine", False):
        return "its attention compares by cosine (scaled_cosine_attn)."
    return None


def _returns_rows(host: Any) -> bool:
    """Tells whether it returns its sequence, alone or beside the image's embedding."""
    return bool(host.output_tokens) or host.pool_type == "none"


def _block_shape(block: Any) -> BlockShape:
    """Counts what one block costs."""
    width = int(block.attn.in_proj_weight.shape[1])
    return BlockShape(
        width=width,
        q=width * width,
        k=width * width,
        v=width * width,
        query_width=width,
        value_width=width,
        key_width=int(block.attn.head_dim),
        out=width * width,
        feed=linear_macs(block.mlp),
        score=width,
    )
