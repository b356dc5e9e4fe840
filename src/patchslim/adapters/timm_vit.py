"""timm's `VisionTransformer` in all its variants: one adapter, five kinds of block.

Class token or none, distillation token, registers, LayerScale, QK-norm, scale-norm, gated
attention, pre-norm, post-norm and parallel blocks, differential attention, every pooling.
Parallel attentions and differential maps are served as more heads of one attention call.
"""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.adapter import Adapter, Part
from patchslim.cost import BlockShape, HostShape
from patchslim.errors import UnknownName, WrongInput
from patchslim.tokens import Tokens

COLUMNS: dict[Part, slice] = {
    "qkv": slice(0, 3),
    "qk": slice(0, 2),
    "kv": slice(1, 3),
    "q": slice(0, 1),
    "v": slice(2, 3),
}


class TimmHost(Adapter, ABC):
    """What timm's plain vision transformers have in common outside their blocks."""

    surface: ClassVar[frozenset[str]] = frozenset(
        """num_classes num_features head_hidden_size embed_dim in_chans global_pool feature_info
        pretrained_cfg default_cfg num_prefix_tokens patch_embed no_weight_decay get_classifier
        reset_classifier set_grad_checkpointing grad_checkpointing dynamic_img_size""".split()
    )

    def prefix(self, host: Any) -> int:
        """Class, distillation and register tokens."""
        return int(host.num_prefix_tokens)

    def has_class_token(self, host: Any) -> bool:
        """Whether the first row is a class token."""
        return host.cls_token is not None

    def reads(self, host: Any) -> int | None:
        """One row for token pooling, two for the distilled head."""
        if type(host).__name__ == "VisionTransformerDistilled":
            return 2
        return 1 if host.global_pool == "token" and host.attn_pool is None else None

    def returns_rows(self, host: Any) -> bool:
        """Without pooling the sequence itself is the answer; PRR pooling attends over the grid."""
        return host.global_pool in ("", "prr")

    def pools_by_query(self, host: Any) -> bool:
        """Whether the head is attention pooling with a latent query (MAP)."""
        return type(host.attn_pool).__name__ == "AttentionPoolLatent"

    def image_shape(self, host: Any) -> tuple[int, int, int]:
        """Channels, height and width."""
        size = getattr(host.patch_embed, "img_size", None) or host.pretrained_cfg["input_size"][1:]
        return int(host.in_chans), int(size[0]), int(size[1])

    def misfit(self, host: Any, size: tuple[int, int], options: Mapping[str, Any]) -> str | None:
        """A strict host takes one size; a free one takes multiples of its patch, unless it pads."""
        embed = host.patch_embed
        _, height, width = self.image_shape(host)
        if getattr(embed, "strict_img_size", True) and size != (height, width):
            return (
                f"this host takes {height}x{width} pixels. Resize the images, or build the host "
                "with img_size=... or dynamic_img_size=True."
            )
        patch = getattr(embed, "patch_size", None)
        if patch is None or getattr(embed, "dynamic_img_pad", False):
            return None
        if size[0] % patch[0] or size[1] % patch[1]:
            return f"height and width must be multiples of the patch, {patch[0]}x{patch[1]}."
        return None

    def options(self, host: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """None: a mask over the dense sequence means nothing on a reduced one."""
        unused = {name: value for name, value in given.items() if value not in (None, False)}
        if unused:
            raise WrongInput(f"A slimmed timm model takes images alone, not {sorted(unused)}.")
        return {}

    def blocks(self, host: Any) -> nn.Sequential | nn.ModuleList:
        """The transformer blocks."""
        blocks: nn.Sequential | nn.ModuleList = host.blocks
        return blocks

    def checkpoints(self, host: Any) -> bool:
        """Whether `set_grad_checkpointing` was called on the host."""
        return bool(host.grad_checkpointing)

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """The final norm."""
        normed: Tensor = host.norm(x)
        return normed

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """The host's own head; tokens that stand for several patches weigh as many when pooled."""
        if self.returns_rows(host):
            return host.forward_head(host.norm(tokens.restored()))
        x = host.norm(tokens.x)
        if (tokens.size is None and tokens.alive is None) or self.reads(host) is not None:
            return host.forward_head(x)
        return host.head(host.head_drop(host.fc_norm(self._pool(host, tokens.with_x(x)))))

    def logits(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output

    def readout(self, host: Any, tokens: Tokens) -> Tensor:
        """Attention of the pooling query over the patches (its key projection folded in)."""
        pool = host.attn_pool
        query = pool.q(pool.latent[:, :1]).unflatten(2, (pool.num_heads, pool.head_dim))[0, 0]
        key = pool.kv.weight.unflatten(0, (2, pool.num_heads, pool.head_dim))[0]
        folded = (query.unsqueeze(1) @ key).squeeze(1) * pool.scale
        logits = host.norm(tokens.x[:, tokens.prefix :]) @ folded.T
        return logits.softmax(dim=1).mean(dim=2)

    def recipe(self, host: Any) -> dict[str, Any] | None:
        """The registered architecture, its arguments if timm kept them, its configuration."""
        cfg = dict(getattr(host, "pretrained_cfg", None) or {})
        args = getattr(host, "_model_args", None)
        if args is None or not cfg.get("architecture"):
            return None
        recipe = {
            "architecture": cfg["architecture"],
            "args": args,
            "num_classes": host.num_classes,
            "pretrained_cfg": cfg,
        }
        try:
            return dict(json.loads(json.dumps(recipe)))
        except TypeError:
            return None

    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """`timm.create_model`, without weights, of a registered name: nothing is fetched."""
        import timm

        if not timm.is_model(recipe["architecture"]):
            known = timm.list_models()
            raise UnknownName.of("timm architecture", str(recipe["architecture"]), known)
        args = {**recipe["args"], "num_classes": recipe["num_classes"]}
        host: Any = timm.create_model(recipe["architecture"], pretrained=False, **args)
        said = recipe["pretrained_cfg"].items()
        cfg = {name: tuple(value) if isinstance(value, list) else value for name, value in said}
        host.pretrained_cfg = host.default_cfg = cfg
        built: nn.Module = host
        return built

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Rows and costs, read off the host's own modules."""
        size = image_size or self.image_shape(host)[1:]
        grid = tuple(int(side) for side in host.patch_embed.dynamic_feat_size(size))
        final = sum(map(linear_macs, self._classifiers(host)))
        pool = host.attn_pool
        row = pair = 0
        if self.pools_by_query(host):
            query = linear_macs(pool.q) + linear_macs(pool.proj) + linear_macs(pool.mlp)
            final += pool.latent_len * query
            row = linear_macs(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
        elif pool is not None:
            pair = 2 * pool.num_heads * pool.head_dim
        return HostShape(
            grid=(grid[0], grid[1]),
            prefix=self.prefix(host),
            embed=_embed_macs(host.patch_embed, (int(host.in_chans), *size), grid[0] * grid[1]),
            blocks=tuple(self._block_shape(host, index) for index in range(len(host.blocks))),
            head=final,
            head_row=row,
            head_pair=pair,
            read=self.reads(host),
        )

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        raise NotImplementedError

    def _classifiers(self, host: Any) -> list[nn.Module]:
        """The layers that turn pooled features into logits."""
        found = host.get_classifier()
        return list(found) if isinstance(found, tuple) else [found]

    def _score(self, host: Any, query_width: int) -> int:
        """Multiply-adds a row of scoring: one query over all heads, or the folded pooling query."""
        if not self.has_class_token(host) and self.pools_by_query(host):
            return int(host.attn_pool.num_heads * host.embed_dim)
        return query_width

    def _pool(self, host: Any, tokens: Tokens) -> Tensor:
        """Pooling in which a row that stands for s patches counts s times, and a dead one never."""
        weight = tokens.sizes() if tokens.alive is None else tokens.sizes() * tokens.alive
        x = tokens.x
        if self._pools_prefix(host):
            weight = F.pad(weight, (tokens.prefix, 0), value=1.0)
        else:
            x = x[:, tokens.prefix :]
        if host.attn_pool is not None:
            bias = weight.clamp(min=torch.finfo(x.dtype).tiny).log()[:, None, None, :]
            pooled: Tensor = host.attn_pool(x, attn_mask=bias.to(x.dtype))
            return pooled
        share = (weight / weight.sum(dim=1, keepdim=True)).to(x.dtype)
        mean = (share.unsqueeze(1) @ x).squeeze(1)
        if host.global_pool == "avg":
            return mean
        largest = x.masked_fill((weight == 0).unsqueeze(2), -torch.inf).amax(dim=1)
        return largest if host.global_pool == "max" else (mean + largest) / 2

    def _pools_prefix(self, host: Any) -> bool:
        """Whether pooling reads the prefix rows too."""
        raise NotImplementedError


class TimmVit(TimmHost):
    """timm `VisionTransformer` and `VisionTransformerDistilled`."""

    family: ClassVar[str] = "timm VisionTransformer"

    def serves(self, host: nn.Module) -> bool:
        """VisionTransformer and its subclasses."""
        return any(
            cls.__name__ == "VisionTransformer"
            and cls.__module__ == "timm.models.vision_transformer"
            for cls in type(host).__mro__
        )

    def refusal(self, host: Any) -> str | None:
        """Foreign forward passes, blocks and attentions, and patch dropout."""
        known = ("timm.models.vision_transformer", "timm.models.deit")
        for name in ("forward", "forward_features", "forward_head", "pool"):
            if getattr(type(host), name).__module__ not in known:
                return f"{type(host).__name__} overrides {name}, and only timm's own is known."
        if not isinstance(host.patch_drop, nn.Identity):
            return "it drops patches at random (patch_drop_rate). Build it with patch_drop_rate=0."
        for block in host.blocks:
            if type(block).__name__ not in KINDS:
                return f"its blocks are {type(block).__name__}. Known: {', '.join(KINDS)}."
            for attn in _attentions(block):
                if attn is not block and type(attn).__name__ not in ("Attention", "DiffAttention"):
                    return (
                        f"its attention is {type(attn).__name__}; known: Attention, DiffAttention."
                    )
        return None

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Patches, positions, prefix tokens and the norm before the blocks."""
        x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
        grid = host.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        return Tokens(x=x, prefix=self.prefix(host), grid=(int(grid[0]), int(grid[1])))

    def scale(self, host: Any, index: int) -> float:
        """One over the root of a head's width."""
        return float(_attentions(host.blocks[index])[0].scale)

    def dropout(self, host: Any, index: int) -> float:
        """Attention dropout while training."""
        drop = _attentions(host.blocks[index])[0].attn_drop
        return float(drop.p) if drop.training else 0.0

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """The block's own norm and projection; several attentions side by side are more heads."""
        block = host.blocks[index]
        each = [_heads(attn, y, part) for attn, y in _inputs(block, tokens.x)]
        if len(each) == 1:
            return each[0]
        return tuple(torch.cat(same, dim=1) for same in zip(*each, strict=True))

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Gate, projection, LayerScale, drop path and residual, as this kind of block does it."""
        block = host.blocks[index]
        mixed: Tensor = KINDS[type(block).__name__][0](block, queries.x, attended)
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """The feed-forward and its residual, as this kind of block does it."""
        block = host.blocks[index]
        fed: Tensor = KINDS[type(block).__name__][1](block, x)
        return fed

    def _pools_prefix(self, host: Any) -> bool:
        return bool(host.pool_include_prefix)

    def _block_shape(self, host: Any, index: int) -> BlockShape:
        """Costs read off one block's own layers."""
        block = host.blocks[index]
        attns = _attentions(block)
        width, heads = int(host.embed_dim), len(attns) * attns[0].num_heads
        maps = 2 if hasattr(attns[0], "lambda_init") else 1
        channels = int(attns[0].head_dim)
        inner = heads * maps * channels
        parallel = "Scaling" in type(block).__name__
        if parallel:
            out = linear_macs(block) - 3 * width * inner
        else:
            out = sum(linear_macs(attn) - linear_macs(attn.qkv) for attn in attns)
        return BlockShape(
            width=width,
            q=width * inner,
            k=width * inner,
            v=width * inner,
            query_width=inner,
            value_width=inner * maps,
            key_width=channels,
            out=out,
            feed=0 if parallel else linear_macs(getattr(block, "ffns", None) or block.mlp),
            score=self._score(host, inner),
        )


def _attentions(block: Any) -> list[Any]:
    """The attention modules of a block; a fused parallel block is its own attention."""
    if hasattr(block, "attns"):
        return [branch.attn for branch in block.attns]
    return [block.attn] if hasattr(block, "attn") else [block]


def _inputs(block: Any, x: Tensor) -> list[tuple[Any, Tensor]]:
    """Each attention of a block with what it sees: normed before (most) or not (post-norm)."""
    if hasattr(block, "attns"):
        return [(branch.attn, branch.norm(x)) for branch in block.attns]
    if hasattr(block, "in_proj"):
        return [(block, block.in_norm(x))]
    return [(block.attn, x if type(block).__name__ == "ResPostBlock" else block.norm1(x))]


def _heads(attn: Any, y: Tensor, part: Part) -> tuple[Tensor, ...]:
    """Queries, keys, values of one attention, split in heads and normed.

    Differential attention has two maps a head over one value: each map becomes a head.
    """
    flat = _project(attn, y, part)
    maps = 2 if hasattr(attn, "lambda_init") else 1
    every: list[Tensor] = []
    for name, t in zip(part, flat, strict=True):
        if name == "v":
            value = t.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
            every.append(value.repeat_interleave(maps, dim=1) if maps > 1 else value)
            continue
        t = t.unflatten(2, (attn.num_heads * maps, -1)).transpose(1, 2)
        every.append(attn.q_norm(t) if name == "q" else attn.k_norm(t))
    return tuple(every)


def _project(attn: Any, y: Tensor, part: Part) -> list[Tensor]:
    """The named columns of the fused projection, each (B, N, heads * channels)."""
    layer = getattr(attn, "qkv", None)
    first = 0
    if layer is None:
        layer, first = attn.in_proj, attn.in_split[0]
    columns = COLUMNS[part]
    if part == "qkv" and not first:
        return list(layer(y).chunk(3, dim=2))
    third = (layer.out_features - first) // 3
    start, stop = first + columns.start * third, first + columns.stop * third
    if type(layer) is not nn.Linear:
        return list(layer(y)[..., start:stop].chunk(len(part), dim=2))
    bias = None if layer.bias is None else layer.bias[start:stop]
    return list(F.linear(y, layer.weight[start:stop], bias).chunk(len(part), dim=2))


def _joined(attn: Any, attended: Tensor) -> Tensor:
    """The attended values (B, heads, n, d) as one vector a row; two maps a head are subtracted."""
    if hasattr(attn, "lambda_init"):
        weight = attn._compute_lambda().type_as(attended)
        attended = attended[:, 0::2] - weight * attended[:, 1::2]
        attended = attn.sub_norm(attended) * (1 - attn.lambda_init)
    return attended.transpose(1, 2).flatten(2)


def _attention_out(attn: Any, y: Tensor, attended: Tensor) -> Tensor:
    """What an attention module makes of its attended values; `y` is what it saw, for its gate."""
    joined = attn.norm(_joined(attn, attended))
    gate = getattr(attn, "gate", None)
    if gate is not None:
        joined = joined * gate(y).sigmoid()
    out: Tensor = attn.proj_drop(attn.proj(joined))
    return out


def _mix_pre(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    y = x if getattr(block.attn, "gate", None) is None else block.norm1(x)
    return x + block.drop_path1(block.ls1(_attention_out(block.attn, y, attended)))


def _feed_pre(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _mix_post(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    return x + block.drop_path1(block.norm1(_attention_out(block.attn, x, attended)))


def _feed_post(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _mix_side_by_side(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    parts = attended.chunk(len(block.attns), dim=1)
    outs = [
        branch.drop_path(branch.ls(_attention_out(branch.attn, branch.norm(x), part)))
        for branch, part in zip(block.attns, parts, strict=True)
    ]
    return x + torch.stack(outs).sum(dim=0)


def _feed_side_by_side(block: Any, x: Tensor) -> Tensor:
    return x + torch.stack([branch(x) for branch in block.ffns]).sum(dim=0)


def _mix_parallel(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Attention and feed-forward of one input, added in one residual."""
    hidden = block.in_split[0]
    bias = block.mlp_bias if block.in_proj.bias is None else block.in_proj.bias[:hidden]
    fed = F.linear(block.in_norm(x), block.in_proj.weight[:hidden], bias)
    fed = block.mlp_drop(block.mlp_act(fed))
    joined = _joined(block, attended)
    if block.out_proj is not None:
        out = block.out_proj(torch.cat([joined, fed], dim=-1))
    else:
        out = block.attn_out_proj(joined) + block.mlp_out_proj(fed)
    return x + block.drop_path(block.ls(out))


def _feed_nothing(_: Any, x: Tensor) -> Tensor:
    """The feed-forward is already in the one residual."""
    return x


KINDS = {
    "Block": (_mix_pre, _feed_pre),
    "ResPostBlock": (_mix_post, _feed_post),
    "ParallelThingsBlock": (_mix_side_by_side, _feed_side_by_side),
    "ParallelScalingBlock": (_mix_parallel, _feed_nothing),
    "DiffParallelScalingBlock": (_mix_parallel, _feed_nothing),
}


def linear_macs(module: nn.Module | None) -> int:
    """Multiply-adds a row of all linear layers in `module`."""
    layers = () if module is None else module.modules()
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d))


def _embed_macs(embed: Any, image: tuple[int, ...], patches: int) -> int:
    """Multiply-adds of the patch embedding; a convolutional stem is counted on fake tensors."""
    if type(embed).__name__ == "PatchEmbed":
        return patches * int(embed.proj.weight.numel())
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(embed.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        embed(torch.empty(1, *image, device=parameter.device, dtype=parameter.dtype))
    return int(counter.get_total_flops()) // 2
