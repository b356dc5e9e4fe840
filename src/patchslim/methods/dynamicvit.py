"""`dynamicvit`: keeps the patches that small predictors, trained with the host, score highest.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification" (NeurIPS
2021). While it trains, no patch is removed: dropped patches are masked in attention, by a sampled
0 or 1 through which gradients reach the predictor. At inference the best patches are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.methods import Decision, LearnedMethod, ModulePerBlock, Place, Signals
from patchslim.methods._method import share_of_all
from patchslim.methods._predictor import KEEP_INDEX, Predictor, predictor_macs
from patchslim.settings import Range, check_value
from patchslim.tokens.reduction import Keep, Mask
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


class DynamicViT(LearnedMethod):
    """Keeps the patches that its trained predictors score highest. Train it before you use it.

    `ratio` weighs the loss that keeps the share of kept patches near the schedule's.
    """

    place = Place.BEFORE_BLOCK
    training_defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 0.5,
        "distil_weight": 0.5,
        "host_lr": 0.01,
    }

    def __init__(self, *, ratio: float = 2.0) -> None:
        super().__init__()
        self.ratio = check_value("ratio", ratio, float, Range(0, 1e6))
        self.predictors = ModulePerBlock(Predictor)

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes one predictor for each block that chooses."""
        self.predictors.prepare(width, blocks)

    @property
    def missing(self) -> str | None:
        """Says that it has to be trained, unless it has predictors."""
        if self.predictors:
            return None
        return (
            "DynamicViT learns what to keep, and has not been trained yet: now it keeps patches at "
            "random. Train it: patchslim.train, `patchslim train`."
        )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep | Mask:
        """Samples a mask in training; otherwise keeps the `keep` rows with the highest scores."""
        predictor = self.predictors.for_block(signals.block, tokens.x.shape[2])
        wanted = predictor(tokens.x[:, tokens.prefix :], tokens.alive)
        if self.training:
            # In half precision, the shares in the loss would be off by half a percent.
            exact = wanted.to(torch.promote_types(wanted.dtype, torch.float32))
            return Mask(F.gumbel_softmax(exact, hard=True)[..., KEEP_INDEX])
        return Keep(wanted[..., KEEP_INDEX].topk(keep, dim=1).indices)

    def loss(self, decisions: Sequence[Decision]) -> Tensor | None:
        """Computes the squared distance of the share kept from the scheduled one (eq. 17)."""
        off = [
            (each.share - each.alive.mean(dim=1)).square().mean()
            for each in decisions
            if each.alive is not None
        ]
        return self.ratio * torch.stack(off).mean() if off else None

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Takes the geometric share of all patches, rounded down, as published."""
        return share_of_all(rate, stage, patches, rows)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one pass of a predictor over all patches."""
        return (rows - prefix) * predictor_macs(block.width)
