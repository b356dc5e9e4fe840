"""`dtem`: merges tokens as ToMe does, but compares them by a small embedding that is trained.

Lee and Hong, "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers"
(NeurIPS 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from patchslim.errors import BadSchedule
from patchslim.methods import LearnedMethod, ModulePerBlock, Placement, Signals
from patchslim.methods._matching import compare_sets, count_pairs, first_of_sets, match_sets
from patchslim.methods._sorting import rank_rows
from patchslim.tokens.merging import Merge
from patchslim.tokens.mixing import Mix
from patchslim.tokens.rows import take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

TEMPERATURE = 0.1  # of both softmaxes in training
PARTNERS = 3  # rows of B over which a row of A spreads in training


class DTEM(LearnedMethod):
    """Merges the pairs of tokens with the most similar embeddings, which are learned.

    In training a row spreads over several partners, so that gradients reach the embedding.
    """

    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    proportional = True
    reads = ("x",)

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = ModulePerBlock(Embedding)

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes one embedding for each block that chooses."""
        self.embeddings.prepare(width, blocks)

    @property
    def missing(self) -> str | None:
        """Says that it has to be trained, unless it has embeddings."""
        if self.embeddings:
            return None
        return (
            "DTEM learns by what to compare tokens, and has not been trained yet: now it compares "
            "them by a random projection. Train it: patchslim.train, `patchslim train`."
        )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge | Mix:
        """Merges the most similar pairs; in training, in shares through which gradients pass."""
        if signals.entered is None:
            raise BadSchedule("What entered the block is known between attention and feed-forward.")
        # Only the embedding learns from this choice, not the host.
        entered = signals.entered[:, tokens.prefix :].detach()
        embed = self.embeddings.for_block(signals.block, entered.shape[2])
        similarity = compare_sets(embed(entered), tokens.prefix)
        count = tokens.patches - keep
        merge = Merge(*match_sets(similarity, tokens.prefix, count))
        return _soften(merge, similarity, tokens) if self.training else merge

    def fewest(self, patches: int) -> int:
        """Halves `patches`: each merge removes one token of A, which has half of all."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the embedding of every patch, and the similarities between A and B."""
        patches, channels = rows - prefix, embedded_channels(block.width)
        return channels * (patches * block.width + count_pairs(patches, prefix))


class Embedding(nn.Linear):
    """Projects tokens to the few channels by which they are compared."""

    def __init__(self, width: int) -> None:
        super().__init__(width, embedded_channels(width))


def embedded_channels(width: int) -> int:
    """Counts the channels of an embedding: as many as the authors' heads have, or two heads."""
    return 128 if width >= 1024 else 64


def _soften(merge: Merge, similarity: Tensor, tokens: Tokens) -> Mix:
    """Makes the same rows, to which each row of A gives a share that depends on the similarity."""
    a, b = first_of_sets(tokens.prefix)
    best = similarity.float().topk(min(PARTNERS, similarity.shape[2]), dim=2)
    goes = _relaxed_top(best.values[:, :, 0], merge.gone.shape[1])
    partners = (best.values / TEMPERATURE).softmax(dim=2) * goes.unsqueeze(2)
    into_b = torch.zeros_like(similarity, dtype=partners.dtype).scatter(2, best.indices, partners)
    itself = torch.ones_like(tokens.sizes())
    itself[:, a::2] = 1 - goes
    share = torch.diag_embed(itself)
    share[:, b::2, a::2] = into_b.transpose(1, 2)
    share = take(share, merge.kept) * tokens.sizes().unsqueeze(1)
    return Mix(share, merge.remap(tokens.patches), merge.kept)


def _relaxed_top(scores: Tensor, count: int) -> Tensor:
    """How far each row is among the `count` highest (B, n), from 0 to 1, with gradients.

    It is a sum of `count` softmaxes, the first among all rows, each next one without the highest.
    """
    draw = torch.arange(count, device=scores.device).unsqueeze(1)
    taken = rank_rows(scores).unsqueeze(1) < draw
    draws = (scores / TEMPERATURE).unsqueeze(1).masked_fill(taken, -torch.inf).softmax(dim=2)
    # Never all of a row, since what is left of one that stays is what it is made of.
    return draws.sum(dim=1).clamp(max=1 - 1e-6)
