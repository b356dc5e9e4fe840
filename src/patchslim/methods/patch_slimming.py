"""`patch_slimming`: keeps the same grid positions in all images, chosen once on a few of them.

Tang et al., "Patch Slimming for Efficient Vision Transformers" (CVPR 2022), PS-ViT. Calibration
(`patchslim calibrate`) finds the positions that each block must still output, from the last block
to the first, each set part of the set before. So the result is one order of the grid's cells and a
count for each block, which is the schedule. Nothing is scored or sorted at inference.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from patchslim.methods import LearnedMethod, Place, Placement, Signals
from patchslim.methods._ranking import centre_order, check_grid, parse_order
from patchslim.tokens.reduction import Fixed
from patchslim.tokens.tokens import Tokens


class PatchSlimming(LearnedMethod):
    """Keeps the positions that its calibration found to matter most. Calibrate it before use.

    `order` is the size of the grid and its cells, most important first: "2x2 3 0 1 2". Without an
    order, cells near the centre stay longest.
    """

    place = Place.ON_QUERIES
    placement: ClassVar[Placement] = Placement.EVERY_BLOCK

    def __init__(self, *, order: str = "") -> None:
        super().__init__()
        self.order = order
        self.grid, cells = parse_order(order) if order else ((0, 0), [])
        self.register_buffer("cells", torch.tensor(cells, dtype=torch.int64), persistent=False)

    @property
    def missing(self) -> str | None:
        """Says that it has to be calibrated, unless it has an order."""
        if self.order:
            return None
        return (
            "PatchSlimming has not been calibrated: now it keeps the patches nearest to the "
            "centre, whatever the model reads. Use patchslim.calibrate, `patchslim calibrate`."
        )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Fixed:
        """Keeps the first `keep` cells of the order."""
        if tokens.position is not None:
            return Fixed(keep)  # an earlier block has sorted the rows by the order
        return Fixed(keep, self._cell_order(tokens))

    def _cell_order(self, tokens: Tokens) -> Tensor:
        """Returns the order of the cells; refuses images with another grid."""
        if not self.order:
            return torch.tensor(centre_order(tokens.grid), device=tokens.x.device)
        check_grid(self.grid, tokens.grid)
        return self.get_buffer("cells")
