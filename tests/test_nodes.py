"""What is counted in the graph that a runtime runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import patchslim
from patchslim.deployment.nodes import Node, NodeCounts, count_nodes, link_nodes
from patchslim.deployment.registry import find_target
from test_export import METHODS, artefact_path, host, slim

slow = pytest.mark.slow


def chain(*kinds: str) -> list[Node]:
    """Nodes of which each reads the one before."""
    listed = [(kind, [number], [number + 1]) for number, kind in enumerate(kinds)]
    return link_nodes(listed)


def test_nodes_know_who_reads_them():
    nodes = link_nodes([("A", [], ["x", "y"]), ("B", ["x"], ["z"]), ("C", ["y", "z"], [])])
    assert nodes == [Node("a", (1, 2)), Node("b", (2,)), Node("c", ())]


@pytest.mark.parametrize(
    ("written", "run", "attention", "fused"),
    [
        (["MatMul", "Softmax", "MatMul"], ["MatMul", "Softmax", "MatMul"], 1, 0),
        (["MatMul", "Softmax", "MatMul"], ["Subgraph"], 1, 1),
        (["ScaledDotProductAttention"], ["Softmax", "Reorder", "FullyConnected"], 1, 0),
        (["Softmax", "QuantizeLinear", "DequantizeLinear", "MatMul"], [], 1, 1),
        (["Softmax", "Slice", "MatMul"], ["Softmax", "Slice", "MatMul"], 0, 0),
        (["MultiHeadAttention"], ["MultiHeadAttention"], 1, 1),
    ],
)
def test_attention_is_a_softmax_that_meets_the_values(written, run, attention, fused):
    counts = count_nodes(chain(*written), chain(*run))
    assert (counts.attention, counts.fused) == (attention, fused)


def test_decisions_and_movements_are_told_apart():
    run = chain("TopK", "ArgMax", "GatherElements", "Gather", "ScatterElementsUpdate", "Add")
    assert count_nodes([], run) == NodeCounts(6, 0, 0, 2, 3)


def nodes_of(method: str, target: str, folder: Path) -> NodeCounts:
    name, settings = METHODS.get(method, (method, {}))
    made = patchslim.slim(host(), "identity", keep=1.0) if name == "identity" else slim(
        name, **settings
    )  # fmt: skip
    path = artefact_path(folder, target)
    patchslim.export(made, path, to=target)
    return count_nodes(*find_target(target).read_nodes(path))


@slow
@pytest.mark.parametrize("method", ["evit", "similarity"])
def test_openvino_fuses_attention_in_every_block(method, tmp_path):
    counts = nodes_of(method, "openvino", tmp_path)
    assert (counts.attention, counts.fused) == (3, 3)
    assert counts.decisions == 2  # one number a patch is sorted in each deciding block


@slow
def test_the_graph_that_onnx_runtime_runs_is_counted(tmp_path):
    dense, slimmed = (nodes_of(name, "onnx", tmp_path) for name in ("identity", "evit"))
    assert dense.attention == dense.fused == slimmed.attention == 3
    assert slimmed.fused == nodes_of("tome", "onnx", tmp_path).fused == 3  # with sizes as a mask
    assert (dense.decisions, slimmed.decisions) == (0, 2)
    assert slimmed.movements > dense.movements
