"""Shapes of hosts and blocks, and multiply-adds counted from them.

Plain numbers: no tensors and no methods.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BlockShape:
    """What the parts of one block cost, in multiply-adds.

    Attributes:
        width: channels of a token.
        q, k, v: cost of each projection for one row.
        query_width: channels of q over all heads, which is the cost of one query-key pair.
        value_width: channels of v over all heads, which is the cost of one attention-value pair.
        key_width: channels of one head's key.
        out: cost for one row of everything between attention and the residual sum.
        feed: cost of the feed-forward for one row.
        score: cost for one row of scoring by class attention, which is `query_width`, or by a
            pooling query.
        score_once: cost of scoring that does not depend on the number of rows.
        pixels: values in one patch of the image.
        cells: cells of the image's grid.
        left: rows that a choice in this block leaves, prefix included.
    """

    width: int
    q: int
    k: int
    v: int
    query_width: int
    value_width: int
    key_width: int
    out: int
    feed: int
    score: int
    score_once: int = 0
    pixels: int = 0
    cells: int = 0
    left: int = 0

    def attention_row_macs(self, rows: int) -> int:
        """Counts the multiply-adds of one row of the attention map over `rows` keys."""
        return rows * self.score + self.score_once

    @classmethod
    def standard(cls, width: int, heads: int, *, ratio: float = 4.0) -> BlockShape:
        """Makes the shape of a block whose attention is as wide as its tokens.

        Args:
            width: channels of a token.
            heads: heads of its attention.
            ratio: hidden channels of the feed-forward, as a multiple of `width`.
        """
        square = width * width
        return cls(
            width=width,
            q=square,
            k=square,
            v=square,
            query_width=width,
            value_width=width,
            key_width=width // heads,
            out=square,
            feed=2 * int(ratio * width) * width,
            score=width,
        )


@dataclass(frozen=True)
class HostShape:
    """What a whole host costs in multiply-adds, and how many rows it has.

    Attributes:
        grid: height and width of the patch grid.
        prefix: rows that are not patches.
        embed: cost of the patch embedding.
        blocks: one shape for each block.
        head: cost of the head that does not depend on the number of rows.
        head_row: cost of the head for each row that is left.
        read: how many leading rows the head reads, or None if it reads all; `HostFacts.rows_read`.
        strided: for each block that subsamples the grid, the height and width that it leaves.
    """

    grid: tuple[int, int]
    prefix: int
    embed: int
    blocks: tuple[BlockShape, ...]
    head: int
    head_row: int = 0
    read: int | None = None
    strided: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def resets(self) -> dict[int, int]:
        """Patch rows after each block that subsamples the grid."""
        return {block: height * width for block, (height, width) in self.strided.items()}

    @property
    def dense(self) -> tuple[int, ...]:
        """Rows that enter each block of the dense host, and last the rows that leave it."""
        rows = [self.entering]
        for block in range(self.depth):
            rows.append(self.resets[block] + self.prefix if block in self.resets else rows[-1])
        return tuple(rows)

    @property
    def entering(self) -> int:
        """Rows that enter the first block."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def pixels(self) -> int:
        """Values in one patch, for hosts that embed each patch by one matrix product."""
        return self.embed // (self.grid[0] * self.grid[1] * self.blocks[0].width)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)


@dataclass(frozen=True)
class Flow:
    """How many rows pass through each part of one block."""

    q: int
    k: int
    v: int
    mix: int
    feed: int

    @classmethod
    def uniform(cls, rows: int, *, feed: int | None = None) -> Flow:
        """Makes the flow in which all rows pass attention, and `feed` of them (or all) go on."""
        return cls(rows, rows, rows, rows, rows if feed is None else feed)

    @classmethod
    def for_queries(cls, queries: int, rows: int) -> Flow:
        """Makes the flow in which `queries` rows attend to all `rows`, and only they go on."""
        return cls(queries, rows, rows, queries, queries)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image.

    Attributes:
        embed, blocks, head: the parts, by the convention of the literature.
        choosing: what the method spends on its choices. Not part of `total`.
        rows: rows that leave each block.
    """

    embed: int
    blocks: tuple[int, ...]
    head: int
    choosing: int = 0
    rows: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Sum of all parts but `choosing`, as the literature counts."""
        return self.embed + sum(self.blocks) + self.head

    def __str__(self) -> str:
        return f"{self.total / 1e9:.3f} GMACs"


def block_macs(shape: BlockShape, flow: Flow) -> int:
    """Counts the multiply-adds of one block, given the rows that pass through its parts."""
    return (
        flow.q * shape.q
        + flow.k * shape.k
        + flow.v * shape.v
        + flow.q * flow.k * shape.query_width
        + flow.mix * flow.v * shape.value_width
        + flow.mix * shape.out
        + flow.feed * shape.feed
    )


def host_macs(host: HostShape, flows: Sequence[Flow]) -> Cost:
    """Counts the multiply-adds of a host, given the rows that pass through each block."""
    blocks = tuple(map(block_macs, host.blocks, flows))
    head = host.head + flows[-1].feed * host.head_row
    return Cost(host.embed, blocks, head, rows=tuple(flow.feed for flow in flows))


def dense_macs(host: HostShape) -> Cost:
    """Counts the multiply-adds of the untouched host."""
    return host_macs(
        host, [Flow.for_queries(left, rows) for rows, left in itertools.pairwise(host.dense)]
    )
