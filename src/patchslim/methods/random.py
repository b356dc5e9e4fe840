"""`random`: keeps patches drawn by lot. The honest baseline: a method that loses to it is noise.

The lot is a function of the seed and of a patch's place in the grid, so that an image's answer
depends neither on its batch mates nor on rounding, and so that it compiles and exports.
"""

from __future__ import annotations

from torch import Tensor

from patchslim.methods import Method, Signals
from patchslim.tokens.reduction import Keep, Reduction
from patchslim.tokens.tokens import Tokens

PRIME = 2_147_483_647


class Random(Method):
    """Keeps the patches with the highest lots; the same places for every image, nested in depth."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """The `keep` rows with the highest lots."""
        return Keep(_random_numbers(tokens.cells(), self.seed).topk(keep, dim=1).indices)


def _random_numbers(cells: Tensor, seed: int) -> Tensor:
    """A well-mixed number for each grid cell: three rounds of a quadratic congruence."""
    lot = (cells + 1) * 48_271 + (seed + 1) * 69_621
    for constant in (12_345, 67_891, 24_683):
        lot = lot % PRIME
        lot = (lot * lot + lot * 16_807 + constant) % PRIME
    return lot.double()
