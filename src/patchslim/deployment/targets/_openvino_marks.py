"""Nodes of OpenVINO in a form that keeps its mark.

The plugin rewrites some nodes into others, which do not inherit the mark of the precision that they
are to be computed in. A node that has the final form already is left alone.
"""

from __future__ import annotations

from typing import Any


def settle_nodes(model: Any, prefix: str) -> None:
    """Rewrites, among the nodes with such names, what the plugin would: the same is computed."""
    for node in model.get_ordered_ops():
        if not node.get_friendly_name().startswith(prefix):
            continue
        if node.get_type_name() == "MatMul":
            _take_in_transpose(node)
        elif node.get_type_name() == "Softmax":
            _use_oldest_softmax(node)
        elif node.get_type_name() == "Pad":
            _use_oldest_pad(node)
        elif node.get_type_name() in ("Squeeze", "Unsqueeze"):
            _use_reshape(node)


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
