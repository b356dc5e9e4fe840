"""`random`: keeps random patches. The baseline that every method has to beat.

The random number of a patch is a function of the seed and the patch's grid cell. So an image's
result depends neither on the rest of its batch nor on rounding, and it compiles and exports.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from patchslim.methods import Method, Signals
from patchslim.settings import Range, check_value
from patchslim.tokens.reduction import Keep
from patchslim.tokens.tokens import Tokens

PRIME = 2_147_483_647
SEEDS = Range(-(2**32), 2**32)  # what the congruence can take without overflow
Cells = TypeVar("Cells", int, Tensor)


class Random(Method):
    """Keeps random patches: the same cells in every image, and in each block some of those left."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = check_value("seed", seed, int, SEEDS)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep:
        """Keeps the `keep` rows with the highest random numbers."""
        cells = tokens.cells()
        if torch.compiler.is_compiling():
            # A table, since runtimes multiply in 32 bits, which would be another mask.
            height, width = tokens.grid
            table = cell_ranks(height * width, self.seed)
            number = torch.tensor(table, dtype=torch.float32, device=cells.device)[cells]
        else:
            number = _random_numbers(cells, self.seed).double()
        return Keep(number.topk(keep, dim=1).indices)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cell_ranks(count: int, seed: int) -> tuple[int, ...]:
    """The ranks of the random numbers of the cells from 0 to `count` - 1: 0 for the least."""
    numbers = [_random_numbers(cell, seed) for cell in range(count)]
    ranks = {number: rank for rank, number in enumerate(sorted(numbers))}
    return tuple(ranks[number] for number in numbers)


def _random_numbers(cells: Cells, seed: int) -> Cells:
    """Makes a number for each grid cell, by three rounds of a quadratic congruence."""
    number = (cells + 1) * 48_271 + (seed + 1) * 69_621
    for constant in (12_345, 67_891, 24_683):
        number = number % PRIME
        number = (number * number + number * 16_807 + constant) % PRIME
    return number
