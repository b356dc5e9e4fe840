"""A method of your own: keep every patch in an even row of the grid first, then the others.

A method reads the tokens and what the block has computed, and returns a decision. It works for
every family of models. The library need not know of it: pass an instance.
"""

import timm
import torch

import patchslim
from patchslim.methods import Method, Signals
from patchslim.tokens.reduction import Keep, Reduction
from patchslim.tokens.tokens import Tokens


class EvenRows(Method):
    """Keeps patches of even grid rows first, in raster order."""

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """Keeps the `keep` patches that come first."""
        cells, width = tokens.cells(), tokens.grid[1]
        odd = (cells // width) % 2
        wanted_least = odd * tokens.grid[0] * width + cells
        return Keep(wanted_least.topk(keep, dim=1, largest=False).indices)


torch.manual_seed(0)
model = timm.create_model("deit_tiny_patch16_224").eval()
slimmed = patchslim.slim(model, EvenRows(), keep_rate=0.5, at=(2,))
after = slimmed.trace(torch.randn(1, 3, 224, 224))[-1]

print("tokens after each block:", *slimmed.counts())
print("grid rows that survive:", sorted({int(cell) // 14 for cell in after.cells()[0]}))
