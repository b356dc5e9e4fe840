"""Rows dealt into squares of the grid, so that neighbours are compared and not all with all.

Rows are put in the order of the squares that their cells lie in, and cut into runs of as many rows
as a square has cells. Of a whole grid these are the squares themselves; where rows have gone, a run
reaches into the next square. The number of runs, and so every shape, depends on the rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchslim.methods._clustering import Groups, assign_rows, elect_heaviest
from patchslim.tokens.rows import take


@dataclass(frozen=True)
class Windows:
    """How rows are dealt; all of them are one run where `order` is None.

    Attributes:
        alive: which places hold a real row, (B * runs, rows of a run).
        order: the row at each place (B, runs * rows of a run), or None.
        place: the place of each row (B, n), or None.
    """

    alive: Tensor
    order: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def from_cells(
        cls, cells: Tensor, grid: tuple[int, int], alive: Tensor | None, side: int
    ) -> Windows:
        """Rows at `cells` (B, n) in runs of side * side; all in one where side is 0."""
        batch, count = cells.shape
        real = torch.ones_like(cells, dtype=torch.bool) if alive is None else alive > 0
        run = side * side
        if not side or run >= count:
            return cls(real)
        across = -(-grid[1] // side)
        down, right = cells // grid[1], cells % grid[1]
        square = (down // side) * across + right // side
        key = (square * run + (down % side) * side + right % side).masked_fill(~real, 1 << 40)
        order = key.argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter(
            1, order, torch.arange(count, device=cells.device).expand(batch, -1)
        )
        more = -count % run
        order = torch.cat([order, order[:, -1:].expand(-1, more)], dim=1)
        there = torch.arange(count + more, device=cells.device) < count
        return cls((real.gather(1, order) & there).view(-1, run), order, place)

    def of(self, t: Tensor) -> Tensor:
        """Rows t (B, n, ...) run by run (B * runs, rows of a run, ...)."""
        if self.order is None:
            return t
        return take(t, self.order).view(*self.alive.shape, *t.shape[2:])

    def to_rows(self, t: Tensor) -> Tensor:
        """What belongs to each place (B * runs, rows of a run), as rows (B, n)."""
        if self.place is None:
            return t
        return t.reshape(self.place.shape[0], -1).gather(1, self.place)

    def best_rows(self, worth: Tensor) -> Tensor | None:
        """The worthiest row of each run (B, n, bool), which others can join; None of one run."""
        if self.order is None:
            return None
        worth = worth.masked_fill(~self.alive, -torch.inf)
        first = worth.argmax(dim=1, keepdim=True)
        best = torch.zeros_like(self.alive).scatter(1, first, True)
        return self.to_rows(best & self.alive)

    def assign_rows(self, groups: Groups, cost: Tensor, stays: Tensor, rows: Tensor) -> Tensor:
        """The row that each of `rows` (B, r) joins, of those of its run that stay (B, n)."""
        if self.order is None or self.place is None:
            return assign_rows(groups, cost, stays, rows)
        run = self.alive.shape[1]
        every = torch.arange(run, device=cost.device).expand_as(self.alive)
        to = assign_rows(groups, cost, self.of(stays) & self.alive, every)
        first = torch.arange(self.order.shape[1], device=cost.device) // run * run
        whole = self.order.gather(1, to.view(self.order.shape) + first)
        return whole.gather(1, self.place.gather(1, rows))


def best_in_squares(cells: Tensor, grid: tuple[int, int], side: int, worth: Tensor) -> Tensor:
    """The row of the greatest worth in each square of side * side cells (B, n, bool)."""
    across = -(-grid[1] // side)
    square = (cells // grid[1]) // side * across + (cells % grid[1]) // side
    rows = torch.arange(cells.shape[1], device=cells.device)
    # A square is named by the first of its rows, since labels are rows.
    squares = across * -(-grid[0] // side)
    named = cells.new_full((cells.shape[0], squares), cells.shape[1])
    named = named.scatter_reduce(1, square, rows.expand_as(cells), "amin")
    return elect_heaviest(named.gather(1, square), worth) == rows
