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

from patchslim.tokens.shapes import Cost, Flow, HostShape, host_macs

if TYPE_CHECKING:
    from patchslim.methods._method import Reducer


def slim_macs(
    host: HostShape,
    reducer: Reducer,
    counts: Sequence[int],
    *,
    tail: bool,
    named: Collection[int] = (),
) -> Cost:
    """Multiply-adds of the slimmed host that has `counts` rows left after each block.

    Args:
        host: the host's shape.
        reducer: the method.
        counts: rows left after each block, prefix included.
        tail: whether the last block computes only the rows that the head reads.
        named: blocks in which the method decides even where it removes nothing.
    """
    flows: list[Flow] = []
    choosing = 0
    rows, last = host.entering, host.depth - 1
    deciding = _deciding(host, reducer, counts, tail=tail, named=named)
    for index, (shape, left, whole) in enumerate(
        zip(host.blocks, counts, host.dense, strict=False)
    ):
        if index in deciding:
            among = whole if reducer.parks else rows
            choosing += reducer.macs(among, host.prefix, replace(shape, pixels=host.pixels))
            choosing += host.embed if reducer.shows == "embedding" else 0  # made once more
        if index in host.strided:
            flow = Flow.asked(left, whole)
        else:
            read = host.read if tail and index == last else None
            flow = _flow(reducer, rows, left if index in deciding else rows, read)
        if reducer.remembers and index < max(deciding, default=0):
            choosing += shape.map_row(flow.k)
        flows.append(flow)
        rows = flow.feed
    cost = host_macs(host, flows)
    head = cost.head
    if reducer.parks and not (tail and host.read is not None):  # those that waited are back
        head += (host.dense[-1] - flows[-1].feed) * host.head_row
    return Cost(cost.embed, cost.blocks, head, choosing, cost.rows)


def _deciding(
    host: HostShape,
    reducer: Reducer,
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
    pointless = tail and skips(reducer, host.read)
    return fewer - set(host.strided) - ({host.depth - 1} if pointless else set())


def skips(reducer: Reducer, read: int | None) -> bool:
    """Whether the exact tail makes the last decision pointless: nobody reads what it leaves."""
    return read is not None and reducer.place.value in ("P1", "P2")


def _flow(reducer: Reducer, rows: int, left: int, read: int | None) -> Flow:
    """The rows through one block in which `rows` enter and `left` come out."""
    match reducer.place.value if left < rows else None:
        case "P0":
            flow = Flow.even(left)
        case "P1":
            flow = Flow.even(rows, feed=left)
        case "P2":
            flow = Flow(left, rows, rows, left, left)
        case "P3":
            asked = left if read is None else read
            return Flow(rows, rows, left, asked, asked)
        case _:
            flow = Flow.even(rows)
    return flow if read is None else Flow(read, flow.k, flow.v, read, read)
