"""`patch_slimming`: a pyramid of positions that were chosen once, on images, for all images.

Tang et al., "Patch Slimming for Efficient Vision Transformers" (CVPR 2022), PS-ViT. Which positions
each block must still give out is found from the last block down (`patchslim calibrate`), each set
inside of the one before: so it is one order of the grid's cells, and a number a block, which is the
schedule's. Nothing is scored or sorted when it runs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from patchslim.errors import BadSetting, WrongInput
from patchslim.reducer import Place, Reducer, Signals, Spread
from patchslim.reduction import Fixed, Reduction
from patchslim.tokens import Tokens


class PatchSlimming(Reducer):
    """Keeps the positions that its calibration found to matter most; calibrate it before use.

    `order` is the grid and its cells, the last to go first: "2x2 3 0 1 2". Without one, cells near
    the centre stay longest.
    """

    place = Place.ON_QUERIES
    spread: ClassVar[Spread] = Spread.EVERY_BLOCK

    def __init__(self, *, order: str = "") -> None:
        super().__init__()
        self.order = order
        self.grid, cells = parsed(order) if order else ((0, 0), [])
        self.register_buffer("cells", torch.tensor(cells, dtype=torch.int64), persistent=False)

    @property
    def lacks(self) -> str | None:
        """Calibration, where it has no order."""
        if self.order:
            return None
        return (
            "PatchSlimming has not been calibrated: now it keeps the patches nearest to the "
            "centre, whatever the model reads. Use patchslim.calibrate, `patchslim calibrate`."
        )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """The first `keep` cells of the order."""
        if tokens.position is not None:
            return Fixed(keep)  # an earlier block has put the rows in order
        return Fixed(keep, self._cells(tokens))

    def _cells(self, tokens: Tokens) -> Tensor:
        """The order of the cells, which must be of the images' grid."""
        if not self.order:
            return torch.tensor(from_the_centre(tokens.grid), device=tokens.x.device)
        if tokens.grid != self.grid:
            made, got = (f"{height}x{width}" for height, width in (self.grid, tokens.grid))
            raise WrongInput(
                f"These positions were calibrated for a grid of {made} patches, and the images "
                f"give {got}. Resize the images, or calibrate the model at this size."
            )
        return self.get_buffer("cells")


def ordered(grid: tuple[int, int], cells: list[int]) -> str:
    """The setting that says this order of the cells."""
    return " ".join([f"{grid[0]}x{grid[1]}", *map(str, cells)])


def parsed(order: str) -> tuple[tuple[int, int], list[int]]:
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


def from_the_centre(grid: tuple[int, int]) -> list[int]:
    """The cells of a grid, those nearest to its centre first."""
    height, width = grid

    def distance(cell: int) -> tuple[int, int]:
        down, across = divmod(cell, width)
        return (2 * down - height + 1) ** 2 + (2 * across - width + 1) ** 2, cell

    return sorted(range(height * width), key=distance)
