"""Hugging Face `ViT`, `DeiT`, `DINOv2` and `DINOv2 with registers` of transformers 5.

Bare models, image classifiers, and DeiT's classifier with a teacher. Outputs are the host's own
output classes; attention maps and hidden states of a reduced sequence are not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchslim.errors import WrongInput
from patchslim.hosts._adapter import Adapter, HostFacts, Part
from patchslim.hosts._libraries.transformers import check_config
from patchslim.hosts._macs import linear_macs
from patchslim.tokens.shapes import BlockShape, HostShape
from patchslim.tokens.tokens import Tokens

CLASS_PREFIXES = {
    "vit": "ViT",
    "deit": "DeiT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}
# What a configuration or a call may ask for and a reduced sequence cannot give.
UNSUPPORTED_OUTPUTS = ("output_attentions", "output_hidden_states")
TASKS = ("Model", "ForImageClassification", "ForImageClassificationWithTeacher")


class TransformersVit(Adapter):
    """Four plain vision transformers of transformers 5 that share one layout."""

    family: ClassVar[str] = "transformers ViT / DeiT / DINOv2"
    host_attributes: ClassVar[frozenset[str]] = frozenset(
        """config device dtype num_labels main_input_name name_or_path can_generate
        generation_config base_model_prefix input_modalities is_gradient_checkpointing
        gradient_checkpointing_enable gradient_checkpointing_disable is_activation_checkpointing
        activation_checkpointing_enable activation_checkpointing_disable get_input_embeddings
        loss_function framework""".split()
    )

    def serves(self, host: nn.Module) -> bool:
        """Accepts models of the four families, whatever their task."""
        return _model_type(host) is not None

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses other tasks than features and classification, and outputs of the dense shape."""
        kind = _model_type(host)
        names = [f"{CLASS_PREFIXES[kind]}{task}" for task in TASKS] if kind else []
        if type(host).__name__ not in names:
            return f"{type(host).__name__} is not among the supported tasks: {', '.join(names)}."
        for name in UNSUPPORTED_OUTPUTS:
            if getattr(host.config, name, False):
                return (
                    f"its configuration asks for {name}, and a reduced sequence has none of the "
                    f"dense shape. Set model.config.{name} = False."
                )
        return None

    def describe(self, host: Any) -> HostFacts:
        """Reads what the loop must know off the configuration and the layers."""
        layers = self.blocks(host)
        attentions: list[Any] = [layer.attention for layer in layers]
        kept = [getattr(layer, "gradient_checkpointing", False) for layer in layers]
        return HostFacts(
            prefix=_prefix(host),
            image_shape=_image_shape(host),
            scales=tuple([float(each.scaling) for each in attentions]),
            dropouts=tuple([float(a.attention_dropout) if a.training else 0.0 for a in attentions]),
            has_class_token=True,
            rows_read=_rows_read(host),
            returns_rows=_returns_rows(host),
            recomputes_activations=any(kept),
        )

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses other sizes for ViT and DeiT unless they interpolate; DINOv2 takes any."""
        _, height, width = _image_shape(host)
        free = (_model_type(host) or "").startswith("dinov2") or options.get(
            "interpolate_pos_encoding"
        )
        if free or size == (height, width):
            return None
        return (
            f"this host takes {height}x{width} pixels, or any with interpolate_pos_encoding=True."
        )

    def options(self, host: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Accepts labels, interpolation of positions and the kind of return value."""
        given = {
            **{name: getattr(host.config, name, False) for name in UNSUPPORTED_OUTPUTS},
            **given,
        }
        honoured = {"return_dict", "labels"}
        if not (_model_type(host) or "").startswith("dinov2"):
            honoured.add("interpolate_pos_encoding")
        unused = {
            name
            for name, value in given.items()
            if name not in honoured and value is not None and value is not False
        }
        if unused:
            raise WrongInput(
                f"A slimmed {type(host).__name__} cannot honour {sorted(unused)}; it takes "
                f"pixel_values and {sorted(honoured)}."
            )
        return {name: value for name, value in given.items() if name in honoured}

    def blocks(self, host: Any) -> nn.ModuleList:
        """Lists the transformer layers."""
        base = _base_model(host)
        layers: nn.ModuleList = base.encoder.layer if _is_dinov2(host) else base.layers
        return layers

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embeddings."""
        embeddings = _base_model(host).embeddings
        images = images.to(embeddings.patch_embeddings.projection.weight.dtype)
        extra = {key: options[key] for key in ("interpolate_pos_encoding",) if options.get(key)}
        patch = _pair(host.config.patch_size)
        grid = (images.shape[2] // patch[0], images.shape[3] // patch[1])
        return Tokens(x=embeddings(images, **extra), prefix=_prefix(host), grid=grid)

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        layer = _base_model(host).embeddings.patch_embeddings.projection
        projected: Tensor = layer(images.to(layer.weight.dtype))
        return projected.flatten(2).transpose(1, 2)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies the layer's own norm and its three projections."""
        layer: Any = self.blocks(host)[index]
        attention = layer.attention
        y = layer.norm1(tokens.x) if _is_dinov2(host) else layer.layernorm_before(tokens.x)
        layers = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        shape = (-1, attention.head_dim)
        return tuple(layers[name](y).unflatten(2, shape).transpose(1, 2) for name in part)

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies output projection, LayerScale, dropout or drop path, and residual."""
        layer: Any = self.blocks(host)[index]
        out = layer.attention.o_proj(attended.transpose(1, 2).flatten(2))
        out = layer.drop_path(layer.layer_scale1(out)) if _is_dinov2(host) else layer.dropout(out)
        mixed: Tensor = out + queries.x
        return mixed

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies feed-forward, LayerScale, dropout or drop path, and residual."""
        layer: Any = self.blocks(host)[index]
        if _is_dinov2(host):
            out = layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(x))))
        else:
            out = layer.dropout(layer.mlp(layer.layernorm_after(x)))
        fed: Tensor = out + x
        return fed

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm."""
        normed: Tensor = _base_model(host).layernorm(x)
        return normed

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Fills the host's own output class from the tokens that are left."""
        if _returns_rows(host):
            output = self._features_output(host, tokens)
        else:
            output = self._classifier_output(host, tokens, options.get("labels"))
        wanted = options.get("return_dict")
        as_tuple = wanted is False or (wanted is None and not host.config.return_dict)
        return output.to_tuple() if as_tuple else output

    def logits(self, output: Any) -> Tensor:
        """Returns the logits, or the last hidden state of a bare model."""
        if isinstance(output, tuple):
            first: Tensor = output[0]
            return first
        tensor: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
        return tensor

    def recipe(self, host: Any) -> dict[str, Any] | None:
        """Notes class and configuration, and which optional parts a bare model has."""
        recipe = {"class": type(host).__name__, "config": host.config.to_diff_dict()}
        if _returns_rows(host) and not _is_dinov2(host):
            recipe["pooler"] = host.pooler is not None
            recipe["mask_token"] = host.embeddings.mask_token is not None
        return recipe

    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """Builds the class from its configuration, with random weights."""
        import transformers

        known = {f"{family}{task}" for family in CLASS_PREFIXES.values() for task in TASKS}
        if recipe["class"] not in known:
            raise WrongInput(
                f"{recipe['class']!r} is not a model class that this family can rebuild."
            )
        host_class: Any = getattr(transformers, recipe["class"])
        parts = {"pooler": "add_pooling_layer", "mask_token": "use_mask_token"}
        given = {argument: bool(recipe[part]) for part, argument in parts.items() if part in recipe}
        check_config(recipe["config"], "the recipe of the host")
        config = host_class.config_class.from_dict(dict(recipe["config"]))
        host: nn.Module = host_class(config, **given)
        return host

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs, read off the host's own layers."""
        height, width = image_size or _image_shape(host)[1:]
        patch = _pair(host.config.patch_size)
        grid = (height // patch[0], width // patch[1])
        projection = _base_model(host).embeddings.patch_embeddings.projection
        head = [getattr(host, name, None) for name in CLASSIFIERS]
        if _returns_rows(host):
            head = [getattr(host, "pooler", None)]
        return HostShape(
            grid=grid,
            prefix=_prefix(host),
            embed=grid[0] * grid[1] * int(projection.weight.numel()),
            blocks=tuple(_block_shape(layer) for layer in self.blocks(host)),
            head=sum(linear_macs(part) for part in head if part is not None),
            read=_rows_read(host),
        )

    def _features_output(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of a bare model, its rows in the dense order."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        x = self.norm(host, tokens.dense_features())
        pooled: Tensor | None = x[:, 0]
        if not _is_dinov2(host):
            pooled = None if host.pooler is None else host.pooler(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)

    def _classifier_output(self, host: Any, tokens: Tokens, labels: Tensor | None) -> Any:
        """Makes the output of a classifier, with its loss if labels are given."""
        x = self.norm(host, tokens.x)
        if type(host).__name__.endswith("WithTeacher"):
            return _distilled_output(host, x)
        from transformers.modeling_outputs import ImageClassifierOutput

        read = x[:, 0]
        if _is_dinov2(host):
            weight = tokens.sizes() if tokens.alive is None else tokens.sizes() * tokens.alive
            total = weight.sum(dim=1, keepdim=True).clamp(min=1)  # the mean of nothing is 0
            share = (weight / total).to(x.dtype).unsqueeze(2)
            read = torch.cat([read, (x[:, tokens.prefix :] * share).sum(dim=1)], dim=1)
        logits = host.classifier(read)
        loss = None if labels is None else host.loss_function(labels, logits, host.config)
        return ImageClassifierOutput(loss=loss, logits=logits)


CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier")


def _distilled_output(host: Any, x: Tensor) -> Any:
    """Averages DeiT's two heads, in the output class of its module."""
    import sys

    module: Any = sys.modules[type(host).__module__]
    of_class, distilled = host.cls_classifier(x[:, 0]), host.distillation_classifier(x[:, 1])
    return module.DeiTForImageClassificationWithTeacherOutput(
        logits=(of_class + distilled) / 2, cls_logits=of_class, distillation_logits=distilled
    )


def _model_type(host: nn.Module) -> str | None:
    """Finds the family of a host, by the module its class comes from."""
    for cls in type(host).__mro__:
        parts = cls.__module__.split(".")
        if parts[:2] == ["transformers", "models"] and parts[2] in CLASS_PREFIXES:
            return parts[2]
    return None


def _prefix(host: Any) -> int:
    """Counts class token, distillation token and registers."""
    kind = _model_type(host)
    if kind == "dinov2_with_registers":
        return 1 + int(host.config.num_register_tokens)
    return 2 if kind == "deit" else 1


def _rows_read(host: Any) -> int | None:
    """Counts the rows that the head reads: 1 or 2, or None for DINOv2, which averages patches."""
    if type(host).__name__.endswith("WithTeacher"):
        return 2
    is_classifier = type(host).__name__.endswith("ForImageClassification")
    return 1 if is_classifier and _model_type(host) in ("vit", "deit") else None


def _returns_rows(host: Any) -> bool:
    """Tells whether it is a bare model, which returns its last hidden state."""
    return type(host).__name__.endswith("Model")


def _image_shape(host: Any) -> tuple[int, int, int]:
    """Reads channels, height and width from the configuration."""
    size = _pair(host.config.image_size)
    return int(host.config.num_channels), size[0], size[1]


def _is_dinov2(host: nn.Module) -> bool:
    """Tells whether the host has DINOv2's layer layout."""
    return (_model_type(host) or "").startswith("dinov2")


def _base_model(host: Any) -> Any:
    """Finds the bare model inside a model with a head."""
    return getattr(host, host.base_model_prefix, host)


def _pair(size: Any) -> tuple[int, int]:
    """Returns height and width, given a number or a pair."""
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _block_shape(layer: Any) -> BlockShape:
    """Counts costs, read off one layer's own projections."""
    attention = layer.attention
    inner = int(attention.q_proj.out_features)
    return BlockShape(
        width=int(attention.q_proj.in_features),
        q=linear_macs(attention.q_proj),
        k=linear_macs(attention.k_proj),
        v=linear_macs(attention.v_proj),
        query_width=inner,
        value_width=inner,
        key_width=int(attention.head_dim),
        out=linear_macs(attention.o_proj),
        feed=linear_macs(layer.mlp),
        score=inner,
    )
