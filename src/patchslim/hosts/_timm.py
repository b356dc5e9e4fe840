"""What timm's plain vision transformers have in common outside their blocks.

Embedding shape, pooling, head, surface, recipe. It knows nothing of how a block attends.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.errors import BadFile, UnknownName
from patchslim.hosts._adapter import Adapter, HostFacts
from patchslim.hosts._building import check_arguments
from patchslim.hosts._macs import convolution_macs, linear_macs
from patchslim.hosts._registry import load_library
from patchslim.tokens.shapes import BlockShape, HostShape
from patchslim.tokens.tokens import Tokens

# Entries of `pretrained_cfg` by which timm would load a file, perhaps a pickle.
WEIGHT_SOURCES = ("file", "state_dict")


class TimmHost(Adapter, ABC):
    """What timm's plain vision transformers have in common outside their blocks.

    Attributes:
        names_served: how the names of its hosts begin, where timm registers others from the same
            module that are refused.
    """

    names_served: ClassVar[tuple[str, ...]] = ("",)
    host_attributes: ClassVar[frozenset[str]] = frozenset(
        """num_classes num_features head_hidden_size embed_dim in_chans global_pool feature_info
        pretrained_cfg default_cfg num_prefix_tokens patch_embed no_weight_decay group_matcher
        get_classifier reset_classifier set_grad_checkpointing grad_checkpointing
        dynamic_img_size set_distilled_training distilled_training""".split()
    )

    def describe(self, host: Any) -> HostFacts:
        """Reads what the loop must know off the host's own attributes."""
        by_token = host.global_pool == "token" and _attn_pool(host) is None
        is_distilled = type(host).__name__ == "VisionTransformerDistilled"
        attentions = [self._attention(block) for block in self.blocks(host)]
        return HostFacts(
            prefix=int(host.num_prefix_tokens),
            image_shape=self._image_shape(host),
            scales=tuple([float(each.scale) for each in attentions]),
            dropouts=tuple([dropout_in_force(each.attn_drop) for each in attentions]),
            has_class_token=self._has_class_token(host),
            rows_read=2 if is_distilled else 1 if by_token else None,
            returns_rows=_returns_rows(host),
            has_query_pooling=_pools_by_query(host),
            has_relative_bias=self._has_relative_bias(host),
            recomputes_activations=bool(host.grad_checkpointing),
        )

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses all but the host's size; with a dynamic size, all but multiples of the patch."""
        embed = self._patch_embed(host)
        _, height, width = self._image_shape(host)
        if getattr(embed, "strict_img_size", True) and size != (height, width):
            return (
                f"this host takes {height}x{width} pixels. Resize the images, or build the host "
                "with img_size=... or dynamic_img_size=True."
            )
        patch = embed.feat_ratio(as_scalar=False)
        if getattr(embed, "dynamic_img_pad", False):  # a stem pads its features, not the image
            patch = getattr(embed, "feature_ratio", (1, 1))
        if size[0] % patch[0] or size[1] % patch[1]:
            return f"height and width must be multiples of the patch, {patch[0]}x{patch[1]}."
        return None

    def options(self, host: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Refuses all: a mask over the dense sequence does not fit a reduced one."""
        asked = {name: v for name, v in given.items() if v is not None and v is not False}
        return super().options(host, asked)

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        x: Tensor = host.patch_embed(images)
        return x if x.ndim == 3 else x.flatten(1, 2)

    def blocks(self, host: Any) -> nn.Sequential | nn.ModuleList:
        """Lists the transformer blocks."""
        blocks: nn.Sequential | nn.ModuleList = host.blocks
        return blocks

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm."""
        normed: Tensor = host.norm(x)
        return normed

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Calls the host's head. In a mean, a merged token weighs as many as it stands for."""
        if _returns_rows(host):
            return host.forward_head(host.norm(tokens.dense_features()))
        x = host.norm(tokens.x)
        plain = tokens.size is None and tokens.alive is None
        if plain or self.describe(host).rows_read is not None:
            return host.forward_head(x)
        return host.head(host.head_drop(host.fc_norm(self._pool(host, tokens.with_x(x)))))

    def pooled_classifiers(self, host: Any) -> list[nn.Module]:
        """Lists the classifier on the mean of the patches, unless the class token is read."""
        beside = self._has_class_token(host) and _attn_pool(host) is None and host.num_classes > 0
        if not beside or host.global_pool in ("", "token", "prr") or self._pools_prefix(host):
            return super().pooled_classifiers(host)
        return [nn.Sequential(host.fc_norm, host.head_drop, host.head)]

    def readout(self, host: Any, tokens: Tokens) -> Tensor:
        """Computes the pooling query's attention over patches; its two weights become one."""
        pool = _attn_pool(host)
        query = pool.q(pool.latent[:, :1]).unflatten(2, (pool.num_heads, pool.head_dim))[0, 0]
        key = pool.kv.weight.unflatten(0, (2, pool.num_heads, pool.head_dim))[0]
        folded = (query.unsqueeze(1) @ key).squeeze(1) * pool.scale
        logits = host.norm(tokens.x[:, tokens.prefix :]) @ folded.T
        if tokens.alive is not None:
            logits = logits.masked_fill(tokens.alive.unsqueeze(2) == 0, -torch.inf)
        return logits.softmax(dim=1).mean(dim=2)

    def recipe(self, host: Any) -> dict[str, Any] | None:
        """Notes registered name, arguments and configuration; None if timm kept no arguments."""
        cfg = dict(getattr(host, "pretrained_cfg", None) or {})
        if getattr(host, "_model_args", None) is None or not cfg.get("architecture"):
            return None  # timm keeps the arguments from 1.0.31 on
        from timm.models import get_model_args

        args = get_model_args(host)
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
        """Calls `timm.create_model`, without weights, for a registered name: nothing is fetched."""
        library = load_library("timm")
        timm, name = library.import_library(), str(recipe["architecture"])
        if not timm.is_model(name):
            raise UnknownName.of("timm architecture", name[:200], timm.list_models())
        args = {**recipe["args"], "num_classes": recipe["num_classes"]}
        args.pop("pretrained_strict", None)  # how weights were loaded once; there are none to load
        check_arguments(name, args, library.setting_names(name))
        host: Any = timm.create_model(name, pretrained=False, **args)
        said = recipe["pretrained_cfg"].items()
        cfg = {name: tuple(value) if isinstance(value, list) else value for name, value in said}
        named = sorted(key for key in WEIGHT_SOURCES if cfg.get(key))
        if named:
            raise BadFile(f"pretrained_cfg names weights of its own ({', '.join(named)}).")
        host.pretrained_cfg = host.default_cfg = cfg
        built: nn.Module = host
        return built

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs, read off the host's own modules."""
        facts = self.describe(host)
        size = image_size or facts.image_shape[1:]
        grid = tuple(int(side) for side in self._patch_embed(host).dynamic_feat_size(size))
        head, head_row = self._head_macs(host, facts.prefix + grid[0] * grid[1])
        return HostShape(
            grid=(grid[0], grid[1]),
            prefix=facts.prefix,
            embed=embed_macs(
                self._patch_embed(host), (int(host.in_chans), *size), grid[0] * grid[1]
            ),
            blocks=tuple(self._block_shape(host, index) for index in range(len(self.blocks(host)))),
            head=head,
            head_row=head_row,
            read=facts.rows_read,
        )

    def _head_macs(self, host: Any, entering: int) -> tuple[int, int]:
        """Counts the multiply-adds of the head: a fixed number, and one for each row left."""
        final, pool = sum(map(linear_macs, self._classifiers(host))), _attn_pool(host)
        if _pools_by_query(host):
            query = linear_macs(pool.q) + linear_macs(pool.proj) + linear_macs(pool.mlp)
            row = linear_macs(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
            unread = 0 if self._pools_prefix(host) else int(host.num_prefix_tokens)
            return final + pool.latent_len * query - unread * row, row
        if pool is not None:  # every row of the restored sequence attends to every other
            return final + 2 * entering * entering * pool.num_heads * pool.head_dim, 0
        return final * (entering if _returns_rows(host) else 1), 0

    @abstractmethod
    def _attention(self, block: Any) -> Any:
        """Finds a module of the block that has `scale` and `attn_drop`."""

    @abstractmethod
    def _block_shape(self, host: Any, index: int) -> BlockShape:
        """Counts what one block costs, read off its own layers."""

    def _classifiers(self, host: Any) -> list[nn.Module]:
        """Lists the layers that turn pooled features into logits."""
        classifier = host.get_classifier()
        return list(classifier) if isinstance(classifier, tuple) else [classifier]

    def _score_macs(self, host: Any) -> dict[str, int]:
        """Counts the multiply-adds of scoring by the folded pooling query; nothing without one."""
        if self._has_class_token(host) or not _pools_by_query(host):
            return {}
        pool, width = _attn_pool(host), int(host.embed_dim)
        folding = linear_macs(pool.q) + int(pool.num_heads * pool.head_dim) * width
        return {"score": int(pool.num_heads) * width, "score_once": folding}

    def _pool(self, host: Any, tokens: Tokens) -> Tensor:
        """Pools rows: one of size s counts s times, and a row that is not alive not at all."""
        weight = tokens.sizes() if tokens.alive is None else tokens.sizes() * tokens.alive
        x = tokens.x
        if self._pools_prefix(host):
            weight = F.pad(weight, (tokens.prefix, 0), value=1.0)
        else:
            x = x[:, tokens.prefix :]
        if _attn_pool(host) is not None:
            bias = weight.clamp(min=torch.finfo(weight.dtype).tiny).log()[:, None, None, :]
            pooled: Tensor = _attn_pool(host)(x, attn_mask=bias.to(x.dtype))
            return pooled
        total = weight.sum(dim=1, keepdim=True)
        share = (weight / total.clamp(min=1)).to(x.dtype)  # the mean of nothing is 0
        mean = (x * share.unsqueeze(2)).sum(dim=1)
        if host.global_pool == "avg":
            return mean
        gone = (weight == 0) & (total > 0)  # if a mask in training left none, all rows
        largest = x.masked_fill(gone.unsqueeze(2), -torch.inf).amax(dim=1)
        return largest if host.global_pool == "max" else (mean + largest) / 2

    def _patch_embed(self, host: Any) -> Any:
        """Finds the module that embeds patches."""
        return host.patch_embed

    def _image_size(self, host: Any) -> tuple[int, int]:
        """Reads height and width of the images that the host is made for."""
        size = getattr(host.patch_embed, "img_size", None) or host.pretrained_cfg["input_size"][1:]
        return int(size[0]), int(size[1])

    def _image_shape(self, host: Any) -> tuple[int, int, int]:
        """Reads channels, height and width of the images that the host is made for."""
        return (int(host.in_chans), *self._image_size(host))

    def _has_relative_bias(self, host: Any) -> bool:
        """Tells whether a block adds a bias by relative position to its attention."""
        return False

    def _has_class_token(self, host: Any) -> bool:
        """Tells whether the first row of the host is a class token."""
        return host.cls_token is not None

    @abstractmethod
    def _pools_prefix(self, host: Any) -> bool:
        """Tells whether pooling reads the prefix rows too."""


def _attn_pool(host: Any) -> Any:
    """Finds the pooling attention of a host's head, or None."""
    return getattr(host, "attn_pool", None)


def dropout_in_force(layer: Any) -> float:
    """Returns the share that a dropout layer drops now: none in evaluation."""
    return float(layer.p) if layer.training else 0.0


def _returns_rows(host: Any) -> bool:
    """Tells whether the host returns the sequence; PRR pooling attends over the whole grid."""
    return host.global_pool in ("", "prr")


def _pools_by_query(host: Any) -> bool:
    """Tells whether the head is attention pooling with a latent query (MAP)."""
    return type(_attn_pool(host)).__name__ == "AttentionPoolLatent"


def overridden_reason(
    host: nn.Module,
    modules: Iterable[str],
    names: Iterable[str] = ("forward", "forward_features", "forward_head"),
) -> str | None:
    """Says which of these methods a host's class overrides; None if all are of timm's modules."""
    for name in names:
        own = getattr(type(host), name, None)
        if own is None:
            return (
                f"{type(host).__name__} of this timm has no {name}. Install a newer one: "
                "timm>=1.0.31."
            )
        if own.__module__ not in modules:
            return f"{type(host).__name__} overrides {name}, and only timm's own is known."
    return None


def foreign_class_reason(part: str, module: nn.Module, names: Iterable[str]) -> str | None:
    """Says why `module` is none of timm's own classes of these names; None if it is one."""
    cls = type(module)
    if cls.__name__ in names and cls.__module__.startswith("timm."):
        return None
    known = ", ".join(names)
    return f"its {part} is {cls.__module__}.{cls.__name__}. Known of timm's own: {known}."


def embed_macs(embed: Any, image: tuple[int, ...], patches: int) -> int:
    """Counts the multiply-adds of the patch embedding."""
    if type(embed).__name__ in ("PatchEmbed", "NaFlexEmbeds"):
        return patches * int(embed.proj.weight.numel())
    return convolution_macs(embed, image)
