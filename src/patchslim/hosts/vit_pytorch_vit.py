"""lucidrains' `ViT` and `SimpleViT` of vit-pytorch, which many a model written by hand starts from.

They do not keep the size of their images, so it is read off the number of positions: a square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchslim.errors import BadFile
from patchslim.hosts._adapter import Adapter, HostFacts, Part
from patchslim.hosts._building import check_arguments
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._pooling import mean_of_patches
from patchslim.tokens.shapes import BlockShape, HostShape
from patchslim.tokens.tokens import Tokens

MODULES = {"ViT": "vit_pytorch.vit", "SimpleViT": "vit_pytorch.simple_vit"}
PLACES = {"q": 0, "k": 1, "v": 2}  # among the three in the rows of `to_qkv`
ARGUMENTS = frozenset(
    """image_size patch_size num_classes dim depth heads mlp_dim pool channels dim_head dropout
    emb_dropout""".split()
)


class VitPytorchVit(Adapter):
    """vit-pytorch `ViT` and `SimpleViT`."""

    family: ClassVar[str] = "vit-pytorch ViT / SimpleViT"
    host_classes: ClassVar[frozenset[str]] = frozenset(
        f"{module}.{name}" for name, module in MODULES.items()
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign layers, images that are not square."""
        known = MODULES.values()
        if type(host).forward.__module__ not in known:
            return f"{type(host).__name__} overrides forward, and only vit-pytorch's is known."
        for attention, feed in self.blocks(host):
            for part in (attention, feed):
                if type(part).__module__ not in known:
                    return f"it has a layer of {type(part).__name__}, which is not vit-pytorch's."
        cells = _count_positions(host) - _prefix(host)
        if math.isqrt(cells) ** 2 != cells:
            return (
                f"it has {cells} patches and does not say how many rows of them. Build it for "
                "square images."
            )
        return None

    def describe(self, host: Any) -> HostFacts:
        """Reads the host's facts."""
        attentions = [attention for attention, _ in self.blocks(host)]
        drops = [getattr(each, "dropout", None) for each in attentions]
        side, (height, width) = _grid_side(host), _patch_size(host)
        prefix, returns_rows = _prefix(host), _classifier(host) is None
        return HostFacts(
            prefix=prefix,
            image_shape=(_channels(host), side * height, side * width),
            scales=tuple([float(each.scale) for each in attentions]),
            dropouts=tuple([float(d.p) if d is not None and d.training else 0.0 for d in drops]),
            has_class_token=prefix > 0,
            rows_read=1 if host.pool == "cls" and not returns_rows else None,
            returns_rows=returns_rows,
        )

    def blocks(self, host: Any) -> Any:
        """Lists the pairs of attention and feed-forward."""
        return host.transformer.layers

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds patches, puts the class token before them, adds positions, applies dropout."""
        x = self.embedding(host, images)
        prefix, side = _prefix(host), _grid_side(host)
        if prefix:
            x = torch.cat((host.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + host.pos_embedding.to(x)
        if hasattr(host, "dropout"):
            x = host.dropout(x)
        return Tokens(x=x, prefix=prefix, grid=(side, side))

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        x: Tensor = host.to_patch_embedding(images)
        return x

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies the norm, and the rows of the projection that `part` names."""
        attention, _ = host.transformer.layers[index]
        y = attention.norm(tokens.x)
        if part == "qkv":
            flat = attention.to_qkv(y)
        else:
            third = attention.to_qkv.out_features // 3
            rows = slice(PLACES[part[0]] * third, (PLACES[part[-1]] + 1) * third)
            flat = nn.functional.linear(y, attention.to_qkv.weight[rows])
        heads = int(attention.heads)
        return tuple(
            each.unflatten(2, (heads, -1)).transpose(1, 2) for each in flat.chunk(len(part), dim=2)
        )

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies output projection and residual."""
        attention, _ = host.transformer.layers[index]
        mixed: Tensor = attention.to_out(attended.transpose(1, 2).flatten(2)) + queries.x
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies feed-forward, with its norm, and residual."""
        _, feed = host.transformer.layers[index]
        fed: Tensor = feed(x) + x
        return fed

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm."""
        normed: Tensor = host.transformer.norm(x)
        return normed

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Tensor:
        """Pools and classifies; in a mean, a merged row weighs as many as it stands for."""
        classifier = _classifier(host)
        if classifier is None:
            return self.norm(host, tokens.dense_features())
        x = self.norm(host, tokens.x)
        pooled = x[:, 0] if host.pool == "cls" else mean_of_patches(tokens, x)
        logits: Tensor = classifier(host.to_latent(pooled))
        return logits

    def recipe(self, host: Any) -> dict[str, Any] | None:
        """Notes the arguments of the class, read off the layers."""
        classifier, (attention, feed) = _classifier(host), self.blocks(host)[0]
        if classifier is not None and type(classifier) is not nn.Linear:
            return None
        facts, heads = self.describe(host), int(attention.heads)
        width = int(host.to_patch_embedding[2].out_features)
        recipe = {
            "class": type(host).__name__,
            "image_size": list(facts.image_shape[1:]),
            "patch_size": list(_patch_size(host)),
            "num_classes": 0 if classifier is None else int(classifier.out_features),
            "dim": width,
            "depth": len(self.blocks(host)),
            "heads": heads,
            "mlp_dim": int(feed.net[1].out_features),
            "channels": facts.image_shape[0],
            "dim_head": int(attention.to_qkv.out_features) // (3 * heads),
        }
        if type(host).__name__ == "ViT":
            drops = {"dropout": float(attention.dropout.p), "emb_dropout": float(host.dropout.p)}
            recipe |= {"pool": host.pool, **drops}
        return recipe if type(host).__name__ in MODULES else None

    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """Builds the class with these arguments and random weights."""
        import vit_pytorch

        arguments = dict(recipe)
        name = arguments.pop("class")
        if name not in MODULES:
            raise BadFile(f"vit-pytorch's {str(name)[:100]} is no class that is served.")
        check_arguments(f"vit-pytorch's {name}", arguments, ARGUMENTS)
        for size in ("image_size", "patch_size"):
            arguments[size] = tuple(arguments[size])
        host: nn.Module = getattr(vit_pytorch, name)(**arguments)
        return host

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs, read off the host's own layers."""
        facts, side = self.describe(host), _grid_side(host)
        return HostShape(
            grid=(side, side),
            prefix=facts.prefix,
            embed=side * side * linear_macs(host.to_patch_embedding),
            blocks=tuple(_block_shape(attention, feed) for attention, feed in self.blocks(host)),
            head=linear_macs(_classifier(host)),
            read=facts.rows_read,
        )


def _classifier(host: Any) -> Any:
    """Finds the classifier; None for a host that returns its sequence."""
    return host.linear_head if hasattr(host, "linear_head") else host.mlp_head


def _prefix(host: Any) -> int:
    """Counts the class token: none in a host that pools the mean."""
    return len(host.cls_token) if hasattr(host, "cls_token") else 0


def _count_positions(host: Any) -> int:
    """Counts the rows of the sequence."""
    return int(host.pos_embedding.shape[0])


def _grid_side(host: Any) -> int:
    """Counts the rows, and so the columns, of the patch grid."""
    return math.isqrt(_count_positions(host) - _prefix(host))


def _patch_size(host: Any) -> tuple[int, int]:
    """Reads height and width of a patch."""
    lengths = host.to_patch_embedding[0].axes_lengths
    return int(lengths["p1"]), int(lengths["p2"])


def _channels(host: Any) -> int:
    """Counts the channels of an image."""
    height, width = _patch_size(host)
    return int(host.to_patch_embedding[2].in_features) // (height * width)


def _block_shape(attention: Any, feed: Any) -> BlockShape:
    """Counts what one block costs."""
    width, inner = int(attention.to_qkv.in_features), int(attention.to_qkv.out_features) // 3
    return BlockShape(
        width=width,
        q=width * inner,
        k=width * inner,
        v=width * inner,
        query_width=inner,
        value_width=inner,
        key_width=inner // int(attention.heads),
        out=linear_macs(attention.to_out),
        feed=linear_macs(feed),
        score=inner,
    )
