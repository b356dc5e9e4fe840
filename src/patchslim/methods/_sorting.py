"""Sorts and ranks rows so that equal ones keep their order, in words that every runtime has.

Runtimes refuse a stable sort, or do it in another order. In a graph each row is therefore compared
with every other; outside of graphs a sort is faster. Both give the same result, which is tested.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.tokens.spelling import is_by_product


def is_heavier(worth: Tensor) -> Tensor:
    """Whether row j is worth more than row i, at (B, i, j); of equal rows, the first is."""
    if torch.compiler.is_compiling():
        return _comes_first(worth)
    rank = rank_rows(worth).to(worth.dtype)
    return rank.unsqueeze(1) < rank.unsqueeze(2)


def rank_rows(worth: Tensor) -> Tensor:
    """The rank of each row (B, n): 0 for the greatest worth; of equal rows, the first leads."""
    if torch.compiler.is_compiling():
        # Floats are exact up to 2**24, and runtimes add them up faster than whole numbers.
        return _comes_first(worth).to(torch.float32).sum(dim=2).long()
    return _inverse(worth.argsort(dim=1, descending=True, stable=True))


def sort_rows(worth: Tensor) -> Tensor:
    """The rows (B, n) from the greatest worth to the least; equal rows keep their order."""
    if torch.compiler.is_compiling():
        return _inverse(rank_rows(worth))
    return worth.argsort(dim=1, descending=True, stable=True)


def first_least(cost: Tensor) -> Tensor:
    """The column of the least entry of each row, the first of equals: (B, n, m) gives (B, n)."""
    if not is_by_product():
        return cost.argmin(dim=2)
    return _first_equal(cost, cost.amin(dim=2, keepdim=True))


def first_greatest(scores: Tensor) -> Tensor:
    """The column of the greatest entry of each row, the first of equals: (B, n, m) gives (B, n)."""
    if not is_by_product():
        return scores.argmax(dim=2)
    return _first_equal(scores, scores.amax(dim=2, keepdim=True))


def _first_equal(table: Tensor, value: Tensor) -> Tensor:
    """The first column of each row of a table (B, n, m) that holds the row's value (B, n, 1)."""
    columns = torch.arange(table.shape[2], device=table.device, dtype=torch.float32)
    return torch.where(table == value, columns, float(table.shape[2])).amin(dim=2).long()


def _comes_first(worth: Tensor) -> Tensor:
    """Whether row j comes before row i in the order of `sort_rows`, at (B, i, j)."""
    theirs, own = worth.unsqueeze(1), worth.unsqueeze(2)
    rows = torch.arange(worth.shape[1], device=worth.device)
    return (theirs > own) | ((theirs == own) & (rows < rows.unsqueeze(1)))


def _inverse(order: Tensor) -> Tensor:
    """The place of each row in an order (B, n)."""
    rows = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, rows)
