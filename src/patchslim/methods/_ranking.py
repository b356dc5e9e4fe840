"""Orders of the cells of a grid, from the cell to keep longest to the first to drop.

Reads and writes them as text, and makes two: from the centre out, and covering the grid evenly.
Knows neither models nor methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.errors import BadSetting, WrongInput

KERNEL_WIDTH = 1.0  # in cells: how far a cell stands for its neighbours


def covering_order(grid: tuple[int, int]) -> list[int]:
    """Makes an order whose first k cells are spread evenly over the grid, for every k.

    It does kernel herding: the next cell is the one around which the cells so far are missing most,
    measured with a Gaussian of `KERNEL_WIDTH` and compared with the whole grid.
    """
    height, width = grid
    every = torch.arange(height * width)
    points = torch.stack([every // width, every % width], dim=1).double()
    kernel = torch.exp(torch.cdist(points, points).square() / (-2 * KERNEL_WIDTH**2))
    wanted = kernel.mean(dim=1)
    covered = torch.zeros_like(wanted)
    order: list[int] = []
    for taken in range(1, len(every) + 1):
        missing = wanted - covered / taken
        missing[order] = -torch.inf
        order.append(int(missing.argmax()))
        covered += kernel[order[-1]]
    return order


def cell_worth(cells: list[int]) -> Tensor:
    """Turns an order into a number for each cell, from 1 for the first to nearly 0 for the last."""
    rank = torch.empty(len(cells))
    rank[torch.tensor(cells, dtype=torch.int64)] = torch.arange(len(cells), dtype=torch.float32)
    return 1 - rank / max(len(cells), 1)


def check_grid(made: tuple[int, int], got: tuple[int, int]) -> None:
    """Refuses images whose grid is not the one that positions were calibrated for."""
    if got != made:
        there, here = (f"{height}x{width}" for height, width in (made, got))
        raise WrongInput(
            f"These positions were calibrated for a grid of {there} patches, and the images give "
            f"{here}. Resize the images, or calibrate the model at this size."
        )


def format_order(grid: tuple[int, int], cells: list[int]) -> str:
    """Writes an order as the setting `order`, such as "2x2 3 0 1 2"."""
    return " ".join([f"{grid[0]}x{grid[1]}", *map(str, cells)])


def parse_order(order: str) -> tuple[tuple[int, int], list[int]]:
    """Reads the setting `order`: the grid and its cells in order, which must be complete."""
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
    """Makes an order from the centre of the grid outwards."""
    height, width = grid

    def distance(cell: int) -> tuple[int, int]:
        down, across = divmod(cell, width)
        return (2 * down - height + 1) ** 2 + (2 * across - width + 1) ** 2, cell

    return sorted(range(height * width), key=distance)
