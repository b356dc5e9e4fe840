"""Orders of the cells of a grid, the last to go first: as text, from the centre, covering it.

It knows neither models nor methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.errors import BadSetting, WrongInput

KERNEL_WIDTH = 1.0  # patches: how far a patch speaks for its neighbours


def covering_order(grid: tuple[int, int]) -> list[int]:
    """An order of which every beginning is spread evenly over the grid.

    Each next cell is the one whose surroundings have least, by a Gaussian of width NEAR, of the
    cells before it, for what they would have if all cells were taken (kernel herding).
    """
    height, width = grid
    every = torch.arange(height * width)
    at = torch.stack([every // width, every % width], dim=1).double()
    kernel = torch.exp(torch.cdist(at, at).square() / (-2 * KERNEL_WIDTH**2))
    due = kernel.mean(dim=1)
    there = torch.zeros_like(due)
    order: list[int] = []
    for taken in range(1, len(every) + 1):
        need = due - there / taken
        need[order] = -torch.inf
        order.append(int(need.argmax()))
        there += kernel[order[-1]]
    return order


def cell_worth(cells: list[int]) -> Tensor:
    """A number for each cell, from 1 for the first of an order to nearly 0 for the last."""
    places = torch.empty(len(cells))
    places[torch.tensor(cells, dtype=torch.int64)] = torch.arange(len(cells), dtype=torch.float32)
    return 1 - places / max(len(cells), 1)


def check_grid(made: tuple[int, int], got: tuple[int, int]) -> None:
    """Refuses images of another grid than positions were calibrated for."""
    if got != made:
        there, here = (f"{height}x{width}" for height, width in (made, got))
        raise WrongInput(
            f"These positions were calibrated for a grid of {there} patches, and the images give "
            f"{here}. Resize the images, or calibrate the model at this size."
        )


def format_order(grid: tuple[int, int], cells: list[int]) -> str:
    """The setting that says this order of the cells."""
    return " ".join([f"{grid[0]}x{grid[1]}", *map(str, cells)])


def parse_order(order: str) -> tuple[tuple[int, int], list[int]]:
    """The grid and the order of its cells, each of them once."""
    size, *rest = order.split() or [""]
    height, cross, width = size.partition("x")
    try:
        grid, cells = (int(height), int(width)), [int(cell) for cell in rest]
    except ValueError:
        cross = ""
    if not cross or min(grid) < 1 or sorted(cells) != list(range(grid[0] * grid[1])):
        raise BadSetting(
            f"order={order[:40]!r}: give the grid and every cell of it once, the last to go first, "
            'such as "2x2 3 0 1 2". `patchslim calibrate` finds it.'
        )
    return grid, cells


def centre_order(grid: tuple[int, int]) -> list[int]:
    """The cells of a grid, those nearest to its centre first."""
    height, width = grid

    def distance(cell: int) -> tuple[int, int]:
        down, across = divmod(cell, width)
        return (2 * down - height + 1) ** 2 + (2 * across - width + 1) ** 2, cell

    return sorted(range(height * width), key=distance)
