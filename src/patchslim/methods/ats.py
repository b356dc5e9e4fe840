"""`ats`: samples patches by class attention; the more peaked attention is, the fewer stay.

Fayyaz et al., "Adaptive Token Sampling For Efficient Vision Transformers" (ECCV 2022). Class
attention, times the length of the value, is a distribution over patches. Evenly spaced points on
its cumulative sum hit patches, some of them several times. The patches that are hit are the
queries of this block, and stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.errors import BadSetting
from patchslim.methods import Method, Place, Signals
from patchslim.methods._sorting import sort_rows
from patchslim.tokens.reduction import Keep
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

EPS = 1e-12


class ATS(Method):
    """Keeps the patches that inverse-transform sampling hits, and at least `floor` of them.

    The schedule says how many samples are drawn, which is the most that an image keeps.
    """

    place = Place.ON_QUERIES
    needs_class_token: bool = True
    reads = ("k", "v")
    adaptive = True

    def __init__(self, *, floor: int = 8) -> None:
        super().__init__()
        if floor < 1:
            raise BadSetting(f"floor={floor}: at least one patch has to stay.")
        self.floor = floor

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep:
        """Keeps the patches that are nearest to evenly spaced points of the cumulative score."""
        score = self._score(tokens, signals)
        hit = _sample_mask(score, tokens.alive, keep)
        # Patches that are hit come first, by score; then the best others, in case of the floor.
        rank = torch.where(hit, 1 + score, score)
        if tokens.alive is not None:
            rank = rank.masked_fill(~tokens.alive, -torch.inf)
        most = min(keep, tokens.patches)
        kept = rank.topk(most, dim=1)
        count = hit.sum(dim=1, keepdim=True).clamp(min(self.floor, most), most)
        real = (kept.values != -torch.inf).sum(dim=1, keepdim=True)
        number = torch.arange(most, device=score.device)
        return Keep(kept.indices, padding=number < torch.minimum(count, real))

    def _score(self, tokens: Tokens, signals: Signals) -> Tensor:
        """Multiplies class attention by the length of the value; normalises the sum to 1 (B, n)."""
        attention = signals.class_attention()
        attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
        if signals.v is not None:
            values = signals.v[:, :, tokens.prefix :].transpose(1, 2).flatten(2)
            attention = attention * values.to(attention.dtype).norm(dim=2)
        if tokens.alive is not None:
            attention = attention * tokens.alive
        return attention / attention.sum(dim=1, keepdim=True).clamp(min=EPS)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts one row of the attention map, and the queries of the prefix a second time."""
        return block.attention_row_macs(rows) + prefix * block.q


def _sample_mask(score: Tensor, alive: Tensor | None, samples: int) -> Tensor:
    """Marks patches that are nearest to one of the points (2k - 1) / (2 * samples) (B, n)."""
    # Padding is sorted last, behind the end of the cumulative score, where no point can hit it.
    key = -score if alive is None else (-score).masked_fill(~alive, -torch.inf)
    order = sort_rows(key)
    reached = score.gather(1, order).cumsum(dim=1)
    first, last = reached[:, :1], reached.amax(dim=1, keepdim=True)
    reached = (reached - first) / (last - first).clamp(min=EPS)
    if alive is not None:
        reached = reached.masked_fill(~alive.gather(1, order), 4.0)
    number = torch.arange(samples, device=score.device, dtype=score.dtype)
    points = ((2 * number + 1) / (2 * samples)).expand(score.shape[0], -1)
    after = _count_below(reached, points).clamp(max=score.shape[1] - 1)
    before = (after - 1).clamp(min=0)
    nearer = points - reached.gather(1, before) <= (reached.gather(1, after) - points).abs()
    rows = order.gather(1, torch.where(nearer, before, after))
    return torch.zeros_like(score, dtype=torch.bool).scatter(
        1, rows, torch.ones_like(rows, dtype=torch.bool)
    )


def _count_below(ordered: Tensor, points: Tensor) -> Tensor:
    """How many of the ordered numbers (B, n) are below each point (B, k)."""
    if torch.compiler.is_compiling():  # runtimes have no search in ordered numbers
        return (ordered.unsqueeze(1) < points.unsqueeze(2)).sum(dim=2)
    return torch.searchsorted(ordered.contiguous(), points.contiguous())
