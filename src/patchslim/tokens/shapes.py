"""Shapes of hosts and blocks, and multiply-adds counted from them. They know no methods."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BlockShape:
    """What one block costs.

    Attributes:
        width: channels of a token.
        q, k, v: multiply-adds a row of each projection.
        query_width: channels of q over all heads: the cost of one query-key pair.
        value_width: channels of v over all heads: the cost of one attention-value pair.
        key_width: channels of one head's key.
        out: multiply-adds a row of what follows attention before the residual is closed.
        feed: multiply-adds a row of the feed-forward.
        score: multiply-adds a row of scoring by class attention, or by a pooling query.
        score_once: multiply-adds of scoring that do not depend on the number of rows.
        pixels: values in one patch of the image.
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

    def attention_row_macs(self, rows: int) -> int:
        """One row of the attention map over `rows` keys."""
        return rows * self.score + self.score_once

    @classmethod
    def standard(cls, width: int, heads: int, *, ratio: float = 4.0) -> BlockShape:
        """A block of the plain vision transformer."""
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
    """What a whole host costs, and how its rows are laid out.

    Attributes:
        grid: height and width of the patch grid.
        prefix: rows that are not patches.
        embed: multiply-adds of the patch embedding.
        blocks: one entry a block.
        head: multiply-adds of the head that do not depend on the number of rows.
        head_row: multiply-adds of the head a row that is left.
        read: how many leading rows the head reads, or None where it reads all.
        strided: the grid that is left after each block that strides over it, where some do.
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
        """Patch rows after each block in which the host itself leaves fewer."""
        return {block: height * width for block, (height, width) in self.strided.items()}

    @property
    def dense(self) -> tuple[int, ...]:
        """Rows that enter each block of the dense host, and those that leave the last."""
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
        """Values in one patch, of hosts that embed each patch by one product."""
        return self.embed // (self.grid[0] * self.grid[1] * self.blocks[0].width)

    @property
    def depth(self) -> int:
        """The number of blocks."""
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
        """All rows through attention, and `feed` of them (or all) through the feed-forward."""
        return cls(rows, rows, rows, rows, rows if feed is None else feed)

    @classmethod
    def for_queries(cls, asking: int, rows: int) -> Flow:
        """`asking` rows ask all `rows`, and only they go on."""
        return cls(asking, rows, rows, asking, asking)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one image.

    Attributes:
        embed, blocks, head: the parts, by the convention of the literature.
        choosing: what the method adds to decide; not part of `total`.
        rows: rows that leave each block.
    """

    embed: int
    blocks: tuple[int, ...]
    head: int
    choosing: int = 0
    rows: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """All parts, by the convention of the literature."""
        return self.embed + sum(self.blocks) + self.head

    def __str__(self) -> str:
        return f"{self.total / 1e9:.3f} GMACs"


def block_macs(shape: BlockShape, flow: Flow) -> int:
    """Multiply-adds of one block through which the rows of `flow` pass."""
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
    """Multiply-adds of a host through whose blocks the rows of `flows` pass."""
    blocks = tuple(map(block_macs, host.blocks, flows))
    head = host.head + flows[-1].feed * host.head_row
    return Cost(host.embed, blocks, head, rows=tuple(flow.feed for flow in flows))


def dense_macs(host: HostShape) -> Cost:
    """Multiply-adds of the untouched host."""
    return host_macs(
        host, [Flow.for_queries(left, rows) for rows, left in itertools.pairwise(host.dense)]
    )
