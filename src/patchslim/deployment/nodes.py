"""The nodes of a graph, and how many of them are attention, decisions and movements of rows.

A runtime rewrites a graph before it runs it. Whether attention became one kernel, and what a method
is left with, can be counted there alone. Which words of which runtime mean what is told here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

SOFTMAX = {"softmax"}
PRODUCT = {"matmul", "fusedmatmul", "batchmatmul", "gemm", "fullyconnected"}
# Between the softmax and the product with the values these may stand and change nothing.
TRANSPARENT = {
    "cast", "convert", "dequantizelinear", "expand", "fakequantize", "identity", "quantizelinear",
    "reorder", "reshape", "squeeze", "transpose", "unsqueeze",
}  # fmt: skip
ATTENTION = {
    "attention", "fusedattention", "groupqueryattention", "multiheadattention", "packedattention",
    "packedmultiheadattention", "qattention", "scaleddotproductattention",
}  # fmt: skip
DECISIONS = {"argmax", "argmin", "nonmaxsuppression", "nonzero", "sort", "topk", "unique"}
MOVEMENTS = ("compress", "gather", "scatter")  # how their names begin


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    Attributes:
        kind: what it computes, in lower-case letters and without the runtime's domain.
        readers: the numbers of the nodes that read its outputs.
    """

    kind: str
    readers: tuple[int, ...]


@dataclass(frozen=True)
class NodeCounts:
    """What is in the graph that a runtime runs.

    Attributes:
        nodes: how many nodes it has, constants included where the runtime lists them.
        attention: how many attentions the model computes.
        fused: how many of them are one kernel, which writes no attention map to memory.
        decisions: nodes that sort or choose, such as TopK and ArgMax.
        movements: nodes that gather or scatter rows. Some are the model's own.
    """

    nodes: int
    attention: int
    fused: int
    decisions: int
    movements: int


def link_nodes(
    listed: Sequence[tuple[str, Iterable[Hashable], Iterable[Hashable]]],
) -> list[Node]:
    """Nodes from their kinds, the names of what each reads, and the names of what each makes."""
    readers: dict[Hashable, list[int]] = {}
    for number, (_, reads, _) in enumerate(listed):
        for name in reads:
            readers.setdefault(name, []).append(number)
    return [
        Node(kind.lower(), tuple(reader for name in makes for reader in readers.get(name, ())))
        for kind, _, makes in listed
    ]


def count_nodes(written: Sequence[Node], run: Sequence[Node]) -> NodeCounts:
    """Counts the nodes that a runtime runs, beside those of the graph that was written.

    An attention that is not fused is a softmax whose result is multiplied by the values. A softmax
    that a method reads to decide is none.
    """
    attention, left = _count_attention(written), len(_open_attention(run))
    return NodeCounts(
        nodes=len(run),
        attention=attention,
        fused=max(0, attention - left),
        decisions=sum(each.kind in DECISIONS for each in run),
        movements=sum(each.kind.startswith(MOVEMENTS) for each in run),
    )


def _count_attention(nodes: Sequence[Node]) -> int:
    """How many attentions a graph has, as one node or as several."""
    return sum(each.kind in ATTENTION for each in nodes) + len(_open_attention(nodes))


def _open_attention(nodes: Sequence[Node]) -> list[Node]:
    """Each softmax whose result is multiplied by something."""
    return [each for each in nodes if each.kind in SOFTMAX and _reaches_product(each, nodes)]


def _reaches_product(node: Node, nodes: Sequence[Node]) -> bool:
    """Whether a product reads what the node makes, perhaps after it was only laid out anew."""
    waiting, seen = [*node.readers], set()
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        if nodes[number].kind in PRODUCT:
            return True
        if nodes[number].kind in TRANSPARENT:
            waiting += nodes[number].readers
    return False
