"""`Merge`: a reduction that averages rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.tokens.reduction import Reduction, combine_masks, new_index, real_mask
from patchslim.tokens.rows import pack_rows, take, with_prefix
from patchslim.tokens.spelling import is_by_product
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
        if is_by_product():
            return out + _add_up(joining, index, out.shape[1])
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


def _add_up(t: Tensor, index: Tensor, count: int) -> Tensor:
    """Adds each row of t (B, r, ...) to the new row that `index` (B, r) names: (B, count, ...)."""
    rows = torch.arange(count, device=index.device, dtype=index.dtype)
    members = index.unsqueeze(1) == rows.unsqueeze(1)
    if t.ndim == 2:
        return torch.where(members, t.unsqueeze(1), 0).sum(dim=2)
    return (members.to(t.dtype) @ t.flatten(2)).view(t.shape[0], count, *t.shape[2:])
