"""`Layout`: where the towers of transformers 5 keep their parts, as names of attributes.

The towers differ in what their parts are called and in what stands between a part and the residual
sum, and in little else. So a layout is data, and the steps of a layer are written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from patchslim.hosts._adapter import Part
from patchslim.hosts._columns import QKV_COLUMNS, linear_columns
from patchslim.hosts._macs import linear_macs


@dataclass(frozen=True)
class Layout:
    """Names of the parts of one kind of model. A name may have dots: "attention.o_proj".

    Attributes:
        classes: the names of the classes that are served.
        inner: what a model with a head calls the bare model in it.
        layers: the layers, from the bare model.
        patches: the convolution that embeds patches, from the bare model.
        first: the norm before the first layer, from the bare model, if there is one.
        final: the last norm, from the bare model.
        attention: the module that attends, from a layer.
        projections: its layers for queries, keys and values, from the module that attends.
        fused: one layer for all three instead, from the module that attends.
        norms: what follows a projection, before heads are split, by "q", "k" or "v".
        norm: the norm before attention, from a layer.
        mix: what is applied to attended values, in order, up to the residual sum, from a layer.
        feed: the same for the feed-forward, with the norm before it.
        interpolates: whether a call takes `interpolate_pos_encoding`.
        any_size: whether images of any size fit without that.
    """

    classes: tuple[str, ...]
    norm: str
    mix: tuple[str, ...]
    feed: tuple[str, ...]
    inner: str = ""
    layers: str = "layers"
    patches: str = "embeddings.patch_embeddings.projection"
    first: str = ""
    final: str = "layernorm"
    attention: str = "attention"
    projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    fused: str = ""
    norms: Mapping[str, str] = field(default_factory=dict)
    interpolates: bool = False
    any_size: bool = False

    def project_names(self, part: str) -> tuple[str, ...]:
        """Lists the names of the layers for the parts ("qk") of a projection."""
        return tuple([self.projections["qkv".index(each)] for each in part])


def find_part(module: Any, name: str) -> Any:
    """Finds the attribute of this name, which may have dots."""
    for each in name.split("."):
        module = getattr(module, each)
    return module


def apply_parts(layer: Any, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Applies these parts of a layer in order: modules are called, factors are multiplied."""
    for name in names:
        part = find_part(layer, name)
        if isinstance(part, nn.Module):
            x = part(x)
        elif part is not None:  # a LayerScale kept as a plain parameter, or the number 1
            x = part * x
    return x


def parts_macs(layer: Any, names: tuple[str, ...]) -> int:
    """Counts the multiply-adds a row of the modules among these parts."""
    parts = [find_part(layer, name) for name in names]
    return sum(linear_macs(part) for part in parts if isinstance(part, nn.Module))


def project_parts(layout: Layout, attention: Any, y: Tensor, part: Part) -> list[Tensor]:
    """Computes queries, keys and values, as `part` names them, before heads are split."""
    if layout.fused:
        layer = getattr(attention, layout.fused)
        third, columns = int(layer.out_features) // 3, QKV_COLUMNS[part]
        whole = linear_columns(layer, y, columns.start * third, columns.stop * third)
        return list(whole.chunk(len(part), dim=2))
    names = layout.project_names(part)
    every = [getattr(attention, name)(y) for name in names]
    for place, name in enumerate(part):
        if name in layout.norms:
            every[place] = getattr(attention, layout.norms[name])(every[place])
    return every


def projection_sizes(layout: Layout, attention: Any) -> tuple[int, int, list[int]]:
    """Counts channels that enter and leave a projection, and multiply-adds a row of each."""
    if layout.fused:
        layer = getattr(attention, layout.fused)
        inner = int(layer.out_features) // 3
        return int(layer.in_features), inner, [linear_macs(layer) // 3] * 3
    layers = [getattr(attention, name) for name in layout.projections]
    costs = [linear_macs(layer) for layer in layers]
    return int(layers[0].in_features), int(layers[0].out_features), costs


def head_width(attention: Any) -> int:
    """Reads the channels of one head."""
    width = getattr(attention, "head_dim", None)
    return int(attention.attention_head_size if width is None else width)


def attention_scale(attention: Any) -> float:
    """Reads the factor on the query-key product."""
    scale = getattr(attention, "scaling", None) or getattr(attention, "scale", None)
    return float(head_width(attention) ** -0.5 if scale is None else scale)


def attention_dropout(attention: Any) -> float:
    """Reads the attention dropout that is in force now."""
    if not attention.training:
        return 0.0
    for name in ("attention_dropout", "dropout_prob", "dropout"):
        dropout = getattr(attention, name, None)
        if dropout is not None:
            return float(getattr(dropout, "p", dropout))
    return 0.0
