"""`Tokens`: the value that travels between blocks, and nothing about who moves it.

Rows are ordered: first the prefix (class, distillation, registers), which is never touched, then
the patch rows. Everything that belongs to a patch row travels with it, so that hosts with rotary
positions, size-weighted heads and dense outputs stay right whatever was removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchslim.tokens.rows import put, strided_cells, take, with_prefix

ContentKind = Literal["pixels", "embedding"]  # what a grid cell shows by itself


@dataclass(frozen=True)
class Borders:
    """Where the images of a packed batch begin and end.

    Packed rows are: the first prefix row of every image, the second of every image, ...; then the
    patches of the first image, of the second, ...

    Attributes:
        counts: patch rows of each image.
        prefix: prefix rows of each image.
        order: packed rows image by image, each image's prefix before its patches (N,).
        back: for each packed row its place in `order` (N,).
    """

    counts: tuple[int, ...]
    prefix: int
    order: Tensor
    inverse_order: Tensor

    @classmethod
    def from_counts(cls, counts: Sequence[int], prefix: int, device: torch.device) -> Borders:
        """The borders of images with `counts` patch rows each."""
        batch = len(counts)
        leading = torch.arange(prefix * batch).view(prefix, batch).T
        patches = torch.arange(prefix * batch, prefix * batch + sum(counts)).split(list(counts))
        parts = [part for pair in zip(leading, patches, strict=True) for part in pair]
        order = torch.cat(parts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return cls(tuple(counts), prefix, order.to(device), back.to(device))

    def first_rows(self) -> Tensor:
        """The packed patch row with which each image begins (B, 1)."""
        counts = torch.tensor(self.counts, device=self.order.device).unsqueeze(1)
        return counts.cumsum(0) - counts

    def padded_index(self, longest: int) -> Tensor:
        """For images side by side, the packed patch row of each place (B, longest)."""
        counts = torch.tensor(self.counts, device=self.order.device).unsqueeze(1)
        first = self.first_rows()
        within = torch.arange(longest, device=self.order.device).expand(len(self.counts), -1)
        last = first + (counts - 1).clamp(min=0)
        return torch.minimum(first + within, last).clamp(max=max(sum(self.counts) - 1, 0))


@dataclass(frozen=True)
class Deferred:
    """Rows that wait while others go through some blocks.

    Attributes:
        whole: all tokens, as they were when some of them went on.
        kept: the patch rows of `whole` that went on (B, m).
        stand_in: the row that went with them, last, for those that wait, as it was then (B, 1, C);
            None where there is none.
    """

    whole: Tokens
    kept: Tensor
    stand_in: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The sequence inside a vision transformer, with what belongs to each of its rows.

    Attributes:
        x: features (B, N, C), the prefix rows first.
        prefix: how many leading rows are not patches.
        grid: height and width of the patch grid that the image had.
        size: how many patches each patch row stands for (B, n); None while that is one each.
        position: which grid cell each patch row comes from (B, n); None while nothing has moved.
        alive: soft mask (float) or padding mask (bool) over the patch rows (B, n); None is all.
        origin: for every grid cell, the patch row that stands for it now (B, H*W), -1 where it
            was dropped; None while nobody asked for it.
        rotary: the host's table of rotary positions, one entry a grid cell; the adapter reads it.
        content: makes what each grid cell shows by itself (B, H*W, D), for a method that asks for
            it: not kept, since it is as large as the images.
        borders: where images begin and end, in a packed batch: then B is 1, and `prefix` counts
            the prefix rows of all images.
        whole: the tokens of which these are the leading rows, if they are.
        memory: what the method remembers of each patch row (B, n), if it does.
        parked: the rows that wait to be rejoined, if some do.
    """

    x: Tensor
    prefix: int
    grid: tuple[int, int]
    size: Tensor | None = None
    position: Tensor | None = None
    alive: Tensor | None = None
    origin: Tensor | None = None
    rotary: Tensor | None = None
    content: Callable[[], Tensor] | None = None
    borders: Borders | None = None
    whole: Tokens | None = None
    memory: Tensor | None = None
    deferred: Deferred | None = None

    @property
    def patches(self) -> int:
        """How many patch rows there are."""
        return self.x.shape[1] - self.prefix

    def cells(self) -> Tensor:
        """The grid cell of each patch row (B, n)."""
        return self.rows() if self.position is None else self.position

    def rows(self) -> Tensor:
        """The number of each patch row (B, n)."""
        return torch.arange(self.patches, device=self.x.device).expand(self.x.shape[0], -1)

    def sizes(self) -> Tensor:
        """How many patches each patch row stands for (B, n), exact in half precision too."""
        if self.size is not None:
            return self.size
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        return self.x.new_ones(self.x.shape[0], self.patches, dtype=dtype)

    def with_x(self, x: Tensor) -> Tokens:
        """The same rows with other features."""
        return self.copy_with(x, self.origin, self.memory)

    def with_memory(self, memory: Tensor) -> Tokens:
        """The same rows, and what the method remembers of each."""
        return self.copy_with(self.x, self.origin, memory)

    def with_origin(self) -> Tokens:
        """The same tokens, keeping from now on the map from grid cells to rows."""
        return (
            self if self.origin is not None else self.copy_with(self.x, self.cells(), self.memory)
        )

    def with_content(self, content: Callable[[], Tensor]) -> Tokens:
        """The same tokens, with a way to what each grid cell shows by itself."""
        return Tokens(
            x=self.x, prefix=self.prefix, grid=self.grid, rotary=self.rotary, content=content
        )

    def lengths(self) -> list[int]:
        """How many rows each image has, prefix included; of leading rows, those of the whole."""
        if self.whole is not None:
            return self.whole.lengths()
        if self.borders is not None:
            return [self.borders.prefix + count for count in self.borders.counts]
        if self.alive is not None and not self.alive.is_floating_point():
            real: list[int] = (self.alive.sum(dim=1) + self.prefix).tolist()
            return real
        return [self.x.shape[1]] * self.x.shape[0]

    def leading_rows(self, rows: int) -> Tokens:
        """The first `rows` rows of each image alone, which must belong to the prefix."""
        borders = self.borders
        if borders is not None:
            batch = len(borders.counts)
            borders = Borders.from_counts([0] * batch, rows, self.x.device)
            rows *= batch
        return Tokens(x=self.x[:, :rows], prefix=rows, grid=self.grid, borders=borders, whole=self)

    def rejoin(self) -> Tokens:
        """All rows, those that waited too, each in the place that it had.

        What the stand-in has gained since then is added to every row that waited: the residual
        increments of all branches that it went through (Evo-ViT's fast update).
        """
        if self.deferred is None:
            return self
        whole, kept, slow = self.deferred.whole, self.deferred.kept, self.x
        waiting, memory = whole.x, whole.memory
        if self.deferred.stand_in is not None:
            waiting = waiting + (slow[:, -1:] - self.deferred.stand_in)
            slow = slow[:, :-1]
        if memory is not None and self.memory is not None:
            memory = memory.scatter(1, kept, self.memory[:, : kept.shape[1]])
        x = put(waiting, with_prefix(kept, self.prefix), slow)
        return whole.copy_with(x, whole.origin, memory)

    def to_grid(self) -> Tokens:
        """One row for every grid cell, in raster order; the map back to the grid must be there."""
        tokens = self.rejoin()
        if tokens.position is None:
            return tokens
        row, memory = tokens.row_of_cell(), tokens.memory
        return Tokens(
            x=take(tokens.x, with_prefix(row, tokens.prefix)),
            prefix=tokens.prefix,
            grid=tokens.grid,
            rotary=tokens.rotary,
            memory=None if memory is None else memory.gather(1, row),
        )

    def subsample(self, stride: int) -> Tokens:
        """Every `stride`-th row and column of the grid: a smaller grid of its own."""
        height, width = self.grid
        rows = strided_cells(self.grid, stride, self.x.device)
        memory = None if self.memory is None else self.memory.index_select(1, rows)
        patches = self.x[:, self.prefix :].index_select(1, rows)
        x = torch.cat([self.x[:, : self.prefix], patches], dim=1)
        grid = (-(-height // stride), -(-width // stride))
        return Tokens(x=x, prefix=self.prefix, grid=grid, memory=memory).with_origin()

    def dense_features(self) -> Tensor:
        """Features in the dense host's order: prefix, then every grid cell in raster order.

        A merged cell gets a copy of the row it was merged into; a dropped cell gets a copy of the
        row that survived nearest to it in the grid.
        """
        tokens = self.rejoin()
        if tokens.origin is None:
            return tokens.x
        return take(tokens.x, with_prefix(tokens.row_of_cell(), tokens.prefix))

    def row_of_cell(self) -> Tensor:
        """For every grid cell the patch row that stands for it, or else the nearest (B, H*W)."""
        if self.origin is None:
            raise ValueError("these tokens were not tracked, so cells cannot be told from rows")
        return torch.where(self.origin >= 0, self.origin, self._nearest_rows())

    def copy_with(self, x: Tensor, origin: Tensor | None, memory: Tensor | None) -> Tokens:
        """The same rows with these; by hand, since torch 2.6 cannot trace `dataclasses.replace`."""
        return Tokens(
            x=x,
            prefix=self.prefix,
            grid=self.grid,
            size=self.size,
            position=self.position,
            alive=self.alive,
            origin=origin,
            rotary=self.rotary,
            content=self.content,
            borders=self.borders,
            whole=self.whole,
            memory=memory,
            deferred=self.deferred,
        )

    def _nearest_rows(self) -> Tensor:
        """For every grid cell, the patch row whose own cell is nearest (B, H*W)."""
        height, width = self.grid
        every = torch.arange(height * width, device=self.x.device)
        at = self.cells()
        dy = (every // width)[None, :, None] - (at // width)[:, None, :]
        dx = (every % width)[None, :, None] - (at % width)[:, None, :]
        distance = (dy * dy + dx * dx).to(torch.float32)
        if self.alive is not None:
            distance = distance.masked_fill(self.alive.unsqueeze(1) == 0, torch.inf)
        return distance.argmin(dim=2)
