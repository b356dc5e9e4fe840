"""`Chain`: two reductions, one after the other, as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.tokens.reduction import Reduction


@dataclass(frozen=True)
class Chain(Reduction):
    """Carries out `first`, which leaves `between` rows, and then `second` on these."""

    kind: ClassVar[str] = "hybrid"
    first: Reduction
    between: int
    second: Reduction

    @property
    def merges(self) -> bool:
        """Whether either of them merges."""
        return self.first.merges or self.second.merges

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Moves the rows twice; a row that `first` made weighs as much as all it is made of."""
        between = None if weight is None else self.first.move(weight)
        moved = self.first.move(t, weight=weight, total=between, prefix=prefix)
        return self.second.move(moved, weight=between, total=total, prefix=prefix)

    def represent(self, t: Tensor) -> Tensor:
        """Picks the entries of the rows that come out of both."""
        return self.second.represent(self.first.represent(t))

    def remap(self, rows: int) -> Tensor:
        """Follows each row through both; -1 if either drops it."""
        first, second = self.first.remap(rows), self.second.remap(self.between)
        if first.shape[0] == 1:  # a map that all images share
            first = first.expand(second.shape[0], -1)
        elif second.shape[0] == 1:
            second = second.expand(first.shape[0], -1)
        return torch.where(first < 0, first, second.gather(1, first.clamp(min=0)))
