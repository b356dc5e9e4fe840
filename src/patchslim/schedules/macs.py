"""Counts the multiply-adds of a slimmed host, exactly, from shapes alone.

By the convention of the literature (whose "GFLOPs" are these multiply-adds): for one image, the
projections, the two attention products, feed-forward, patch embedding and head. Bias, norm, softmax
and activation are free. What a method spends on its choice (similarities, a row of attention) is
counted apart as `choosing`, since published figures leave it out.
"""

from __future__ import annotations

import itertools
import math
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
    """Counts the multiply-adds of a host that has `counts` rows left after each block.

    Args:
        host: the shape of the host.
        method: the method that removes the rows.
        counts: rows left after each block, prefix included.
        tail: whether the last block computes only the rows that the head reads.
        named: blocks in which the method chooses even if no row has to go.
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
            block = replace(shape, pixels=host.pixels, cells=math.prod(host.grid), left=left)
            choosing += method.macs(among, host.prefix, block)
            if content_kind(method) == "embedding":
                choosing += host.embed  # the embedding is computed a second time
        if index in host.strided:
            flow = Flow.for_queries(left, whole)
        else:
            read = host.read if tail and index == last else None
            entering = whole if method.defers and index in deciding else rows
            flow = block_flow(method, entering, left if index in deciding else rows, read)
        if remembers(method) and index < max(deciding, default=0):
            choosing += shape.attention_row_macs(flow.k)
        flows.append(flow)
        rows = flow.feed
    cost = host_macs(host, flows)
    head = cost.head
    if method.defers and not (tail and host.read is not None):  # the head gets all rows back
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
    """Finds the blocks in which the method chooses."""
    deciding = {
        index
        for index, (rows, left) in enumerate(itertools.pairwise((host.entering, *counts)))
        if left < rows or index in named
    }
    skipped = {host.depth - 1} if tail and skips_last_decision(method, host.read) else set()
    return deciding - set(host.strided) - skipped


def skips_last_decision(method: Method, read: int | None) -> bool:
    """Tells whether the exact tail skips a choice in the last block: no one reads its rows."""
    return read is not None and method.place.value in ("P1", "P2")


def block_flow(method: Method, rows: int, left: int, read: int | None) -> Flow:
    """Counts the rows that pass through each part of a block that `rows` enter and `left` leave."""
    match method.place.value if left < rows else None:
        case "P0":
            flow = Flow.uniform(left)
        case "P1":
            flow = Flow.uniform(rows, feed=left)
        case "P2":
            flow = Flow(left, rows, rows, left, left)
        case "P3":
            needed = left if read is None else read
            return Flow(rows, rows, left, needed, needed)
        case _:
            flow = Flow.uniform(rows)
    return flow if read is None else Flow(read, flow.k, flow.v, read, read)
