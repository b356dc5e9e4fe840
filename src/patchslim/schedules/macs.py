"""Exact operation counts, from shapes alone.

Convention of the literature (whose "GFLOPs" are these multiply-adds): one image, projections,
the two attention products, feed-forward, patch embedding and head; bias, norm, softmax and
activation are free. What a method spends on choosing (similarities, a row of attention) is counted
apart as `choosing`, since published figures leave it out.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from patchslim.methods._method import content_kind, remembers
from patchslim.tokens.shapes import Cost, Flow, HostShape, host_macs

if TYPE_CHECKING:
    from patchslim.methods._method import Method


def slim_macs(
    host: HostShape,
    method: Method,
    counts: Sequence[int],
    *,
    tail: bool,
    named: Collection[int] = (),
) -> Cost:
    """Multiply-adds of the slimmed host that has `counts` rows left after each block.

    Args:
        host: the host's shape.
        method: the method.
        counts: rows left after each block, prefix included.
        tail: whether the last block computes only the rows that the head reads.
        named: blocks in which the method decides even where it removes nothing.
    """
    flows: list[Flow] = []
    choosing = 0
    rows, last = host.entering, host.depth - 1
    deciding = _decision_blocks(host, method, counts, tail=tail, named=named)
    for index, (shape, left, whole) in enumerate(
        zip(host.blocks, counts, host.dense, strict=False)
    ):
        if index in deciding:
            among = whole if method.defers else rows
            choosing += method.macs(among, host.prefix, replace(shape, pixels=host.pixels))
            choosing += host.embed if content_kind(method) == "embedding" else 0  # made once more
        if index in host.strided:
            flow = Flow.for_queries(left, whole)
        else:
            read = host.read if tail and index == last else None
            flow = _block_flow(method, rows, left if index in deciding else rows, read)
        if remembers(method) and index < max(deciding, default=0):
            choosing += shape.attention_row_macs(flow.k)
        flows.append(flow)
        rows = flow.feed
    cost = host_macs(host, flows)
    head = cost.head
    if method.defers and not (tail and host.read is not None):  # those that waited are back
        head += (host.dense[-1] - flows[-1].feed) * host.head_row
    return Cost(cost.embed, cost.blocks, head, choosing, cost.rows)


def _decision_blocks(
    host: HostShape,
    method: Method,
    counts: Sequence[int],
    *,
    tail: bool,
    named: Collection[int],
) -> set[int]:
    """The blocks in which the method decides."""
    fewer = {
        index
        for index, (rows, left) in enumerate(itertools.pairwise((host.entering, *counts)))
        if left < rows or index in named
    }
    pointless = tail and skips_last_decision(method, host.read)
    return fewer - set(host.strided) - ({host.depth - 1} if pointless else set())


def skips_last_decision(method: Method, read: int | None) -> bool:
    """Whether the exact tail makes the last decision pointless: nobody reads what it leaves."""
    return read is not None and method.place.value in ("P1", "P2")


def _block_flow(method: Method, rows: int, left: int, read: int | None) -> Flow:
    """The rows through one block in which `rows` enter and `left` come out."""
    match method.place.value if left < rows else None:
        case "P0":
            flow = Flow.uniform(left)
        case "P1":
            flow = Flow.uniform(rows, feed=left)
        case "P2":
            flow = Flow(left, rows, rows, left, left)
        case "P3":
            asked = left if read is None else read
            return Flow(rows, rows, left, asked, asked)
        case _:
            flow = Flow.uniform(rows)
    return flow if read is None else Flow(read, flow.k, flow.v, read, read)
