"""torchvision's `VisionTransformer`: a class token, one image size, a plain or convolutional stem.

Its attention is torch's `nn.MultiheadAttention`, which holds queries, keys and values as rows of
one weight and has no layer for them that could be called.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.hosts._adapter import Adapter, HostFacts, Part
from patchslim.hosts._building import check_arguments
from patchslim.hosts._libraries.torchvision import WEIGHTS_ATTRIBUTE
from patchslim.hosts._macs import convolution_macs, linear_macs
from patchslim.hosts._registry import load_library
from patchslim.tokens.shapes import BlockShape, HostShape
from patchslim.tokens.tokens import Tokens

MODULE = "torchvision.models.vision_transformer"
# What a recipe says of the class besides its norm, its stem and the name of its weights.
RECIPE_ARGUMENTS = frozenset(
    """image_size patch_size num_layers num_heads hidden_dim mlp_dim dropout attention_dropout
    num_classes representation_size""".split()
)
PLACES = {"q": 0, "k": 1, "v": 2}  # among the three in the rows of `in_proj_weight`
# What a recipe can name in a convolutional stem.
STEM_NORMS = {"BatchNorm2d": nn.BatchNorm2d}
STEM_ACTIVATIONS = {
    cls.__name__: cls for cls in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU)
}


class TorchvisionVit(Adapter):
    """torchvision `VisionTransformer`."""

    family: ClassVar[str] = "torchvision VisionTransformer"
    host_classes: ClassVar[frozenset[str]] = frozenset({f"{MODULE}.VisionTransformer"})
    host_attributes: ClassVar[frozenset[str]] = frozenset(
        """image_size patch_size hidden_dim mlp_dim num_classes representation_size
        seq_length""".split()
    )

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses overridden forward passes, foreign blocks, and more than plain attention."""
        for name in ("forward", "_process_input"):
            if getattr(type(host), name).__module__ != MODULE:
                return f"{type(host).__name__} overrides {name}, and only torchvision's is known."
        if not _is_own(host.encoder, "Encoder"):
            return f"its encoder is a {type(host.encoder).__name__}, not torchvision's Encoder."
        for block in host.encoder.layers:
            if not _is_own(block, "EncoderBlock"):
                return f"it has a block of {type(block).__name__}, not torchvision's EncoderBlock."
            attention = block.self_attention
            if type(attention) is not nn.MultiheadAttention:
                return (
                    f"its attention is a {type(attention).__name__}, and only torch's own "
                    "nn.MultiheadAttention is known. Slim it before its layers are replaced."
                )
            extended = attention.bias_k is not None or attention.add_zero_attn
            if extended or attention.in_proj_weight is None or not attention.batch_first:
                return (
                    "its attention has other settings than torchvision gives it. Build it without "
                    "add_bias_kv, add_zero_attn, kdim and vdim, and with batch_first=True."
                )
        return None

    def describe(self, host: Any) -> HostFacts:
        """Reads the host's facts. The head reads one class token; positions fix the image size."""
        stem = next(layer for layer in host.conv_proj.modules() if isinstance(layer, nn.Conv2d))
        attentions = [block.self_attention for block in host.encoder.layers]
        return HostFacts(
            prefix=1,
            image_shape=(stem.in_channels, int(host.image_size), int(host.image_size)),
            scales=tuple([float(each.head_dim) ** -0.5 for each in attentions]),
            dropouts=tuple([float(a.dropout) if a.training else 0.0 for a in attentions]),
            has_class_token=True,
            rows_read=1,
        )

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds class token and patches, adds their positions, applies dropout."""
        patches = self.embedding(host, images)
        class_token = host.class_token.expand(patches.shape[0], -1, -1)
        x = torch.cat([class_token, patches], dim=1) + host.encoder.pos_embedding
        side = _grid_side(host)
        return Tokens(x=host.encoder.dropout(x), prefix=1, grid=(side, side))

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        patches: Tensor = host._process_input(images)
        return patches

    def blocks(self, host: Any) -> nn.Sequential:
        """Lists the encoder's layers."""
        layers: nn.Sequential = host.encoder.layers
        return layers

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies the block's norm, and the rows of the attention's weight that `part` names."""
        attention = _attention(host, index)
        width, bias = int(attention.embed_dim), attention.in_proj_bias
        rows = slice(PLACES[part[0]] * width, (PLACES[part[-1]] + 1) * width)
        y = host.encoder.layers[index].ln_1(tokens.x)
        projected = F.linear(
            y, attention.in_proj_weight[rows], None if bias is None else bias[rows]
        )
        heads = (len(part), int(attention.num_heads), int(attention.head_dim))
        return projected.unflatten(2, heads).permute(2, 0, 3, 1, 4).unbind(0)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies output projection, dropout and residual."""
        # torch's attention reads the weights of `out_proj` and does not call it. It lays rows out
        # before images in memory, and dropout draws its numbers in the order of memory.
        layer = _attention(host, index).out_proj
        out = F.linear(attended.permute(2, 0, 1, 3).flatten(2), layer.weight, layer.bias)
        out = out.transpose(0, 1)
        mixed: Tensor = host.encoder.layers[index].dropout(out) + queries.x
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies norm, feed-forward and residual."""
        block = host.encoder.layers[index]
        fed: Tensor = x + block.mlp(block.ln_2(x))
        return fed

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm."""
        normed: Tensor = host.encoder.ln(x)
        return normed

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Tensor:
        """Applies the classifier to the class token."""
        logits: Tensor = host.heads(host.encoder.ln(tokens.x)[:, 0])
        return logits

    def recipe(self, host: Any) -> dict[str, Any] | None:
        """Notes the arguments of the class, read off the layers, and the name of the weights."""
        norms = [host.encoder.ln, *(block.ln_1 for block in host.encoder.layers)]
        plain_norms = all(type(norm) is nn.LayerNorm for norm in norms)
        stem, head = _stem_recipe(host.conv_proj), getattr(host.heads, "head", None)
        if not plain_norms or stem is None or type(head) is not nn.Linear:
            return None
        return {
            "image_size": int(host.image_size),
            "patch_size": int(host.patch_size),
            "num_layers": len(host.encoder.layers),
            "num_heads": int(_attention(host, 0).num_heads),
            "hidden_dim": int(host.hidden_dim),
            "mlp_dim": int(host.mlp_dim),
            "dropout": float(host.dropout),
            "attention_dropout": float(host.attention_dropout),
            "num_classes": int(head.out_features),
            "representation_size": host.representation_size,
            "norm_eps": float(host.encoder.ln.eps),
            "stem": stem,
            "weights": getattr(host, WEIGHTS_ATTRIBUTE, None),
        }

    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """Builds the class with these arguments and random weights."""
        from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

        arguments = dict(recipe)
        weights, stem = arguments.pop("weights"), arguments.pop("stem")
        norm = partial(nn.LayerNorm, eps=float(arguments.pop("norm_eps")))
        check_arguments("torchvision's VisionTransformer", arguments, RECIPE_ARGUMENTS)
        for layer in stem:
            check_arguments("a convolutional stem", layer, None)
        layers = [
            ConvStemConfig(
                out_channels=layer["out_channels"],
                kernel_size=layer["kernel_size"],
                stride=layer["stride"],
                norm_layer=STEM_NORMS[layer["norm"]],
                activation_layer=STEM_ACTIVATIONS[layer["activation"]],
            )
            for layer in stem
        ]
        host: nn.Module = VisionTransformer(
            **arguments, norm_layer=norm, conv_stem_configs=layers or None
        )
        if weights is not None:
            load_library("torchvision").import_library().models.get_weight(str(weights))
            setattr(host, WEIGHTS_ATTRIBUTE, str(weights))
        return host

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs, read off the host's own layers."""
        side = _grid_side(host)
        plain = isinstance(host.conv_proj, nn.Conv2d)
        return HostShape(
            grid=(side, side),
            prefix=1,
            embed=(
                side * side * int(host.conv_proj.weight.numel())
                if plain
                else convolution_macs(host.conv_proj, self.describe(host).image_shape)
            ),
            blocks=tuple(_block_shape(block) for block in host.encoder.layers),
            head=linear_macs(host.heads),
            read=1,
        )


def _is_own(module: nn.Module, name: str) -> bool:
    """Tells whether a module is of torchvision's class of this name, and of no subclass."""
    return type(module).__name__ == name and type(module).__module__ == MODULE


def _attention(host: Any, index: int) -> Any:
    """Finds the `nn.MultiheadAttention` of a block."""
    return host.encoder.layers[index].self_attention


def _grid_side(host: Any) -> int:
    """Counts the rows, and so the columns, of the patch grid."""
    return int(host.image_size) // int(host.patch_size)


def _block_shape(block: Any) -> BlockShape:
    """Counts what one block costs."""
    attention = block.self_attention
    width = int(attention.embed_dim)
    return BlockShape(
        width=width,
        q=width * width,
        k=width * width,
        v=width * width,
        query_width=width,
        value_width=width,
        key_width=int(attention.head_dim),
        out=width * width,
        feed=linear_macs(block.mlp),
        score=width,
    )


def _stem_recipe(stem: nn.Module) -> list[dict[str, Any]] | None:
    """Lists the layers of a convolutional stem as plain data; none for a plain patch embedding.

    Returns None if the stem has a layer that `rebuild` would not make again.
    """
    if type(stem) is nn.Conv2d:
        return []
    layers: list[dict[str, Any]] = []
    for layer in list(stem.children())[:-1]:  # the last one only sets the width
        parts: list[Any] = list(layer.children())
        if len(parts) != 3 or not isinstance(parts[0], nn.Conv2d):
            return None
        conv, norm, activation = parts
        known = type(norm).__name__ in STEM_NORMS and type(activation).__name__ in STEM_ACTIVATIONS
        if not known or conv.kernel_size[0] != conv.kernel_size[1]:
            return None
        layers.append(
            {
                "out_channels": conv.out_channels,
                "kernel_size": conv.kernel_size[0],
                "stride": conv.stride[0],
                "norm": type(norm).__name__,
                "activation": type(activation).__name__,
            }
        )
    return layers
