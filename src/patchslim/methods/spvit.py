"""`spvit`: keeps the patches that trained selectors choose, and packs the others into one token.

Kong et al., "SPViT: Enabling Faster Vision Transformers via Latency-Aware Soft Token Pruning"
(ECCV 2022). In training dropped patches are masked, as in DynamicViT, whose predictor it applies to
each head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.methods import Decision, LearnedMethod, ModulePerBlock, Place, Signals
from patchslim.methods._method import share_of_all
from patchslim.methods._predictor import KEEP_INDEX, Predictor, predictor_macs
from patchslim.settings import Range, check_value
from patchslim.tokens.mixing import MaskAndFuse
from patchslim.tokens.reduction import Fuse
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

HEAD = 64  # channels of a head, as in all models of the paper


class SPViT(LearnedMethod):
    """Keeps the patches that its selectors score highest; the others become one package token.

    `ratio` weighs the loss that keeps the share of kept patches near the schedule's. Train it
    first.
    """

    place = Place.BEFORE_BLOCK
    reads = ("x",)
    extra_rows = 1

    def __init__(self, *, ratio: float = 2.0) -> None:
        super().__init__()
        self.ratio = check_value("ratio", ratio, float, Range(0, 1e6))
        self.selectors = ModulePerBlock(Selector)

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes one selector for each block that chooses."""
        self.selectors.prepare(width, blocks)

    @property
    def missing(self) -> str | None:
        """Says that it has to be trained, unless it has selectors."""
        if self.selectors:
            return None
        return (
            "SPViT learns what to keep, and has not been trained yet: now it keeps patches at "
            "random. Train it: patchslim.train, `patchslim train`."
        )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Fuse | MaskAndFuse:
        """Keeps the `keep - 1` best rows and packs the others; in training, draws who is masked."""
        selector = self.selectors.for_block(signals.block, tokens.x.shape[2])
        # The chance to be dropped is the smaller number, so it is rounded less than that to stay.
        drops: Tensor = selector(tokens.x[:, tokens.prefix :], tokens.alive)
        if self.training:
            both = torch.stack([1 - drops, drops], dim=2).clamp(min=1e-6).log()
            drawn = F.gumbel_softmax(both, hard=True)[..., 0]
            goes = 1 - drawn if tokens.alive is None else (1 - drawn) * tokens.alive
            return MaskAndFuse(drawn, _shares((1 - drops) * goes))
        kept = drops.topk(keep - 1, dim=1, largest=False).indices
        return Fuse(kept, _shares((1 - drops).scatter(1, kept, 0.0)))

    def loss(self, decisions: Sequence[Decision]) -> Tensor | None:
        """Computes the squared distance of the share kept from the scheduled one."""
        off = [
            # Each choice has added a row, the package.
            (each.share - each.alive.sum(dim=1) / (each.alive.shape[1] - number)).square().mean()
            for number, each in enumerate(decisions, 1)
            if each.alive is not None
        ]
        return self.ratio * torch.stack(off).mean() if off else None

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Takes the geometric share of all patches, rounded down, and the package."""
        return share_of_all(rate, stage, patches, rows - 1) + 1

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one pass of a selector over all patches, and the sum that makes the package."""
        heads = head_count(block.width)
        count_heads = 2 * heads * heads if heads > 1 else 0
        return (rows - prefix) * (
            heads * predictor_macs(block.width // heads) + count_heads + block.width
        )


class Selector(nn.Module):
    """Predicts how likely a patch is dropped: a verdict of each head, and how much it counts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = head_count(width)
        self.predictor = Predictor(width // self.heads)
        for layer in self.predictor.modules():
            if isinstance(layer, nn.Linear):  # a head is narrow: small weights would all but cancel
                nn.init.xavier_uniform_(layer.weight)
        layers = [nn.Linear(self.heads, self.heads), nn.GELU(), nn.Linear(self.heads, self.heads)]
        self.attention = nn.Sequential(*(layers if self.heads > 1 else []))  # one alone is all

    def forward(self, patches: Tensor, alive: Tensor | None) -> Tensor:
        """Predicts (B, n) from patches (B, n, C), of which `alive` (B, n) are left."""
        batch, count, _ = patches.shape
        heads = patches.unflatten(2, (self.heads, -1))
        each = heads.transpose(1, 2).flatten(0, 1)
        left = None if alive is None else alive.repeat_interleave(self.heads, dim=0)
        verdict: Tensor = self.predictor(each, left)[..., 1 - KEEP_INDEX].exp()
        verdict = verdict.view(batch, self.heads, count).transpose(1, 2)
        if self.heads == 1:
            return verdict.squeeze(2)
        counts = self.attention(heads.mean(dim=3)).sigmoid()
        drops: Tensor = (verdict * counts).sum(dim=2) / counts.sum(dim=2)
        return drops


def head_count(width: int) -> int:
    """Counts heads of 64 channels; 1 if the width is no multiple of that."""
    return 1 if width % HEAD else width // HEAD


def _shares(weight: Tensor) -> Tensor:
    """Divides weights (B, n) by their sum; all zero where it is zero."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return exact / exact.sum(dim=1, keepdim=True).clamp(min=1e-12)
