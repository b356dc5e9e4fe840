"""Reductions that average rows: `Merge` with lookups, `Assign` as one matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.tokens.reduction import Reduction, combine_masks, new_index, real_mask
from patchslim.tokens.rows import pack_rows, take, with_prefix
from patchslim.tokens.tokens import Borders


@dataclass(frozen=True)
class Merge(Reduction):
    """Keeps the rows `kept` (B, m) and averages each row of `gone` (B, r) into one of them.

    `into` (B, r) is an index into `kept`: the row gone[b, i] joins the row kept[b, into[b, i]]. If
    images keep different numbers, `padding` (B, m) is True for kept rows that are real, and
    `joins` (B, r) for rows of `gone` that really join; one that neither joins nor is kept is
    dropped. `weight` (B, n) is the weight of each row
    in the mean, if it is not the row's size.
    """

    kind: ClassVar[str] = "merging"
    kept: Tensor
    gone: Tensor
    into: Tensor
    padding: Tensor | None = None
    joins: Tensor | None = None
    weight: Tensor | None = None

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
        """Takes the kept rows, each averaged with (or increased by) the rows that joined it.

        Only rows that change are touched: the mean of a group with sizes s is its kept row plus,
        for each joining row g, s_g / sum(s) times the difference between the two.
        """
        out = take(t, with_prefix(self.kept, prefix))
        joining = take(t, self.gone, prefix)
        dims = (...,) + (None,) * (t.ndim - 2)
        if weight is not None:
            if self.weight is not None:
                weight, total = self.weight, None
            total = self.move(weight) if total is None else total
            share = weight.gather(1, self.gone) / total.gather(1, self.into)
            joining = (joining - take(out, self.into, prefix)) * share.to(t.dtype)[dims]
        if self.joins is not None:
            joining = joining.masked_fill(~self.joins[dims], 0)
        index = self.into + prefix if prefix else self.into
        return out.scatter_add_(1, index[dims].expand_as(joining), joining)

    def represent(self, t: Tensor) -> Tensor:
        """Takes the entries of the kept rows."""
        return t.gather(1, self.kept)

    def remap(self, rows: int) -> Tensor:
        """Maps kept rows to their new place, the others to the row they joined, or to -1."""
        place, into = new_index(self.kept, rows, otherwise=-1), self.into
        if self.joins is not None:
            into = torch.where(self.joins | (place.gather(1, self.gone) >= 0), into, -1)
        return place.scatter(1, self.gone, into)

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """Combines the old mask with the padding."""
        return combine_masks(alive, self.padding)

    def real_mask(self, before: Borders) -> Tensor:
        """Marks the rows that come out and are real (B, m), given the lengths of the images."""
        return real_mask(self.kept, before, self.padding)

    def pack(self, before: Borders, after: Borders) -> Merge:
        """Translates to packed rows."""
        joins, weight = real_mask(self.gone, before, self.joins), self.weight
        if weight is not None:
            every = torch.arange(weight.shape[1], device=weight.device).expand_as(weight)
            weight = pack_rows(weight, real_mask(every, before, None))
        return Merge(
            kept=pack_rows(self.kept + before.first_rows(), self.real_mask(before)),
            gone=pack_rows(self.gone + before.first_rows(), joins),
            into=pack_rows(self.into + after.first_rows(), joins),
            weight=weight,
        )


@dataclass(frozen=True)
class Assign(Reduction):
    """Averages rows into `count` new ones: row i goes to the new row `to[b, i]`.

    The same as a `Merge`, as one matrix product: what graphs for other runtimes are made of. Of
    each group one row `leads` (B, n, bool); it stands for the group. `weight` as in `Merge`.
    """

    kind: ClassVar[str] = "merging"
    to: Tensor
    leads: Tensor
    count: int
    weight: Tensor | None = None

    @property
    def merges(self) -> bool:
        """Always true: rows join."""
        return True

    @cached_property
    def _members(self) -> Tensor:
        """Which old rows each new row is made of (B, m, n)."""
        new = torch.arange(self.count, device=self.to.device, dtype=self.to.dtype)
        return self.to.unsqueeze(1) == new.unsqueeze(1)

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Multiplies by the matrix that averages (or adds up) the rows of each group."""
        if weight is None and t.ndim == 2:
            # The same numbers are the weights of the mean if sizes are, and their sum its divisor.
            return (self._members * t.unsqueeze(1)).sum(dim=2)
        if weight is None:
            share = self._members.to(t.dtype)
        else:
            if self.weight is not None:
                weight, total = self.weight, None
            share = self._members * weight.unsqueeze(1)
            total = share.sum(dim=2) if total is None else total
            share = (share / total.unsqueeze(2)).to(t.dtype)
        if t.ndim == 2:
            return (share @ t.unsqueeze(2)).squeeze(2)
        moved = share @ t[:, prefix:].flatten(2)
        moved = moved.view(t.shape[0], self.count, *t.shape[2:])
        return torch.cat([t[:, :prefix], moved], dim=1) if prefix else moved

    def represent(self, t: Tensor) -> Tensor:
        """Takes the entries of the rows that lead."""
        led = self._members & self.leads.unsqueeze(1)
        return torch.where(led, t.unsqueeze(1), 0).sum(dim=2).to(t.dtype)

    def remap(self, rows: int) -> Tensor:
        """Maps each row to its new one."""
        return self.to
