"""`zerotprune`: drops patches that others make redundant, and then the least important ones.

Wang, Dedhia, Jha, "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph
in Pre-Trained Transformers" (CVPR 2024), written from the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.methods import Method, Signals
from patchslim.methods._matching import compare_rows
from patchslim.settings import Range, check_value
from patchslim.tokens.reduction import Keep
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

ROUNDS = (30, 5, 1)  # of votes in the first quarter of the blocks, in the middle, in the last
SPREAD = (0.01, 0.7)  # variances between which a head tells patches apart; their mean is one
LEAST = 1e-12


class ZeroTPrune(Method):
    """Ranks patches by the votes of all rows, weighted by attention; drops `alike` ones first.

    `alike` is the share, of the patches that go, that are dropped for being like a better one.
    """

    reads = ("q", "k")

    def __init__(self, *, alike: float = 0.5) -> None:
        super().__init__()
        self.alike: float = check_value("alike", alike, float, Range(0, 1))

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep:
        """Drops those of the worse half that are most like one of the better, then the worst."""
        attention = signals.attention()
        attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
        voters = torch.ones_like(attention[:, 0, 0])
        redundant = self._count_alike(tokens.patches, keep)
        if redundant:
            order = _rank(attention, voters, tokens.prefix, 1).topk(tokens.patches, dim=1).indices
            better, worse = order.tensor_split([tokens.patches - tokens.patches // 2], dim=1)
            likest = compare_rows(signals.keys(), worse, better).amax(dim=2)
            gone = worse.gather(1, likest.topk(redundant, dim=1).indices)
            voters = voters.scatter(1, gone + tokens.prefix, 0.0)
        worth = _rank(attention, voters, tokens.prefix, _count_rounds(signals.block, signals.depth))
        worth = torch.where(voters[:, tokens.prefix :] > 0, worth, -1.0)
        return Keep(worth.topk(keep, dim=1).indices)

    def _count_alike(self, patches: int, keep: int) -> int:
        """Counts the patches that go for being like another."""
        return min(round(self.alike * (patches - keep)), patches // 2)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the attention map, a second time, and the similarities; voting is no product."""
        half = (rows - prefix) // 2
        alike = self._count_alike(rows - prefix, block.left - prefix) > 0
        compared = half * (rows - prefix - half) * block.key_width if alike else 0
        return rows * rows * block.query_width + compared


def _count_rounds(block: int, depth: int) -> int:
    """Counts the rounds of votes: many in early blocks, whose maps are far from settled."""
    early, middle, late = ROUNDS
    return early if block < depth / 4 else middle if block < depth * 3 / 4 else late


def _rank(attention: Tensor, voters: Tensor, prefix: int, rounds: int) -> Tensor:
    """Lets rows vote for what they attend to, weighted by the votes that they get (B, n).

    Rows of which `voters` (B, N) is 0 neither vote nor are voted for.
    """
    votes = voters.unsqueeze(1).expand(-1, attention.shape[1], -1)
    if prefix:  # the class token has many votes to begin with
        first = torch.arange(attention.shape[3], device=attention.device) == 0
        votes = torch.where(first, attention.shape[3] ** 0.5, votes)
    for _ in range(rounds):
        votes = (votes.unsqueeze(3) * attention).sum(dim=2) * voters.unsqueeze(1)
        votes = votes / votes.sum(dim=2, keepdim=True).clamp(min=LEAST)
    real = voters[:, prefix:].unsqueeze(1)
    count = real.sum(dim=2, keepdim=True)
    votes = votes[:, :, prefix:]
    votes = votes / (votes.sum(dim=2, keepdim=True) / count).clamp(min=LEAST)
    variance = ((votes - 1).square() * real).sum(dim=2, keepdim=True) / count
    heads = ((variance >= SPREAD[0]) & (variance <= SPREAD[1])).to(votes.dtype)
    heads = torch.where(heads.sum(dim=1, keepdim=True) > 0, heads, 1.0)
    return ((votes.square() * heads).sum(dim=1) / heads.sum(dim=1)).sqrt()
