"""Nodes of OpenVINO in a form that keeps its mark.

The plugin rewrites some nodes into others, which do not inherit the mark of the precision that they
are to be computed in. A node that has the final form already is left alone.

A product or a sum of numbers that are in bfloat16 anyway is exact in float32, and quick, if only
its result is kept in float32. So the mark is on a node after it, which the plugin fuses with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SUMS = ("ReduceMean", "ReduceSum")
ADDING = ("MatMul", *SUMS)
LARGEST = 3e38


def settle_nodes(model: Any, prefix: str) -> None:
    """Rewrites, among the nodes with such names, what the plugin would: the same is computed."""
    for node in model.get_ordered_ops():
        if not node.get_friendly_name().startswith(prefix):
            continue
        if node.get_type_name() == "MatMul":
            _take_in_transpose(node)
        elif node.get_type_name() == "Multiply":
            _spread_factor(node)
        elif node.get_type_name() == "Softmax":
            _use_oldest_softmax(node)
        elif node.get_type_name() == "Pad":
            _use_oldest_pad(node)
        elif node.get_type_name() in ("Squeeze", "Unsqueeze"):
            _use_reshape(node)


def keep_results(model: Any, prefix: str, unmarked: str) -> None:
    """Moves marks from nodes that add up what no marked node has computed to nodes after them.

    The names of such nodes then begin with `unmarked`.
    """
    from openvino import opset13 as op

    for node in _list_entries(model, prefix, ADDING):
        readers, name = node.output(0).get_target_inputs(), node.get_friendly_name()
        kept = op.clamp(node, -LARGEST, LARGEST)  # changes nothing, and is what the plugin fuses
        for reader in readers:
            reader.replace_source_output(kept.output(0))
        kept.set_friendly_name(name)
        node.set_friendly_name(unmarked + name.removeprefix(prefix))


def stop_scales(model: Any, prefix: str) -> None:
    """Puts a marked node before sums of what no marked node has computed.

    In a model in int8 the plugin would move scales past the sum, into nodes without a mark.
    """
    import numpy as np
    from openvino import opset13 as op

    lowest = op.constant(np.float32(-LARGEST))
    for node in _list_entries(model, prefix, SUMS):
        same = op.maximum(node.input_value(0), lowest)
        same.set_friendly_name(f"{node.get_friendly_name()}/same")
        node.input(0).replace_source_output(same.output(0))


def end_in_products(results: Sequence[Any], prefix: str) -> None:
    """Ends what these results tell in a marked product with 1, which changes no whole number.

    The plugin computes in float32 what a result is made of, back to the last product. Without one,
    a graph that tells its decisions would round less than the one that is written.
    """
    import numpy as np
    from openvino import opset13 as op

    one, last = op.constant(np.ones((1, 1), np.float32)), op.constant(np.array([2]))
    for number, result in enumerate(results):
        told = result.input_value(0)
        column = op.unsqueeze(op.convert(told, np.float32), last)
        row = op.squeeze(op.matmul(column, one, False, False), last)
        same = op.convert(row, told.get_element_type().to_dtype())
        result.input(0).replace_source_output(same.output(0))
        while same != told.get_node():
            same.set_friendly_name(
                f"{prefix}told/{number}/{same.get_type_name()}/{same.get_name()}"
            )
            same = same.input_value(0).get_node()


def _list_entries(model: Any, prefix: str, kinds: Sequence[str]) -> list[Any]:
    """The marked nodes of some kinds that read no marked node."""

    def is_marked(node: Any) -> bool:
        return bool(node.get_friendly_name().startswith(prefix))

    return [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in kinds
        and is_marked(node)
        and not any(is_marked(each.get_node()) for each in node.input_values())
    ]


def _take_in_transpose(product: Any) -> None:
    """Lets a product read its second factor as it is before its last two axes are swapped."""
    from openvino import opset13 as op

    factor = product.input_value(1).get_node()
    if factor.get_type_name() != "Transpose" or product.get_attributes()["transpose_b"]:
        return
    order = factor.input_value(1).get_node()
    rank = factor.get_output_partial_shape(0).rank.get_length()
    if order.get_type_name() != "Constant":
        return
    if [*order.data.ravel()] != [*range(rank - 2), rank - 1, rank - 2]:
        return
    transposed = product.get_attributes()["transpose_a"]
    left, right = product.input_value(0), factor.input_value(0)
    _replace(product, op.matmul(left, right, transposed, True))


def _spread_factor(product: Any) -> None:
    """Repeats a factor that is one number along the last axis."""
    import numpy as np
    from openvino import opset13 as op

    last = [*product.get_output_partial_shape(0)][-1:]
    if not last or last[0].is_dynamic or last[0].get_length() < 2:
        return
    for port in product.inputs():
        factor = port.get_source_output().get_node()
        if factor.get_type_name() == "Constant" and factor.data.size == 1:
            value = np.full(last[0].get_length(), factor.data.item(), factor.data.dtype)
            port.replace_source_output(op.constant(value).output(0))


def _use_oldest_softmax(softmax: Any) -> None:
    """Counts the axis from the first, as the first version of the node does."""
    from openvino import opset1 as op

    axis = softmax.get_attributes()["axis"]
    rank = softmax.get_output_partial_shape(0).rank.get_length()
    _replace(softmax, op.softmax(softmax.input_value(0), axis % rank))


def _use_oldest_pad(pad: Any) -> None:
    """Adds rows and takes none away, as the first version of the node does."""
    from openvino import opset1 as op

    data, *rest = pad.input_values()
    _replace(pad, op.pad(data, rest[0], rest[1], pad.get_attributes()["pad_mode"], *rest[2:]))


def _use_reshape(node: Any) -> None:
    """Names the last of several shapes itself, if no more than one of its sizes is open."""
    from openvino import opset1 as op

    sizes = [*node.get_output_partial_shape(0)]
    shape = [size.get_length() if size.is_static else -1 for size in sizes]
    if not shape or shape.count(-1) > 1:
        return
    data = node.input_value(0)
    while data.get_node().get_type_name() == "Reshape":
        data = data.get_node().input_value(0)
    _replace(node, op.reshape(data, shape, special_zero=False))


def _replace(old: Any, new: Any) -> None:
    """Puts a node in the place of another, under its name."""
    new.set_friendly_name(old.get_friendly_name())
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
