"""Splits rows into windows of the grid, so that only neighbours are compared.

Rows are sorted by the square of the grid that their cell is in, and cut into *windows* of as many
rows as a square has cells. In a complete grid the windows are the squares. If rows have gone, a
window reaches into the next square. The number of windows, and so every shape, depends only on the
number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchslim.methods._clustering import Groups, assign_rows, elect_heaviest
from patchslim.tokens.rows import take

AFTER_ALL_CELLS = 1 << 30  # larger than any cell's key; runtimes count in 32 bits


@dataclass(frozen=True)
class Windows:
    """Rows of a batch, split into windows. If `order` is None, each image is one window.

    Attributes:
        alive: which slots hold a real row (B * windows, rows of a window).
        order: the row in each slot (B, windows * rows of a window), or None.
        slot: the slot of each row (B, n), or None.
    """

    alive: Tensor
    order: Tensor | None = None
    slot: Tensor | None = None

    @classmethod
    def from_cells(
        cls, cells: Tensor, grid: tuple[int, int], alive: Tensor | None, side: int
    ) -> Windows:
        """Splits rows from `cells` (B, n) into windows of side * side; one window if side is 0."""
        batch, count = cells.shape
        real = torch.ones_like(cells, dtype=torch.bool) if alive is None else alive > 0
        length = side * side
        if not side or length >= count:
            return cls(real)
        across = -(-grid[1] // side)
        down, right = cells // grid[1], cells % grid[1]
        square = (down // side) * across + right // side
        key = square * length + (down % side) * side + right % side
        rows = torch.arange(count, device=cells.device).expand(batch, -1)
        # No two keys are equal, so that any sort gives the same order. Padding goes last.
        order = torch.where(real, key, AFTER_ALL_CELLS + rows).argsort(dim=1)
        slot = torch.zeros_like(order).scatter(1, order, rows)
        empty = -count % length
        order = torch.cat([order, order[:, -1:].expand(-1, empty)], dim=1)
        filled = torch.arange(count + empty, device=cells.device) < count
        return cls((real.gather(1, order) & filled).view(-1, length), order, slot)

    def of(self, t: Tensor) -> Tensor:
        """Splits rows t (B, n, ...) into windows (B * windows, rows of a window, ...)."""
        if self.order is None:
            return t
        return take(t, self.order).view(*self.alive.shape, *t.shape[2:])

    def to_rows(self, t: Tensor) -> Tensor:
        """Puts values (B * windows, rows of a window) back in the order of rows (B, n)."""
        if self.order is None or self.slot is None:
            return t
        return t.reshape(self.order.shape).gather(1, self.slot)

    def best_rows(self, worth: Tensor) -> Tensor | None:
        """Marks the row of the greatest worth in each window (B, n); None for a single window."""
        if self.order is None:
            return None
        worth = worth.masked_fill(~self.alive, -torch.inf)
        first = worth.argmax(dim=1, keepdim=True)
        best = torch.zeros_like(self.alive).scatter(1, first, True)
        return self.to_rows(best & self.alive)

    def assign_rows(
        self, groups: Groups, cost: Tensor, stays: Tensor, rows: Tensor | None
    ) -> Tensor:
        """Finds for each of `rows` (B, r) the row of its window, among those that stay, to join.

        None means all rows.
        """
        if self.order is None or self.slot is None:
            return assign_rows(groups, cost, stays, rows)
        length = self.alive.shape[1]
        to = assign_rows(groups, cost, self.of(stays) & self.alive, None)
        first = torch.arange(self.order.shape[1], device=cost.device) // length * length
        joined = self.order.gather(1, to.view(self.order.shape) + first)
        return joined.gather(1, self.slot if rows is None else self.slot.gather(1, rows))


def best_in_squares(cells: Tensor, grid: tuple[int, int], side: int, worth: Tensor) -> Tensor:
    """Marks the row of the greatest worth in each square of side * side cells (B, n, bool)."""
    across = -(-grid[1] // side)
    square = (cells // grid[1]) // side * across + (cells % grid[1]) // side
    rows = torch.arange(cells.shape[1], device=cells.device)
    if torch.compiler.is_compiling():
        return elect_heaviest(square, worth) == rows
    # The label of a square is the first of its rows, since `elect_heaviest` takes rows as labels.
    squares = across * -(-grid[0] // side)
    label = cells.new_full((cells.shape[0], squares), cells.shape[1])
    label = label.scatter_reduce(1, square, rows.expand_as(cells), "amin")
    return elect_heaviest(label.gather(1, square), worth) == rows
