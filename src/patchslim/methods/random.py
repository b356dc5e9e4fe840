"""`random`: keeps random patches. The baseline that every method has to beat.

The random number of a patch is a function of the seed and the patch's grid cell. So an image's
result depends neither on the rest of its batch nor on rounding, and it compiles and exports.
"""

from __future__ import annotations

from torch import Tensor

from patchslim.methods import Method, Signals
from patchslim.settings import Range, check_value
from patchslim.tokens.reduction import Keep, Reduction
from patchslim.tokens.tokens import Tokens

PRIME = 2_147_483_647
SEEDS = Range(-(2**32), 2**32)  # what the congruence can take without overflow


class Random(Method):
    """Keeps random patches: the same cells in every image, and in each block some of those left."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = check_value("seed", seed, int, SEEDS)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """Keeps the `keep` rows with the highest random numbers."""
        return Keep(_random_numbers(tokens.cells(), self.seed).topk(keep, dim=1).indices)


def _random_numbers(cells: Tensor, seed: int) -> Tensor:
    """Makes a number for each grid cell, by three rounds of a quadratic congruence."""
    number = (cells + 1) * 48_271 + (seed + 1) * 69_621
    for constant in (12_345, 67_891, 24_683):
        number = number % PRIME
        number = (number * number + number * 16_807 + constant) % PRIME
    return number.double()
