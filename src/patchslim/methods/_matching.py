"""Bipartite matching, of which several methods that merge are made. Knows no tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Matching(NamedTuple):
    """Which rows of a set A go into a set B.

    Attributes:
        gone: rows of A that go, the best match first (B, r).
        into: for each of them its row of B (B, r).
        stay: rows of A that stay, the best match first (B, |A| - r).
    """

    gone: Tensor
    into: Tensor
    stay: Tensor


def match_best(scores: Tensor, count: int) -> Matching:
    """Lets each row of A propose its best partner in B, and takes the `count` best proposals.

    `scores` (B, |A|, |B|): the greatest is the best. Several rows may have the same partner.
    """
    best = scores.max(dim=2)
    order = best.values.topk(best.values.shape[1], dim=1).indices
    gone, stay = order[:, :count], order[:, count:]
    return Matching(gone, best.indices.gather(1, gone), stay)


def ascending(rows: Tensor) -> Tensor:
    """Sorts the rows of each image (B, n)."""
    return rows.topk(rows.shape[1], dim=1, largest=False).values


def first_of_sets(prefix: int) -> tuple[int, int]:
    """Finds the first patch of A and of B where all rows alternate, row 0 of the prefix in A."""
    return prefix % 2, 1 - prefix % 2
