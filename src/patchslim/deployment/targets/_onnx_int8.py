"""How an ONNX file becomes int8: with ONNX Runtime's own tools.

What multiplies with weights is rounded to eight bits: weights for each channel, activations for
each tensor. Attention and decisions multiply with no weights, and stay in float32.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from patchslim.deployment.graph import INPUT, Graph, quietly
from patchslim.deployment.quantiser import Quantiser

WEIGHTED = ("MatMul", "Gemm", "Conv")
ROUNDS, WIDENS = "QuantizeLinear", "DequantizeLinear"


class OrtQuantiser(Quantiser):
    """Static quantisation by ONNX Runtime."""

    # An outlier widens the first range to hold it; the other is the mean over images.
    recipes: ClassVar[Sequence[str]] = ("widest range", "mean range")

    def quantise(self, converted: Any, graph: Graph, images: Sequence[Tensor], recipe: str) -> Any:
        """The model with pairs of nodes that round activations and weights."""
        import onnx
        from onnxruntime import quantization

        constants = {each.name for each in converted.graph.initializer}
        weighted = [
            node.name
            for node in converted.graph.node
            if node.op_type in WEIGHTED and constants.intersection(node.input)
        ]

        class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
            """The images, one batch a call."""

            def __init__(self) -> None:
                self.batches: Iterator[Tensor] = iter(images)

            def get_next(self) -> Mapping[str, Any] | None:
                batch = next(self.batches, None)
                return None if batch is None else {INPUT: batch.numpy()}

        with tempfile.TemporaryDirectory() as folder:
            whole, made = Path(folder) / "whole.onnx", Path(folder) / "int8.onnx"
            onnx.save(converted, whole)
            quietly(
                lambda: quantization.quantize_static(
                    whole,
                    made,
                    Images(),
                    quant_format=quantization.QuantFormat.QDQ,
                    op_types_to_quantize=[*WEIGHTED],
                    nodes_to_quantize=weighted,
                    per_channel=True,
                    activation_type=quantization.QuantType.QUInt8,
                    weight_type=quantization.QuantType.QInt8,
                    extra_options={"CalibMovingAverage": recipe == "mean range"},
                )
            )
            return onnx.load(made)

    def list_places(self, quantised: Any) -> list[str]:
        """The tensors that are rounded activations."""
        return [*_rounded(quantised)]

    def leave_float(self, quantised: Any, places: Sequence[str]) -> Any:
        """A copy in which what reads these tensors reads them before they are rounded."""
        made = copy.deepcopy(quantised)
        rounded = _rounded(made)
        for node in made.graph.node:
            for number, name in enumerate(node.input):
                if name in places:
                    node.input[number] = rounded[name]
        return made


def _rounded(model: Any) -> dict[str, str]:
    """The tensors that are rounded activations, and what they are before."""
    before = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == ROUNDS}
    return {
        node.output[0]: before[node.input[0]]
        for node in model.graph.node
        if node.op_type == WIDENS and node.input[0] in before
    }
