"""Reductions for methods that learn: `Mix` makes each new row of all old ones; `MaskAndFuse`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.tokens.merging import Assign, find_members
from patchslim.tokens.reduction import Mask


@dataclass(frozen=True, kw_only=True)
class Mix(Assign):
    """Makes each new row a weighted mean of all old rows, as one matrix product.

    `share` (B, m, n) is what each old row weighs in each new one. Sizes do not count. Whatever
    cannot be mixed (sizes, positions, the map to the grid) follows the groups of an `Assign`.
    """

    kind: ClassVar[str] = "merging"
    share: Tensor

    @classmethod
    def of_slots(cls, share: Tensor) -> Mix:
        """Mixes by `share` (B, m, n), which adds up to 1 in each new row.

        An old row belongs to the new one in which it weighs most, and the heaviest of a group
        leads it. A new row that would have no old one gets one that leads no group.
        """
        count, rows = share.shape[1:]
        best = share.argmax(dim=1)
        members = find_members(best, count)
        empty = ~members.any(dim=2, keepdim=True)
        heaviest = share.masked_fill(~members, -1).argmax(dim=2, keepdim=True)
        every = torch.arange(rows, device=share.device)
        leads = ((heaviest == every) & ~empty).any(dim=1)
        # The first empty group gets the first row that leads no other, the second the second.
        free = ~leads.unsqueeze(1)
        given = free & empty & (free.cumsum(dim=2) == empty.cumsum(dim=1))
        moves = given.any(dim=1)
        to = torch.where(moves, given.long().argmax(dim=1), best)
        return cls(to, leads | moves, count, share=share)

    @property
    def _members(self) -> Tensor:
        """Which old rows each new row stands for (B, m, n); the compiler cannot trace a cache."""
        return find_members(self.to, self.count)

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Multiplies by the shares; without a weight, adds up the rows of each group."""
        if weight is None:
            return super().move(t, total=total, prefix=prefix)
        share = self.share / self.share.sum(dim=2, keepdim=True)
        moved = share.to(t.dtype) @ t[:, prefix:].flatten(2)
        moved = moved.view(t.shape[0], self.count, *t.shape[2:])
        return torch.cat([t[:, :prefix], moved], dim=1) if prefix else moved


@dataclass(frozen=True)
class MaskAndFuse(Mask):
    """Masks rows as a `Mask` does, and adds one more: what a `Fuse` makes of those it masks.

    `share` (B, n) is what each row gives to the last one. It adds up to 1, or is 0 throughout if
    nothing is masked; then the last row is masked itself. For training.
    """

    kind: ClassVar[str] = "hybrid"
    share: Tensor

    @property
    def merges(self) -> bool:
        """Always true: the last row stands for all that are masked now."""
        return True

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Adds the fused row: a sum by shares, or if there is no weight, of all that is masked."""
        t = super().move(t, weight=weight, total=total, prefix=prefix)
        given = 1 - self.alive.detach() if weight is None else self.share
        given = given.to(t.dtype)[(...,) + (None,) * (t.ndim - 2)]
        return torch.cat([t, (given * t[:, prefix:]).sum(dim=1, keepdim=True)], dim=1)

    def represent(self, t: Tensor) -> Tensor:
        """Adds the entry of the row that gives most."""
        return torch.cat([t, t.gather(1, self.share.argmax(dim=1, keepdim=True))], dim=1)

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """Multiplies the masks; the added row is there if anything was given to it."""
        there = self.share.detach().sum(dim=1, keepdim=True).round()
        before = self.alive if alive is None else alive[:, :-1] * self.alive
        return torch.cat([before, there], dim=1)
