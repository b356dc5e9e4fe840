"""Bipartite matching, of which several methods that merge are made. Knows no tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.methods._sorting import first_greatest
from patchslim.tokens.rows import take


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
    best = scores.amax(dim=2)
    order = best.topk(best.shape[1], dim=1).indices
    gone, stay = order[:, :count], order[:, count:]
    return Matching(gone, first_greatest(take(scores, gone)), stay)


def ascending(rows: Tensor) -> Tensor:
    """Sorts the rows of each image (B, n)."""
    return rows.topk(rows.shape[1], dim=1, largest=False).values


def first_of_sets(prefix: int) -> tuple[int, int]:
    """Finds the first patch of A and of B where all rows alternate, row 0 of the prefix in A."""
    return prefix % 2, 1 - prefix % 2


def compare_sets(vectors: Tensor, prefix: int) -> Tensor:
    """Computes the cosines between A and B where all rows alternate: (B, n, d) to (B, |A|, |B|)."""
    a, b = first_of_sets(prefix)
    unit = F.normalize(vectors, dim=-1)
    return unit[:, a::2] @ unit[:, b::2].transpose(-2, -1)


def compare_rows(vectors: Tensor, some: Tensor, others: Tensor) -> Tensor:
    """Computes the cosines between some rows (B, a) and others (B, b): (B, n, d) to (B, a, b)."""
    unit = F.normalize(vectors, dim=-1)
    return take(unit, some) @ take(unit, others).transpose(-2, -1)


def match_sets(scores: Tensor, prefix: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matches `count` rows of A with rows of B, where all rows alternate (ToMe).

    Returns the rows that stay, those of A and then those of B, since the next split depends on the
    order; the rows that go; and for each of these the index of a row among those that stay.
    """
    a, b = first_of_sets(prefix)
    matched = match_best(scores, count)
    stay = ascending(matched.stay)
    every_b = torch.arange(scores.shape[2], device=scores.device).expand(scores.shape[0], -1)
    kept = torch.cat([stay * 2 + a, every_b * 2 + b], dim=1)
    return kept, matched.gone * 2 + a, matched.into + stay.shape[1]


def count_pairs(patches: int, prefix: int) -> int:
    """Counts the pairs of a row of A and a row of B, where all rows alternate."""
    a, b = first_of_sets(prefix)
    return len(range(a, patches, 2)) * len(range(b, patches, 2))
