"""Reductions for methods that learn: `Mix` makes each new row of all old ones; `MaskAndFuse`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.tokens.reduction import Mask, Reduction

STEP = 2.0**-12  # shares that differ by less are equal, or rounding would say which is larger


@dataclass(frozen=True)
class Mix(Reduction):
    """Makes each new row a weighted mean of all old rows, as one matrix product.

    `share` (B, m, n) is what each old row weighs in each new one. Sizes do not count. Whatever
    cannot be mixed (sizes, positions, the map to the grid) goes by groups: old row i stands with
    the new row `to[b, i]`, and `lead` (B, m) is one row of each group, which stands for it.
    """

    kind: ClassVar[str] = "merging"
    share: Tensor
    to: Tensor
    lead: Tensor

    @classmethod
    def of_slots(cls, share: Tensor) -> Mix:
        """Mixes by `share` (B, m, n), which adds up to 1 in each new row.

        An old row stands with the new one in which it weighs most, and the heaviest of a group
        leads it; of equal ones, the first. A new row that would have no old one gets one that leads
        no group.
        """
        batch, count, patches = share.shape
        weight = (share / STEP).round()
        best = _first_largest(weight, dim=1)
        members = best.unsqueeze(1) == torch.arange(count, device=share.device).unsqueeze(1)
        lead = _first_largest(weight.masked_fill(~members, -1), dim=2)
        lead = torch.where(members.any(dim=2), lead, patches)
        rows = torch.arange(patches, device=share.device).expand(batch, -1)
        slots = rows[:, :count]
        # The first empty group gets the first row that leads no other, the second the second.
        empty = lead == patches
        free = F.pad(lead, (0, 1), value=patches).gather(1, best) != rows
        place = torch.where(free, free.cumsum(dim=1) - 1, patches)
        order = F.pad(rows, (0, 1)).scatter(1, place, rows)
        lead = torch.where(empty, order.gather(1, (empty.cumsum(dim=1) - 1).clamp(min=0)), lead)
        given = torch.where(empty, lead, patches)
        return cls(share, F.pad(best, (0, 1)).scatter(1, given, slots)[:, :patches], lead)

    @property
    def merges(self) -> bool:
        """Always true: rows join."""
        return True

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Multiplies by the shares; without a weight, adds up the rows of each group."""
        patches, count = t[:, prefix:], self.lead.shape[1]
        if weight is None:
            to = self.to[(...,) + (None,) * (t.ndim - 2)].expand_as(patches)
            moved = t.new_zeros(t.shape[0], count, *t.shape[2:]).scatter_add(1, to, patches)
        else:
            share = self.share / self.share.sum(dim=2, keepdim=True)
            moved = share.to(t.dtype) @ patches.flatten(2)
            moved = moved.view(t.shape[0], count, *t.shape[2:])
        return torch.cat([t[:, :prefix], moved], dim=1) if prefix else moved

    def represent(self, t: Tensor) -> Tensor:
        """Takes the entries of the rows that lead."""
        return t.gather(1, self.lead)

    def remap(self, rows: int) -> Tensor:
        """Maps each row to the new one with which it stands."""
        return self.to


def _first_largest(t: Tensor, dim: int) -> Tensor:
    """Finds the index of the largest entry along a dimension: the first of equals, in any runtime.

    Where nothing is a number, it is the last.
    """
    count = t.shape[dim]
    index = torch.arange(count, device=t.device)
    index = index.unsqueeze(1) if dim == 1 else index
    return torch.where(t == t.amax(dim=dim, keepdim=True), index, count - 1).amin(dim=dim)


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
