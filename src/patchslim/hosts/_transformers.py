"""What the vision towers of transformers 5 have in common, whatever their parts are called.

Layers, options, outputs, costs and recipes. A family says by its `layouts` where the parts are, and
what it does before the first layer and after the last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchslim.errors import WrongInput
from patchslim.hosts._adapter import STATES, Adapter, HostFacts, Part
from patchslim.hosts._macs import linear_macs
from patchslim.hosts._transformers_backbone import (
    is_backbone,
    lay_out_map,
    returned_stages,
    returns_last_stage,
)
from patchslim.hosts._transformers_layout import (
    Layout,
    apply_parts,
    attention_dropout,
    attention_scale,
    find_part,
    head_width,
    parts_macs,
    project_parts,
    projection_sizes,
)
from patchslim.hosts._transformers_outputs import add_states, output_class
from patchslim.hosts._transformers_recipe import describe_host, rebuild_host
from patchslim.tokens.shapes import BlockShape, HostShape
from patchslim.tokens.tokens import Tokens

# What a configuration or a call may ask for and a reduced sequence cannot give.
HIDDEN = "output_hidden_states"
UNSUPPORTED_OUTPUTS = ("output_attentions", HIDDEN)
CLASSIFIERS = ("classifier", "cls_classifier", "distillation_classifier")
# What is compared of an output, whichever of these it has first.
MAPS = "feature_maps"
COMPARED = ("logits", "image_embeds", MAPS, "last_hidden_state")
# The option in which a backbone that returns earlier stages asks for the states between layers.
STAGES = "stages"
# What a call may say of the loss beside the labels: how many items share it, as Trainer says.
LOSS_OPTIONS = ("num_items_in_batch",)


class TransformersHost(Adapter, ABC):
    """A vision tower of transformers 5, whose layers are laid out as one of `layouts` says.

    Attributes:
        layouts: the layout of each kind, by the name of its module in `transformers.models`.
        classifier_output: the class of what a classifier returns.
    """

    classifier_output: ClassVar[str] = "ImageClassifierOutput"
    layouts: ClassVar[Mapping[str, Layout]]
    host_attributes: ClassVar[frozenset[str]] = frozenset(
        """config device dtype num_labels main_input_name name_or_path can_generate
        generation_config base_model_prefix input_modalities is_gradient_checkpointing
        gradient_checkpointing_enable gradient_checkpointing_disable is_activation_checkpointing
        activation_checkpointing_enable activation_checkpointing_disable get_input_embeddings
        loss_function framework forward_with_filtered_kwargs has_attentions backbone_type channels
        num_features stage_names out_features out_indices patch_size""".split()
    )

    # ------------------------------------------------------------------------ what a family says

    @abstractmethod
    def prefix(self, host: Any) -> int:
        """Counts the rows before the patches."""

    @abstractmethod
    def rows_read(self, host: Any) -> int | None:
        """Counts the leading rows that the head reads; None where it may read all."""

    @abstractmethod
    def pool(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor | None:
        """Computes the `pooler_output` of a bare model, if it has one.

        Args:
            host: the model.
            tokens: the tokens after the last layer.
            rows: what it returns as `last_hidden_state`.
        """

    def read(self, host: Any, tokens: Tokens) -> Tensor:
        """Computes what the classifier of an image classifier reads (B, C), if there are any."""
        raise NotImplementedError(f"{self.family} has no classifier.")

    def features(self, host: Any, tokens: Tokens) -> Any:
        """Makes the output of a bare model, its rows in the dense order."""
        rows = self.norm(host, tokens.dense_features())
        pooled = self.pool(host, tokens, rows)
        made = output_class(host, "BaseModelOutputWithPooling")
        return made(last_hidden_state=rows, pooler_output=pooled)

    def feature_maps(self, host: Any, tokens: Tokens, stages: Mapping[str, Tensor]) -> Any:
        """Makes the output of a backbone.

        Args:
            host: the backbone.
            tokens: the tokens after the last layer.
            stages: the rows after each stage that it returns, in the dense order, by its name.
        """
        maps = tuple(self.feature_map(host, tokens, rows) for rows in stages.values())
        return output_class(host, "BackboneOutput")(feature_maps=maps)

    def feature_map(self, host: Any, tokens: Tokens, rows: Tensor) -> Tensor:
        """Norms the rows of a stage and lays them out as the backbone is asked to."""
        if host.config.apply_layernorm:
            rows = self.norm(host, rows)
        return lay_out_map(tokens, rows) if host.config.reshape_hidden_states else rows

    def lay_out(self, rows: Tensor) -> Tensor:
        """Returns rows (B, N, C) in the shape in which the host returns them."""
        return rows

    def gives_states(self, host: Any) -> bool:
        """Tells whether a call may ask for `output_hidden_states`."""
        return True

    def asks_for_states(self, options: Mapping[str, Any]) -> bool:
        """Tells whether a call needs the sequence before and after every layer."""
        return bool(options.get(HIDDEN) or options.get(STAGES))

    def returns_rows(self, host: Any) -> bool:
        """Tells whether it returns its sequence, as a bare model or a backbone."""
        return type(host).__name__.endswith("Model") or is_backbone(host)

    def head_macs(self, host: Any) -> tuple[int, int]:
        """Counts the multiply-adds of the head: a fixed number, and one for each row left."""
        names = ("pooler",) if self.returns_rows(host) else CLASSIFIERS
        return sum(linear_macs(getattr(host, name, None)) for name in names), 0

    def score_macs(self, host: Any, inner: int) -> dict[str, int]:
        """Counts the multiply-adds of scoring rows by one query."""
        return {"score": inner}

    def has_relative_bias(self, host: Any) -> bool:
        """Tells whether attention adds a bias by relative position."""
        return False

    def has_query_pooling(self, host: Any) -> bool:
        """Tells whether a pooling query can stand in for a class token."""
        return False

    # ------------------------------------------------------------------- what follows from layouts

    def serves(self, host: nn.Module) -> bool:
        """Accepts all models of the kinds in `layouts`, whatever their task."""
        return self._kind(host) is not None

    def layout(self, host: nn.Module) -> Layout:
        """Finds where this host keeps its parts."""
        kind = self._kind(host)
        assert kind is not None  # noqa: S101 (for type checkers)
        return self.layouts[kind]

    def unsupported_reason(self, host: Any) -> str | None:
        """Refuses other tasks than features and classification, and outputs of the dense shape."""
        names, own = self.layout(host).classes, type(host).__name__
        if own not in names:
            return f"{own} is not among the supported tasks: {', '.join(names)}."
        for name in UNSUPPORTED_OUTPUTS:
            if getattr(host.config, name, False) and not (
                self.gives_states(host) and name == HIDDEN
            ):
                return (
                    f"its configuration asks for {name}, and a reduced sequence has none of the "
                    f"dense shape. Set model.config.{name} = False."
                )
        return None

    def describe(self, host: Any) -> HostFacts:
        """Reads what the loop must know off the configuration and the layers."""
        layout, layers = self.layout(host), self.blocks(host)
        attentions = [find_part(layer, layout.attention) for layer in layers]
        kept = [getattr(layer, "gradient_checkpointing", False) for layer in layers]
        prefix = self.prefix(host)
        return HostFacts(
            prefix=prefix,
            image_shape=self._image_shape(host),
            scales=tuple([attention_scale(each) for each in attentions]),
            dropouts=tuple([attention_dropout(each) for each in attentions]),
            has_class_token=prefix > 0,
            rows_read=self.rows_read(host),
            has_relative_bias=self.has_relative_bias(host),
            returns_rows=self.returns_rows(host),
            has_query_pooling=self.has_query_pooling(host),
            recomputes_activations=any(kept),
        )

    def size_mismatch(
        self, host: Any, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Refuses other sizes than the host's, unless its positions are interpolated."""
        layout, (height, width) = self.layout(host), self._image_shape(host)[-2:]
        if self.takes_any_size(host) or options.get("interpolate_pos_encoding"):
            patch = _pair(self.base(host).config.patch_size)
            small = size[0] < patch[0] or size[1] < patch[1]
            return f"a patch alone has {patch[0]}x{patch[1]} pixels." if small else None
        if size == (height, width):
            return None
        cure = ", or any with interpolate_pos_encoding=True" if layout.interpolates else ""
        return f"this host takes {height}x{width} pixels{cure}."

    def takes_any_size(self, host: Any) -> bool:
        """Tells whether images of any size fit without an option of the call."""
        return self.layout(host).any_size

    def options(self, host: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """Accepts labels and their loss, interpolation of positions, the kind of return value."""
        given = {
            **{name: getattr(host.config, name, False) for name in UNSUPPORTED_OUTPUTS},
            **given,
        }
        honoured = {"return_dict", "labels", *LOSS_OPTIONS}
        if self.layout(host).interpolates:
            honoured.add("interpolate_pos_encoding")
        if self.gives_states(host):
            honoured.add(HIDDEN)
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
        kept = {name: value for name, value in given.items() if name in honoured}
        if is_backbone(host) and not returns_last_stage(host):
            kept[STAGES] = True
        return kept

    def base(self, host: Any) -> Any:
        """Finds the bare model inside a model with a head."""
        inner = self.layout(host).inner
        return getattr(host, inner, host) if inner else host

    def blocks(self, host: Any) -> nn.ModuleList:
        """Lists the transformer layers."""
        layers: nn.ModuleList = find_part(self.base(host), self.layout(host).layers)
        return layers

    def embed(self, host: Any, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Calls the host's own embeddings, and its norm before the first layer."""
        base, projection = self.base(host), self._patches(host)
        images = images.to(projection.weight.dtype)
        extra = {key: options[key] for key in ("interpolate_pos_encoding",) if options.get(key)}
        x = base.embeddings(images, **extra)
        rows = x if isinstance(x, Tensor) else x[0]
        first = self.layout(host).first
        rows = find_part(base, first)(rows) if first else rows
        return Tokens(x=rows, prefix=self.prefix(host), grid=self._grid(host, images.shape[-2:]))

    def embedding(self, host: Any, images: Tensor) -> Tensor:
        """Computes the patch embedding alone."""
        layer = self._patches(host)
        projected: Tensor = layer(images.to(layer.weight.dtype))
        return projected.flatten(2).transpose(1, 2)

    def project(self, host: Any, index: int, tokens: Tokens, part: Part) -> tuple[Tensor, ...]:
        """Applies the layer's own norm and its three projections."""
        layout, layer = self.layout(host), self.blocks(host)[index]
        attention = find_part(layer, layout.attention)
        y = find_part(layer, layout.norm)(tokens.x)
        every = project_parts(layout, attention, y, part)
        width = head_width(attention)
        return tuple([each.unflatten(2, (-1, width)).transpose(1, 2) for each in every])

    def mix(self, host: Any, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Applies output projection, LayerScale, dropout or drop path, and residual."""
        joined = attended.transpose(1, 2).flatten(2)
        out = apply_parts(self.blocks(host)[index], self.layout(host).mix, joined)
        return out + queries.x

    def feed(self, host: Any, index: int, x: Tensor) -> Tensor:
        """Applies feed-forward, LayerScale, dropout or drop path, and residual."""
        return apply_parts(self.blocks(host)[index], self.layout(host).feed, x) + x

    def norm(self, host: Any, x: Tensor) -> Tensor:
        """Applies the final norm."""
        normed: Tensor = find_part(self.base(host), self.layout(host).final)(x)
        return normed

    def head(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Fills the host's own output class from the tokens that are left."""
        if is_backbone(host):
            output = self.feature_maps(host, tokens, returned_stages(host, tokens, options))
        elif self.returns_rows(host):
            output = self.features(host, tokens)
        else:
            output = self.classify(host, tokens, options)
        if options.get(HIDDEN):
            output = add_states(output, tuple(self.lay_out(each) for each in options[STATES]))
        wanted = options.get("return_dict")
        as_tuple = wanted is False or (wanted is None and not host.config.return_dict)
        return output.to_tuple() if as_tuple else output

    def classify(self, host: Any, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Makes the output of a classifier, with its loss if labels are given."""
        logits, labels, loss = host.classifier(self.read(host, tokens)), options.get("labels"), None
        if labels is not None:
            told = {name: options[name] for name in LOSS_OPTIONS if name in options}
            loss = host.loss_function(labels, logits, host.config, **told)
        return output_class(host, self.classifier_output)(loss=loss, logits=logits)

    def logits(self, output: Any) -> Tensor:
        """Returns the logits, the image's embedding, or the features."""
        if isinstance(output, tuple):
            maps = isinstance(output[0], tuple)
            first: Tensor = torch.cat(output[0], dim=1) if maps else output[0]
            return first
        name = next(name for name in COMPARED if name in output)
        tensor: Tensor = torch.cat([*output[name]], dim=1) if name == MAPS else output[name]
        return tensor

    def recipe(self, host: Any) -> dict[str, Any] | None:
        """Notes class and configuration, and which optional parts a bare model has."""
        return describe_host(host)

    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """Builds the class from its configuration, with random weights."""
        return rebuild_host(recipe, self.layouts)

    def shape(self, host: Any, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs, read off the host's own layers."""
        grid = self._grid(host, image_size or self._image_shape(host)[-2:])
        head, head_row = self.head_macs(host)
        prefix = self.prefix(host)
        return HostShape(
            grid=grid,
            prefix=prefix,
            embed=grid[0] * grid[1] * int(self._patches(host).weight.numel()),
            blocks=tuple(self._block_shape(host, layer) for layer in self.blocks(host)),
            head=head,
            head_row=head_row,
            read=self.rows_read(host),
        )

    def _kind(self, host: nn.Module) -> str | None:
        """Finds the kind of a host, by the module its class comes from."""
        for cls in type(host).__mro__:
            parts = cls.__module__.split(".")
            if parts[:2] == ["transformers", "models"] and parts[2] in self.layouts:
                return parts[2]
        return None

    def _patches(self, host: Any) -> Any:
        """Finds the convolution that embeds patches."""
        return find_part(self.base(host), self.layout(host).patches)

    def _image_shape(self, host: Any) -> tuple[int, ...]:
        """Reads channels, height and width from the configuration."""
        config = self.base(host).config
        size = _pair(config.image_size)
        return int(getattr(config, "num_channels", 3)), size[0], size[1]

    def _grid(self, host: Any, size: Any) -> tuple[int, int]:
        """Computes the grid of images of this size."""
        patch = _pair(self.base(host).config.patch_size)
        return size[0] // patch[0], size[1] // patch[1]

    def _block_shape(self, host: Any, layer: Any) -> BlockShape:
        """Counts costs, read off one layer's own projections."""
        layout = self.layout(host)
        attention = find_part(layer, layout.attention)
        width, inner, (q, k, v) = projection_sizes(layout, attention)
        return BlockShape(
            width=width,
            q=q,
            k=k,
            v=v,
            query_width=inner,
            value_width=inner,
            key_width=head_width(attention),
            out=parts_macs(layer, layout.mix),
            feed=parts_macs(layer, layout.feed),
            **self.score_macs(host, inner),
        )


def _pair(size: Any) -> tuple[int, int]:
    """Returns height and width, given a number or a pair."""
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
