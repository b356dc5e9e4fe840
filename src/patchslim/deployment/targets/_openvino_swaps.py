"""Removes swaps of axes that a later swap undoes, which OpenVINO would carry out."""

from __future__ import annotations

from typing import Any


def undo_swaps(model: Any) -> None:
    """Lets what reads a transpose of a transpose read what both leave as it was, in place."""
    for node in model.get_ordered_ops():
        before = node.input_value(0).get_node() if node.get_type_name() == "Transpose" else None
        if before is None or before.get_type_name() != "Transpose":
            continue
        orders = [each.input_value(1).get_node() for each in (before, node)]
        if any(order.get_type_name() != "Constant" for order in orders):
            continue
        first, second = ([*order.data.ravel()] for order in orders)
        if [first[axis] for axis in second] == [*range(len(first))]:
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(before.input_value(0))
