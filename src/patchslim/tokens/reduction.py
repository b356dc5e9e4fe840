"""`Reduction`: a decision about rows, frozen, applicable to anything token-shaped.

A reduction does not know why it was decided, nor by whom. It acts on the patch rows; the prefix
rows pass through untouched. `Keep` drops the others, and so does `Fixed`, the same in every image;
`Merge` adds them to kept ones, `Fuse` adds them up in one extra row, `Mask` leaves all rows in
place and only silences them; `Park` lets some go on while the others wait.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from patchslim.tokens.rows import pack_rows, take, with_prefix
from patchslim.tokens.tokens import Borders, Deferred, Tokens


@dataclass(frozen=True)
class Reduction(ABC):
    """What becomes of the n patch rows: m of them come out."""

    @property
    def merges(self) -> bool:
        """Whether rows that come out stand for several that went in."""
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
        """Rows after the reduction: t (B, prefix + n, ...) to (B, prefix + m, ...).

        Rows that join are averaged with `weight` (B, n), or simply added where it is None. `total`
        (B, m) is the weight after the move, for callers that have it already.
        """

    @abstractmethod
    def represent(self, t: Tensor) -> Tensor:
        """Of each group that joined, the entry of the row that speaks for it: (B, n) to (B, m)."""

    @abstractmethod
    def remap(self, rows: int) -> Tensor:
        """For each of the n old rows its new row, or -1 where it was dropped (B or 1, n)."""

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """The alive mask after the reduction, given the old one in the new order."""
        return alive

    def deferred(self, tokens: Tokens, x: Tensor) -> Deferred | None:
        """What of `tokens` waits while the rows `x` that this leaves go on: nothing, usually."""
        return None

    def apply(self, tokens: Tokens, borders: Borders | None = None) -> Tokens:
        """The tokens after this reduction: features averaged, sizes added, the rest carried along.

        Of a packed batch, `borders` says where images begin and end afterwards.
        """
        before, size = None, None
        if tokens.size is not None or self.merges:
            before = tokens.sizes()
            size = self.move(before)
        origin = tokens.origin
        if origin is not None:
            moved = self.remap(tokens.patches).to(origin.device).expand(origin.shape[0], -1)
            moved = moved.gather(1, origin.clamp(min=0))
            origin = torch.where(origin >= 0, moved, origin)
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
        )

    def fold(self, attention: Tensor, prefix: int) -> Tensor:
        """A map (B, H, N, N) between the rows that come out: rows averaged, columns added."""
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
    """Rows `kept` (B, m) stay and the others are dropped.

    `padding` (B, m, bool) says which of them are real, where images keep different numbers.
    """

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
        """The kept rows."""
        return take(t, with_prefix(self.kept, prefix))

    def represent(self, t: Tensor) -> Tensor:
        """The entries of the kept rows."""
        return t.gather(1, self.kept)

    def remap(self, rows: int) -> Tensor:
        """Kept rows to their new place, the others to -1."""
        if self.padding is None:
            return _new_index(self.kept, rows, otherwise=-1)
        place = torch.arange(self.kept.shape[1], device=self.kept.device).masked_fill(
            ~self.padding, -1
        )
        return self.kept.new_full((self.kept.shape[0], rows), -1).scatter(1, self.kept, place)

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """The old mask, and the padding."""
        return _combine_masks(alive, self.padding)

    def real_mask(self, before: Borders) -> Tensor:
        """Which rows that come out are real (B, m), of images of these lengths."""
        return _real_mask(self.kept, before, self.padding)

    def pack(self, before: Borders, after: Borders) -> Keep:
        """The same of images that lie behind one another, a batch of one."""
        return Keep(pack_rows(self.kept + before.first_rows(), self.real_mask(before)))


@dataclass(frozen=True)
class Fixed(Reduction):
    """The same rows stay in every image: the first `count` of `order` (n,), or of all as they are.

    Nothing here depends on the images: in an exported graph it is a constant gather, or a slice.
    """

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
        """The rows that stay."""
        if self.order is None:
            return t[:, : prefix + self.count]
        kept = t[:, prefix:].index_select(1, self.order[: self.count])
        return torch.cat([t[:, :prefix], kept], dim=1) if prefix else kept

    def represent(self, t: Tensor) -> Tensor:
        """The entries of the rows that stay."""
        return self.move(t)

    def remap(self, rows: int) -> Tensor:
        """Rows that stay to their new place, the others to -1."""
        kept = torch.arange(rows) if self.order is None else self.order
        return _new_index(kept[None, : self.count], rows, otherwise=-1)


@dataclass(frozen=True)
class Merge(Reduction):
    """Rows `kept` (B, m) stay; each of `gone` (B, r) joins the kept row number `into` (B, r).

    Where images keep different numbers, `padding` (B, m) says which kept rows are real, and
    `joins` (B, r) which of `gone` really join. `weight` (B, n) is what rows count in a mean, where
    that is not their size.
    """

    kept: Tensor
    gone: Tensor
    into: Tensor
    padding: Tensor | None = None
    joins: Tensor | None = None
    weight: Tensor | None = None

    @property
    def merges(self) -> bool:
        """They do."""
        return True

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Kept rows, each moved towards (or increased by) the rows that joined it.

        Only the rows that change are touched: a mean of sizes s is reached from the kept row by
        adding s_g / (sum of s) times the difference to each joining row.
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
        return out.scatter_add(1, index[dims].expand_as(joining), joining)

    def represent(self, t: Tensor) -> Tensor:
        """The entries of the kept rows."""
        return t.gather(1, self.kept)

    def remap(self, rows: int) -> Tensor:
        """Kept rows to their new place, the others to the row they joined."""
        return _new_index(self.kept, rows, otherwise=-1).scatter(1, self.gone, self.into)

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """The old mask, and the padding."""
        return _combine_masks(alive, self.padding)

    def real_mask(self, before: Borders) -> Tensor:
        """Which rows that come out are real (B, m), of images of these lengths."""
        return _real_mask(self.kept, before, self.padding)

    def pack(self, before: Borders, after: Borders) -> Merge:
        """The same of images that lie behind one another, a batch of one."""
        joins, weight = _real_mask(self.gone, before, self.joins), self.weight
        if weight is not None:
            every = torch.arange(weight.shape[1], device=weight.device).expand_as(weight)
            weight = pack_rows(weight, _real_mask(every, before, None))
        return Merge(
            kept=pack_rows(self.kept + before.first_rows(), self.real_mask(before)),
            gone=pack_rows(self.gone + before.first_rows(), joins),
            into=pack_rows(self.into + after.first_rows(), joins),
            weight=weight,
        )


@dataclass(frozen=True)
class Fuse(Reduction):
    """Rows `kept` (B, m-1) stay; the others times their `share` (B, n) add up in a last row.

    The share of a kept row is zero. Shares need not sum to one: the row is a sum, not a mean.
    """

    kept: Tensor
    share: Tensor

    @property
    def merges(self) -> bool:
        """They do."""
        return True

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Kept rows and the fused row; where rows are added, the fused row adds all that left."""
        out = take(t, with_prefix(self.kept, prefix))
        share = self.share.to(t.dtype)
        if weight is None:
            share = _new_index(self.kept, t.shape[1] - prefix, otherwise=-1).lt(0).to(t.dtype)
        if t.ndim == 2:
            return torch.cat([out, (share * t[:, prefix:]).sum(dim=1, keepdim=True)], dim=1)
        fused = share.unsqueeze(1) @ t[:, prefix:].flatten(2)
        return torch.cat([out, fused.view(t.shape[0], 1, *t.shape[2:])], dim=1)

    def represent(self, t: Tensor) -> Tensor:
        """The entries of the kept rows, and for the fused row the one with the largest share."""
        # A kept row never speaks for the others, even where all shares have underflowed to zero.
        heaviest = self.share.scatter(1, self.kept, -1.0).argmax(dim=1, keepdim=True)
        return t.gather(1, torch.cat([self.kept, heaviest], dim=1))

    def remap(self, rows: int) -> Tensor:
        """Kept rows to their new place, the others to the fused row."""
        return _new_index(self.kept, rows, otherwise=self.kept.shape[1])


@dataclass(frozen=True)
class Defer(Reduction):
    """The rows that `slow` leaves go on, and the others wait until all are rejoined.

    Where `slow` is a `Fuse`, its last row stands in for those that wait: they come back moved by
    what it has gained. Otherwise they come back as they are.
    """

    slow: Keep | Fuse

    @property
    def merges(self) -> bool:
        """Whether one row stands for several meanwhile."""
        return self.slow.merges

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """The rows that go on."""
        return self.slow.move(t, weight=weight, total=total, prefix=prefix)

    def represent(self, t: Tensor) -> Tensor:
        """The entries of the rows that go on."""
        return self.slow.represent(t)

    def remap(self, rows: int) -> Tensor:
        """Each row to where it goes on; those that wait to their stand-in, or to -1."""
        return self.slow.remap(rows)

    def deferred(self, tokens: Tokens, x: Tensor) -> Deferred:
        """All tokens, which of them go on, and how their stand-in begins."""
        return Deferred(tokens, self.slow.kept, x[:, -1:] if isinstance(self.slow, Fuse) else None)


@dataclass(frozen=True)
class Mask(Reduction):
    """All rows stay in place; `alive` (B, n) in [0, 1] says how much of each is still there."""

    alive: Tensor

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """The rows as they are."""
        return t

    def represent(self, t: Tensor) -> Tensor:
        """The entries as they are."""
        return t

    def remap(self, rows: int) -> Tensor:
        """Every row to itself."""
        every = torch.arange(rows, device=self.alive.device)
        return every.expand(self.alive.shape[0], -1)

    def mask(self, alive: Tensor | None) -> Tensor | None:
        """The old mask times this one: what is gone stays gone."""
        return self.alive if alive is None else alive * self.alive


def _combine_masks(alive: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """The rows that are alive and no padding."""
    if alive is None or padding is None:
        return padding if alive is None else alive
    return alive * padding


def _real_mask(rows: Tensor, before: Borders, padding: Tensor | None) -> Tensor:
    """Which of `rows` (B, m) are rows of an image that is so long, and no padding."""
    there = rows < torch.tensor(before.counts, device=rows.device).unsqueeze(1)
    return there if padding is None else there & padding


def _new_index(kept: Tensor, rows: int, *, otherwise: int) -> Tensor:
    """For each of `rows` old rows its place in `kept`, or `otherwise` (B, rows)."""
    batch, count = kept.shape
    every = torch.arange(count, device=kept.device).expand(batch, -1)
    return kept.new_full((batch, rows), otherwise).scatter(1, kept, every)
