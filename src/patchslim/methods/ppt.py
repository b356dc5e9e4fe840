"""`ppt`: in each block, prunes an image whose scores differ much, and merges one whose do not.

Wu et al., "PPT: Token Pruning and Pooling for Efficient Vision Transformers" (2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.errors import BadSchedule
from patchslim.methods import Method, Signals
from patchslim.methods._matching import compare_sets, count_pairs, match_sets
from patchslim.settings import Range, check_value
from patchslim.tokens.merging import Merge
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

LEAST = 1e-12


class PPT(Method):
    """Drops the patches of the lowest scores, or merges the most similar pairs, image by image.

    The score of a patch is class attention times the length of its value; an image's add up to
    one. If their variance is below `threshold`, they tell little, and the image is merged.
    """

    needs_class_token: bool = True
    proportional = True

    def __init__(self, *, threshold: float = 7e-5) -> None:
        super().__init__()
        self.threshold: float = check_value("threshold", threshold, float, Range(0, 1))

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Works out both ways, and takes one of them for each image."""
        score = _score(tokens, signals)
        spread = (score - score.mean(dim=1, keepdim=True)).square().sum(dim=1, keepdim=True)
        merges = spread / max(tokens.patches - 1, 1) < self.threshold
        order = score.topk(tokens.patches, dim=1).indices
        similarity = compare_sets(signals.keys(), tokens.prefix)
        kept, gone, into = match_sets(similarity, tokens.prefix, tokens.patches - keep)
        return Merge(
            torch.where(merges, kept, order[:, :keep]),
            torch.where(merges, gone, order[:, keep:]),
            into,
            joins=merges.expand_as(gone),
        )

    def fewest(self, patches: int) -> int:
        """Halves `patches`: each merge removes one token of A, which has half of all."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one row of the attention map, a second time, and the similarities."""
        return block.attention_row_macs(rows) + count_pairs(rows - prefix, prefix) * block.key_width


def _score(tokens: Tokens, signals: Signals) -> Tensor:
    """Multiplies class attention by the length of the value; the scores of an image sum to one."""
    if signals.v is None:
        raise BadSchedule("Values exist only inside a block; this method decides before it.")
    dtype = torch.promote_types(signals.v.dtype, torch.float32)
    values = signals.v[:, :, tokens.prefix :].transpose(1, 2).flatten(2).to(dtype)
    score = signals.class_attention().to(dtype) * values.norm(dim=2)
    shares: Tensor = score / score.sum(dim=1, keepdim=True).clamp(min=LEAST)
    return shares
