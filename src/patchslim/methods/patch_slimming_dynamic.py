"""`patch_slimming_dynamic`: Patch Slimming with positions that a small gate chooses per image.

In the style of DPS-ViT (Tang et al., CVPR 2022), whose mechanism is not published. The static
search says how many patches each block outputs. Which ones is decided for each image by a linear
gate on the tokens that enter the block. `patchslim calibrate` fits the gates to the exact score of
Patch Slimming. Each block chooses among the rows that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.methods import LearnedMethod, ModulePerBlock, Place, Placement, Signals
from patchslim.methods._ranking import cell_worth, check_grid, parse_order
from patchslim.settings import Range, check_value
from patchslim.tokens.reduction import Keep, Mask
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class PatchSlimmingDynamic(LearnedMethod):
    """Keeps the patches of each image that its calibrated gates expect to matter most.

    `order` is the order of the static method, which spreads patches over the image; `prior` is its
    weight in the score.
    """

    place = Place.ON_QUERIES
    placement: ClassVar[Placement] = Placement.EVERY_BLOCK

    def __init__(self, *, order: str = "", prior: float = 0.0) -> None:
        super().__init__()
        self.order = order
        self.prior = check_value("prior", prior, float, Range(-1e6, 1e6))
        self.grid, cells = parse_order(order) if order else ((0, 0), [])
        self.register_buffer("worth", cell_worth(cells), persistent=False)
        self.gates = ModulePerBlock(Gate)

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes one gate for each block that chooses."""
        self.gates.prepare(width, blocks)

    @property
    def missing(self) -> str | None:
        """Says that it has to be calibrated, unless it has gates."""
        if self.gates:
            return None
        return (
            "PatchSlimmingDynamic has not been calibrated: now it keeps patches by lot. Use "
            "patchslim.calibrate, `patchslim calibrate`."
        )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep | Mask:
        """Keeps the `keep` rows with the highest scores; in training, masks the others."""
        score = self.gates.for_block(signals.block, tokens.x.shape[2])(tokens.x[:, tokens.prefix :])
        if self.order:
            check_grid(self.grid, tokens.grid)
            score = score + self.prior * self.get_buffer("worth")[tokens.cells()].to(score.dtype)
        if not self.training:
            return Keep(score.topk(keep, dim=1).indices)
        if tokens.alive is not None:
            score = score.masked_fill(tokens.alive == 0, -torch.inf)
        best = score.topk(keep, dim=1)
        hard = torch.zeros_like(score).scatter(1, best.indices, 1.0)
        soft = torch.sigmoid(score - best.values[:, -1:].detach())
        return Mask(hard + (soft - soft.detach()))

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one dot product for each patch."""
        return (rows - prefix) * block.width


class Gate(nn.Module):
    """Predicts how much each patch matters (B, n), linearly from its normalised channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.worth = nn.Linear(width, 1, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Scores patches (B, n, C)."""
        return self.worth(F.layer_norm(patches, patches.shape[-1:])).squeeze(-1)  # type: ignore[no-any-return]
