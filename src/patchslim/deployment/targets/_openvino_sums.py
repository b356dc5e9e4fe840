"""Parts what reduces whole numbers from the arithmetic after it, which OpenVINO would fuse wrongly.

OpenVINO 2026.4 computes `x.sum(dim) + 1` in one step. With whole numbers on a processor with
AVX-512, and with few rows, the result is wrong. A choice between the two keeps them apart.
"""

from __future__ import annotations

from typing import Any

# These are not fused, or are fused rightly.
SAFE = frozenset(
    "Less LessEqual Greater GreaterEqual Equal NotEqual Select Minimum Maximum Result".split()
)
MOST = 2**31 - 1  # OpenVINO counts in 32 bits


def part_sums(model: Any) -> None:
    """Puts a choice after each reduction of whole numbers that more is computed from, in place."""
    import numpy as np
    from openvino import opset13 as ops

    for node in model.get_ordered_ops():
        if not node.get_type_name().startswith("Reduce"):
            continue
        kind = node.get_output_element_type(0)
        uses = [
            each
            for each in node.output(0).get_target_inputs()
            if each.get_node().get_type_name() not in SAFE
        ]
        if uses and kind.is_integral_number():
            most = ops.constant(np.array(MOST, kind.to_dtype()))
            parted = ops.select(ops.less(node, most), node, most)
            for each in uses:
                each.replace_source_output(parted.output(0))
