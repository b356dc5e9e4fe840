"""`Reduction`: what becomes of the patch rows, as a frozen value that a method returns.

* `Keep` keeps some rows and drops the others.
* `Fixed` does the same, with the same rows in every image.
* `Fuse` adds all other rows up in one extra row.
* `Defer` lets some rows go on while the others wait.
* `Mask` removes nothing: it only lowers the weight of rows in attention, for training.
* `Merge`, in `merging.py`, averages rows.
* `Mix`, in `mixing.py`, makes each new row of all old ones; `MaskAndFuse` is for training.

It does not know why it was chosen. Prefix rows pass untouched; row numbers count patch rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.tokens.rows import pack_rows, take, with_prefix
from patchslim.tokens.tokens import Borders, Deferred, Tokens


@dataclass(frozen=True)
class Reduction(ABC):
    """What becomes of n patch rows, m of which come out.

    Attributes:
        kind: what the literature calls methods that do this: "pruning", "merging" or "hybrid".
    """

    kind: ClassVar[str]

    @property
    def merges(self) -> bool:
        """Whether a row that comes out may stand for several that went in."""
        return False

    @abstractmethod
    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Applies the reduction to rows: t (B, prefix + n, ...) gives (B, prefix + m, ...).

        Rows that join are averaged by `weight` (B, n), or added up if it is None. `total` (B, m)
        is the weight after the move, for callers that have computed it already.
        """

    @abstractmethod
    def represent(self, t: Tensor) -> Tensor:
        """Picks the entries of the rows that come out, one of each group: (B, n) to (B, m)."""

    @abstractmethod
    def remap(self, rows: int) -> Tensor:
        """Maps each of the n old rows to its new row, or to -1 if it is dropped (B or 1, n)."""

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """Returns the `alive` mask afterwards, given the old mask in the new order of rows."""
        return alive

    def deferred(self, tokens: Tokens, x: Tensor) -> Deferred | None:
        """Notes what waits while the rows `x` go on: nothing, unless this is a `Defer`."""
        return None

    def apply(self, tokens: Tokens, borders: Borders | None = None) -> Tokens:
        """Returns the reduced tokens: features averaged, sizes added, the rest moved along.

        In a packed batch, `borders` says where images begin and end afterwards.
        """
        before, size = None, None
        if tokens.size is not None or self.merges:
            before = tokens.sizes()
            size = self.move(before)
        origin = tokens.origin
        if origin is not None:
            new_row = self.remap(tokens.patches).to(origin.device).expand(origin.shape[0], -1)
            new_row = new_row.gather(1, origin.clamp(min=0))
            origin = torch.where(origin >= 0, new_row, origin)
        alive = None if tokens.alive is None else self.represent(tokens.alive)
        x = self.move(tokens.x, weight=before, total=size, prefix=tokens.prefix)
        return Tokens(
            x=x,
            prefix=tokens.prefix,
            grid=tokens.grid,
            size=size,
            position=self.represent(tokens.cells()),
            alive=self.mask(alive),
            origin=origin,
            rotary=tokens.rotary,
            content=tokens.content,
            borders=borders,
            memory=None if tokens.memory is None else self.represent(tokens.memory),
            deferred=self.deferred(tokens, x),
            frames=tokens.frames,
        )

    def fold(self, attention: Tensor, prefix: int) -> Tensor:
        """Reduces an attention map (B, H, N, N): rows that join are averaged, columns added."""
        batch, heads, count, _ = attention.shape
        rows = attention.transpose(1, 2).flatten(2)
        even = attention.new_ones(batch, count - prefix)
        rows = self.move(rows, weight=even, prefix=prefix).unflatten(2, (heads, count))
        columns = self.move(rows.permute(0, 3, 1, 2).flatten(2), prefix=prefix)
        folded = columns.unflatten(2, (rows.shape[1], heads)).permute(0, 3, 2, 1)
        normed: Tensor = folded / folded.sum(dim=-1, keepdim=True)
        return normed


@dataclass(frozen=True)
class Keep(Reduction):
    """Keeps the rows `kept` (B, m), in this order, and drops the others.

    If images keep different numbers, `padding` (B, m, bool) is False for rows of padding.
    """

    kind: ClassVar[str] = "pruning"
    kept: Tensor
    padding: Tensor | None = None

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Takes the kept rows."""
        return take(t, with_prefix(self.kept, prefix))

    def represent(self, t: Tensor) -> Tensor:
        """Takes the entries of the kept rows."""
        return t.gather(1, self.kept)

    def remap(self, rows: int) -> Tensor:
        """Maps kept rows to their new place, the others to -1."""
        if self.padding is None:
            return new_index(self.kept, rows, otherwise=-1)
        place = torch.arange(self.kept.shape[1], device=self.kept.device).masked_fill(
            ~self.padding, -1
        )
        return self.kept.new_full((self.kept.shape[0], rows), -1).scatter(1, self.kept, place)

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """Combines the old mask with the padding."""
        return combine_masks(alive, self.padding)

    def real_mask(self, before: Borders) -> Tensor:
        """Marks the rows that come out and are real (B, m), given the lengths of the images."""
        return real_mask(self.kept, before, self.padding)

    def pack(self, before: Borders, after: Borders) -> Keep:
        """Translates to packed rows."""
        return Keep(pack_rows(self.kept + before.first_rows(), self.real_mask(before)))


@dataclass(frozen=True)
class Fixed(Reduction):
    """Keeps the same rows in every image: the first `count` of `order` (n,).

    Without an order, the first `count` rows. Nothing depends on the images, so that an exported
    graph has a constant gather or a slice here.
    """

    kind: ClassVar[str] = "pruning"
    count: int
    order: Tensor | None = None

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Takes the rows that stay."""
        if self.order is None:
            return t[:, : prefix + self.count]
        kept = t[:, prefix:].index_select(1, self.order[: self.count])
        return torch.cat([t[:, :prefix], kept], dim=1) if prefix else kept

    def represent(self, t: Tensor) -> Tensor:
        """Takes the entries of the rows that stay."""
        return self.move(t)

    def remap(self, rows: int) -> Tensor:
        """Maps rows that stay to their new place, the others to -1."""
        kept = torch.arange(rows) if self.order is None else self.order
        return new_index(kept[None, : self.count], rows, otherwise=-1)


@dataclass(frozen=True)
class Fuse(Reduction):
    """Keeps the rows `kept` (B, m-1); the others, times their `share` (B, n), add up in a last row.

    The share of a kept row is 0. Shares need not add up to 1: it is a sum, not a mean.
    """

    kind: ClassVar[str] = "hybrid"
    kept: Tensor
    share: Tensor

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
        """Takes the kept rows, and adds the fused row: the plain sum if there is no weight."""
        out = take(t, with_prefix(self.kept, prefix))
        share = self.share.to(t.dtype)
        if weight is None:
            share = new_index(self.kept, t.shape[1] - prefix, otherwise=-1).lt(0).to(t.dtype)
        if t.ndim == 2:
            return torch.cat([out, (share * t[:, prefix:]).sum(dim=1, keepdim=True)], dim=1)
        fused = share.unsqueeze(1) @ t[:, prefix:].flatten(2)
        return torch.cat([out, fused.view(t.shape[0], 1, *t.shape[2:])], dim=1)

    def represent(self, t: Tensor) -> Tensor:
        """Takes the entries of the kept rows; for the fused row, that of the largest share."""
        # A kept row must not stand for the fused one, even if all shares have underflowed to 0.
        heaviest = self.share.scatter(1, self.kept, -1.0).argmax(dim=1, keepdim=True)
        return t.gather(1, torch.cat([self.kept, heaviest], dim=1))

    def remap(self, rows: int) -> Tensor:
        """Maps kept rows to their new place, the others to the fused row."""
        return new_index(self.kept, rows, otherwise=self.kept.shape[1])


@dataclass(frozen=True)
class Defer(Reduction):
    """Lets the rows that `slow` leaves go on; the others wait until `Tokens.rejoin`.

    If `slow` is a `Fuse`, its last row stands in for the rows that wait, and they come back moved
    by what it has gained meanwhile. If it is a `Keep`, they come back unchanged.
    """

    kind: ClassVar[str] = "hybrid"
    slow: Keep | Fuse

    @property
    def merges(self) -> bool:
        """Whether one row stands for several that wait."""
        return self.slow.merges

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Takes the rows that go on."""
        return self.slow.move(t, weight=weight, total=total, prefix=prefix)

    def represent(self, t: Tensor) -> Tensor:
        """Takes the entries of the rows that go on."""
        return self.slow.represent(t)

    def remap(self, rows: int) -> Tensor:
        """Maps rows that go on to their new place; those that wait to their stand-in, or to -1."""
        return self.slow.remap(rows)

    def deferred(self, tokens: Tokens, x: Tensor) -> Deferred:
        """Notes all tokens, which rows go on, and the stand-in as it is now."""
        return Deferred(tokens, self.slow.kept, x[:, -1:] if isinstance(self.slow, Fuse) else None)


@dataclass(frozen=True)
class Mask(Reduction):
    """Keeps all rows; `alive` (B, n), from 0 to 1, is what each weighs in attention."""

    kind: ClassVar[str] = "pruning"
    alive: Tensor

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Returns all rows unchanged."""
        return t

    def represent(self, t: Tensor) -> Tensor:
        """Returns all entries unchanged."""
        return t

    def remap(self, rows: int) -> Tensor:
        """Maps every row to itself."""
        every = torch.arange(rows, device=self.alive.device)
        return every.expand(self.alive.shape[0], -1)

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """Multiplies the old mask by this one: a dropped row stays dropped."""
        return self.alive if alive is None else alive * self.alive


def combine_masks(alive: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Combines a mask with padding; either may be missing."""
    if alive is None or padding is None:
        return padding if alive is None else alive
    return alive * padding


def real_mask(rows: Tensor, before: Borders, padding: Tensor | None) -> Tensor:
    """Marks which of `rows` (B, m) exist in their image and are no padding."""
    exists = rows < torch.tensor(before.counts, device=rows.device).unsqueeze(1)
    return exists if padding is None else exists & padding


def new_index(kept: Tensor, rows: int, *, otherwise: int) -> Tensor:
    """Finds the index in `kept` of each of `rows` old rows, or `otherwise` (B, rows)."""
    batch, count = kept.shape
    every = torch.arange(count, device=kept.device).expand(batch, -1)
    return kept.new_full((batch, rows), otherwise).scatter(1, kept, every)
