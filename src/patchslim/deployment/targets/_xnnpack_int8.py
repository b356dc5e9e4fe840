"""How a program of ExecuTorch becomes int8: each layer's weights once, activations as they come.

The range of each row of activations is found while the program runs, as XNNPACK does it, so that
no images are needed to find ranges: those that are given judge the result. What comes out of a
layer is in float32, and so are attention and decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from patchslim.deployment.graph import Graph, quietly
from patchslim.deployment.quantiser import Quantiser

LINEAR = torch.ops.aten.linear.default
METHOD = "model.method"  # where the layers of a method are, which compute what it decides


class XnnpackQuantiser(Quantiser):
    """Dynamic quantisation of linear layers by torchao."""

    recipes: ClassVar[Sequence[str]] = ("ranges found for each row",)
    needs: ClassVar[Mapping[str, tuple[int, ...]]] = {"torchao": (0, 16)}
    extra = "executorch"

    def __init__(self, lower: Callable[[Graph, Callable[[ExportedProgram], Any]], Any]) -> None:
        self._lower = lower

    def quantise(self, converted: Any, graph: Graph, images: Sequence[Tensor], recipe: str) -> Any:
        """The lowered graph, made anew: what is lowered already can't be quantised."""
        return self._lower(graph, lambda program: round_layers(program, images[0]))

    def list_places(self, quantised: Any) -> list[str]:
        """None: a layer in float32 would have to be lowered anew to be judged, at seconds each."""
        return []

    def leave_float(self, quantised: Any, places: Sequence[str]) -> Any:
        """The same, since there are no places."""
        return quantised


def round_layers(program: ExportedProgram, images: Tensor) -> ExportedProgram:
    """The program with linear layers in int8, but for those of the method."""
    from torchao.quantization.pt2e.constant_fold import constant_fold
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    def make() -> ExportedProgram:
        module = program.module().requires_grad_(False)
        with torch.no_grad():
            # A layer whose weights are a part of others' has its own from here on.
            constant_fold(module)
            prepared = prepare_pt2e(module, _make_quantizer())
            prepared(images)
            rounded = convert_pt2e(prepared)
            return torch.export.export(rounded, (images,), strict=False)

    return quietly(make)


def _make_quantizer() -> Any:
    """What marks the layers for torchao.

    ExecuTorch's own quantizer would also turn whole numbers that are added to an index into floats.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)

    class LinearLayers(Quantizer):  # type: ignore[misc]
        """Marks inputs and weights of linear layers."""

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                if node.target is LINEAR and not _is_of_method(node):
                    inputs, weights = node.args[:2]
                    node.meta["quantization_annotation"] = QuantizationAnnotation(
                        input_qspec_map={
                            inputs: config.input_activation,
                            weights: config.weight,
                        },
                        _annotated=True,
                    )
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            """Accepts whatever was marked."""

    return LinearLayers()


def _is_of_method(node: torch.fx.Node) -> bool:
    """Tells whether a layer belongs to the method, and not to the host."""
    modules = node.meta.get("nn_module_stack", {}).values()
    return any(METHOD in path for path, _ in modules)
