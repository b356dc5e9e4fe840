"""How a model of OpenVINO gets a lower precision, and how its decisions do not.

A graph decides where numbers become an index or a truth value. Everything that such a place is
computed from is kept in float32, up to the weights and to the stream of tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
from torch import Tensor

from patchslim.deployment.graph import Graph, quietly
from patchslim.deployment.quantiser import Quantiser
from patchslim.deployment.targets._openvino_marks import keep_results, settle_nodes, stop_scales

DECIDES = "decides/"  # the names of such nodes begin with this
ADDS = "adds/"  # and of those that add up rounded numbers, with a result in float32, with this
# OpenVINO's own attribute of a node that is to be computed in the precision that it was written in.
PRECISE = {"name": "precise", "version": "0"}
# They move numbers and round none. They are kept in float32 if what they move is: what comes from a
# layer is moved first, and converted where it is smallest.
MOVING = (
    *"Broadcast Concat Gather Reshape Select Slice Split Squeeze StridedSlice".split(),
    *"Transpose Unsqueeze VariadicSplit".split(),
)
# Where a model says what it is run in, and what one in int8 says: its rest is in bfloat16.
PRECISION_PATH = ["patchslim", "precision"]
INT8_BFLOAT16 = "int8, bfloat16"
WEIGHTED = ("Convolution", "ScaledDotProductAttention")  # and products with a constant


def keep_decisions(model: Any, graph: Graph) -> Any:
    """A copy of the model whose decisions are computed in float32, whatever the rest is."""
    _mark_decisions(model, graph)
    return _copy(model, compress=False)


def halve_weights(model: Any) -> Any:
    """A copy of the model with weights in float16, which are widened when they are read."""
    return _copy(model, compress=True)


def _copy(model: Any, *, compress: bool) -> Any:
    """The model as a file holds it, with decisions marked to be computed as they are written."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=compress)
        tree = ElementTree.parse(path)
        for layer in tree.iterfind("layers/layer"):
            if layer.get("name", "").startswith(DECIDES):
                info = layer.find("rt_info")
                if info is None:
                    info = ElementTree.Element("rt_info")
                    layer.insert(0, info)
                ElementTree.SubElement(info, "attribute", PRECISE)
        weights = path.with_suffix(".bin").read_bytes()
        return openvino.Core().read_model(ElementTree.tostring(tree.getroot()), weights)


def _mark_decisions(model: Any, graph: Graph, *, scales: bool = False) -> None:
    """Names the nodes of decisions, in a form that keeps the mark that their names stand for.

    With `scales`, the model is going to be in int8.
    """
    name_decisions(model, graph)
    settle_nodes(model, DECIDES)
    if scales:
        stop_scales(model, DECIDES)
    keep_results(model, DECIDES, ADDS)


def name_decisions(model: Any, graph: Graph) -> None:
    """Lets the names of all nodes that compute what decides begin with `DECIDES`."""
    widths = {block.width for block in graph.model.plan.shape.blocks}
    todo = [node for node in model.get_ordered_ops() if _decides(node)]
    seen = set()
    while todo:
        node = todo.pop()
        name = node.get_friendly_name()
        if name in seen or _is_layer(node) or _is_stream(node, widths):
            continue
        seen.add(name)
        if node.get_type_name() in ("Constant", "Parameter"):
            continue
        if node.get_type_name() not in MOVING:
            node.set_friendly_name(DECIDES + name)
            seen.add(DECIDES + name)
        todo += [each.get_node() for each in node.input_values()]
    for node in model.get_ordered_ops():
        sources = [each.get_node().get_friendly_name() for each in node.input_values()]
        moves = node.get_type_name() in MOVING and node.get_friendly_name() in seen
        if moves and any(name.startswith(DECIDES) for name in sources):
            node.set_friendly_name(DECIDES + node.get_friendly_name())


def _decides(node: Any) -> bool:
    """Whether numbers go in, and an index or a truth value comes out."""
    real = any(each.get_element_type().is_real() for each in node.input_values())
    whole = any(not each.get_element_type().is_real() for each in node.outputs())
    return real and whole and node.get_type_name() != "ShapeOf"


def _is_layer(node: Any) -> bool:
    """Whether it is a layer with weights, its bias included, or attention."""
    inputs = node.input_values()
    biased = node.get_type_name() == "Add" and any(map(_is_constant, inputs))
    return _is_weighted(node) or (biased and any(_is_weighted(each.get_node()) for each in inputs))


def _is_weighted(node: Any) -> bool:
    """Whether it multiplies with weights, or attends."""
    if node.get_type_name() != "MatMul":
        return node.get_type_name() in WEIGHTED
    return any(map(_is_constant, node.input_values()))


def _is_stream(node: Any, widths: set[int]) -> bool:
    """Whether it adds what a layer computed to the tokens, which all layers read."""
    if node.get_type_name() != "Add" or any(map(_is_constant, node.input_values())):
        return False
    shape = node.get_output_partial_shape(0)
    last = shape[shape.rank.get_length() - 1] if shape.rank.get_length() > 2 else None
    return last is not None and last.is_static and last.get_length() in widths


def _is_constant(output: Any) -> bool:
    node = output.get_node()
    converts = node.get_type_name() == "Convert"
    return _is_constant(node.input_value(0)) if converts else node.get_type_name() == "Constant"


class NncfQuantiser(Quantiser):
    """Post-training quantisation by NNCF, with SmoothQuant at several strengths."""

    # The strength moves outliers of activations into weights; -1 leaves them where they are, which
    # is best where a host has few of them.
    recipes: ClassVar[Sequence[str]] = ("SmoothQuant -1", "SmoothQuant 0.15", "SmoothQuant 0.5")
    needs: ClassVar[Mapping[str, tuple[int, ...]]] = {"nncf": (3, 0)}
    extra = "int8"

    def quantise(self, converted: Any, graph: Graph, images: Sequence[Tensor], recipe: str) -> Any:
        """The model with weights of eight bits, and places where activations are rounded."""
        import nncf
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            AdvancedSmoothQuantParameters,
        )

        _mark_decisions(converted, graph, scales=True)
        smoothing = AdvancedSmoothQuantParameters(matmul=float(recipe.split()[1]))
        made = quietly(
            lambda: nncf.quantize(
                converted,
                nncf.Dataset([batch.numpy() for batch in images]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(images),
                ignored_scope=nncf.IgnoredScope(patterns=[f"^({DECIDES}|{ADDS})"], validate=False),
                advanced_parameters=AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
            )
        )
        made = _copy(made, compress=False)
        made.set_rt_info(INT8_BFLOAT16, PRECISION_PATH)
        return made

    def list_places(self, quantised: Any) -> list[str]:
        """The nodes that round activations."""
        nodes = quantised.get_ordered_ops()
        return [each.get_friendly_name() for each in nodes if _rounds(each)]

    def leave_float(self, quantised: Any, places: Sequence[str]) -> Any:
        """A copy in which what reads these nodes reads what they round."""
        made = quantised.clone()
        made.set_rt_info(INT8_BFLOAT16, PRECISION_PATH)
        for node in made.get_ordered_ops():
            if _rounds(node) and node.get_friendly_name() in places:
                for reader in node.output(0).get_target_inputs():
                    reader.replace_source_output(node.input_value(0))
                    _widen_weights(reader.get_node())
        return made


def _widen_weights(layer: Any) -> None:
    """Gives a layer that reads floats its rounded weights as floats.

    The plugin would widen whole numbers to floats in each call, which takes longer than the layer.
    """
    from openvino import opset13 as op

    for port in layer.inputs():
        source = port.get_source_output().get_node()
        values = _widened(source) if source.get_type_name() == "Multiply" else None
        if values is not None:
            port.replace_source_output(op.constant(values).output(0))


def _widened(node: Any) -> Any:
    """The values of a constant that is widened and scaled; None if it is anything else."""
    kind = node.get_type_name()
    if kind == "Constant":
        return np.asarray(node.data, dtype=np.float32)
    if kind not in ("Convert", "Multiply", "Subtract"):
        return None
    first, *more = [each.get_node() for each in node.input_values()]
    value = _widened(first)
    for each in more:
        other = None if value is None else _widened(each)
        if other is None:
            return None
        value = value * other if kind == "Multiply" else value - other
    return value


def _rounds(node: Any) -> bool:
    return node.get_type_name() == "FakeQuantize" and not _is_constant(node.input_value(0))
