"""`evo`: half of the patches go on; one representative token goes on for those that wait.

Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer" (AAAI 2022). No patch
is dropped. Those that wait are moved by what their representative token gains, and all are back at
the next selection, so the grid is complete at every depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchslim.errors import BadSchedule, BadSetting
from patchslim.methods import LearnedMethod, Place, Placement, Signals
from patchslim.tokens.reduction import Defer, Fixed, Fuse, Keep
from patchslim.tokens.rows import strided_cells
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class Evo(LearnedMethod):
    """Lets the patches with the most global class attention go on; the others wait.

    Global class attention is a moving average over blocks. The newest block weighs `tradeoff`, or
    `early` while no patch waits; a patch that waits keeps its value. With `learned`, each block
    has a trade-off of its own, trained with the model (LeViT). Without `representative`, patches
    that wait are not changed, as in the simplified official code for DeiT.
    """

    place = Place.BEFORE_BLOCK
    placement = Placement.UNITS
    needs_class_token: bool = True
    reads = ("k",)
    defers = True
    training_defaults: ClassVar[Mapping[str, Any]] = {"layered": 2 / 3}

    def __init__(
        self,
        *,
        representative: bool = True,
        tradeoff: float = 0.5,
        early: float = 1.0,
        learned: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("tradeoff", tradeoff), ("early", early)):
            if not 0 < value <= 1:
                raise BadSetting(
                    f"{name}={value:g}: a weight of the newest block, above 0 up to 1."
                )
        if learned and not representative:
            raise BadSetting(
                "learned=True needs representative=True: the trade-off is learned through the "
                "weights of the representative token, and there would be none."
            )
        self.representative = representative
        self.tradeoff = tradeoff
        self.early = early
        self.learned = learned
        self.extra_rows = int(representative)
        self.mixing = nn.ParameterDict()

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes one trade-off for each block before the last selection, if they are learned."""
        if self.learned and not self.mixing:
            for block in range(1, max(blocks, default=0)):
                self.mixing[str(block)] = nn.Parameter(torch.zeros(()))

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Fixed | Defer:
        """Lets the `keep` patches with the most global class attention go on."""
        attention = tokens.memory
        if attention is None:
            raise BadSchedule(f"Evo cannot select in block {signals.block}: nothing was attended.")
        if keep >= tokens.patches:
            return Fixed(tokens.patches)
        kept = attention.topk(keep - self.extra_rows, dim=1).indices
        if not self.representative:
            return Defer(Keep(kept))
        waiting = attention.scatter(1, kept, 0.0)
        # If attention to all of them has underflowed to 0, the representative is 0 and not NaN.
        total = waiting.sum(dim=1, keepdim=True).clamp(min=torch.finfo(waiting.dtype).tiny)
        return Defer(Fuse(kept, share=waiting / total))

    def remember(self, tokens: Tokens, signals: Signals) -> Tensor:
        """Updates the global class attention of each patch.

        If this block subsamples the grid, the patches that are left get the sum that all had.
        """
        newest, known = signals.class_attention(), tokens.memory
        if known is None:
            return newest
        newest = known + self._block_tradeoff(tokens, signals) * (newest - known)
        if signals.stride > 1:
            left = newest.index_select(1, strided_cells(tokens.grid, signals.stride, newest.device))
            scale = left.sum(dim=1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
            newest = newest * (known.sum(dim=1, keepdim=True) / scale)
        return newest

    def _block_tradeoff(self, tokens: Tokens, signals: Signals) -> float | Tensor:
        """Returns the weight of the newest attention in this block."""
        block = str(signals.block)
        if block in self.mixing:
            learned: Tensor = self.mixing[block].sigmoid()
            return learned
        # No patch waits in a block that subsamples the grid, but it still counts as a late one.
        return self.tradeoff if tokens.deferred or signals.stride > 1 else self.early

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Counts the share of all patches, rounded down, and the representative token."""
        kept = int(rate * patches + 1e-9)
        return min(patches, kept + self.extra_rows)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the weighted sum of the patches that wait."""
        return self.extra_rows * (rows - prefix) * block.width
