"""`Tokens`: the token sequence as it passes from block to block.

A *row* is one token: row i of the features x (B, N, C) is the i-th token of an image. The first
rows are the prefix (class, distillation and register tokens), which no method touches. The others
are *patch rows*, counted from 0: one for each patch that is left, or for several patches that were
merged. (B, n) is one number for each patch row. Whatever belongs to a patch row moves with it, so
rotary positions, size-weighted heads and dense outputs stay right whatever was removed.

This file does not know who reduces tokens, nor why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchslim.tokens.rows import put, strided_cells, take, with_prefix

# What `Tokens.content` gives for each grid cell.
ContentKind = Literal["pixels", "embedding", "entering"]


@dataclass(frozen=True)
class Borders:
    """Where the images of a packed batch begin and end.

    A packed batch holds the first prefix row of every image, then the second of every image, and
    so on; then the patch rows of the first image, those of the second, and so on.

    Attributes:
        counts: patch rows of each image.
        prefix: prefix rows of each image.
        order: the packed rows sorted by image, each image's prefix before its patches (N,).
        inverse_order: the position of each packed row in `order` (N,).
    """

    counts: tuple[int, ...]
    prefix: int
    order: Tensor
    inverse_order: Tensor

    @classmethod
    def from_counts(cls, counts: Sequence[int], prefix: int, device: torch.device) -> Borders:
        """Makes the borders of images that have `counts` patch rows."""
        batch = len(counts)
        leading = torch.arange(prefix * batch).view(prefix, batch).T
        patches = torch.arange(prefix * batch, prefix * batch + sum(counts)).split(list(counts))
        parts = [part for pair in zip(leading, patches, strict=True) for part in pair]
        order = torch.cat(parts)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        return cls(tuple(counts), prefix, order.to(device), inverse.to(device))

    def first_rows(self) -> Tensor:
        """Finds the packed patch row at which each image begins (B, 1)."""
        counts = torch.tensor(self.counts, device=self.order.device).unsqueeze(1)
        return counts.cumsum(0) - counts

    def padded_index(self, longest: int) -> Tensor:
        """Finds the packed patch row for each position of a padded batch (B, longest).

        Padding repeats the last row of an image.
        """
        counts = torch.tensor(self.counts, device=self.order.device).unsqueeze(1)
        first = self.first_rows()
        within = torch.arange(longest, device=self.order.device).expand(len(self.counts), -1)
        last = first + (counts - 1).clamp(min=0)
        return torch.minimum(first + within, last).clamp(max=max(sum(self.counts) - 1, 0))


@dataclass(frozen=True)
class Deferred:
    """Rows that wait while the others pass through some blocks.

    Attributes:
        whole: all tokens, as they were when the wait began.
        kept: the patch rows of `whole` that went on (B, m).
        stand_in: the last of the rows that went on, which stands in for those that wait, as it was
            when the wait began (B, 1, C); None if nothing stands in.
    """

    whole: Tokens
    kept: Tensor
    stand_in: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token sequence inside a vision transformer, and what belongs to each row.

    Attributes:
        x: features (B, N, C), the prefix rows first.
        prefix: how many leading rows are not patches.
        grid: height and width of the image's patch grid. The frames of a video stand one below
            another in it.
        size: how many patches each patch row stands for (B, n); None while all stand for one.
        position: the grid cell that each patch row comes from (B, n); None while rows are in
            raster order and complete.
        alive: a padding mask (bool) or a soft mask for training (float) over the patch rows
            (B, n); None if all are there.
        origin: for every grid cell, the patch row that stands for it now (B, H*W), or -1 if it
            was dropped; None unless somebody asked for this map.
        rotary: the host's table of rotary positions, one entry for each grid cell.
        content: computes the pixels or the embedding of each grid cell (B, H*W, D), or returns
            what entered the first block, for a method that reads it. A function, since the result
            is as large as the images.
        borders: where images begin and end in a packed batch. B is 1 then, and `prefix` counts
            the prefix rows of all images.
        whole: all tokens of the block, if these are only its leading rows.
        memory: what the method remembers of each patch row (B, n), if it remembers anything.
        deferred: the rows that wait to rejoin, if any.
        frames: how many frames the grid has, the third axis of a video's; 1 for an image.
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
    frames: int = 1

    @property
    def axes(self) -> tuple[int, ...]:
        """Lengths of the grid's axes: height and width; of a video frames, height and width."""
        height, width = self.grid
        return self.grid if self.frames == 1 else (self.frames, height // self.frames, width)

    @property
    def patches(self) -> int:
        """Number of patch rows of an image."""
        return self.x.shape[1] - self.prefix

    def cells(self) -> Tensor:
        """Returns the grid cell of each patch row (B, n)."""
        return self.rows() if self.position is None else self.position

    def rows(self) -> Tensor:
        """Returns the index of each patch row: 0, 1, 2, ... (B, n)."""
        return torch.arange(self.patches, device=self.x.device).expand(self.x.shape[0], -1)

    def sizes(self) -> Tensor:
        """Counts how many patches each patch row stands for (B, n), in float32 or better."""
        if self.size is not None:
            return self.size
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        return self.x.new_ones(self.x.shape[0], self.patches, dtype=dtype)

    def with_x(self, x: Tensor) -> Tokens:
        """Returns the same rows with other features."""
        return self.copy_with(x, self.origin, self.memory)

    def with_memory(self, memory: Tensor) -> Tokens:
        """Returns the same rows with what the method remembers of each."""
        return self.copy_with(self.x, self.origin, memory)

    def with_origin(self) -> Tokens:
        """Returns the same tokens, which from now on carry the map from grid cells to rows."""
        return (
            self if self.origin is not None else self.copy_with(self.x, self.cells(), self.memory)
        )

    def with_content(self, content: Callable[[], Tensor]) -> Tokens:
        """Returns tokens that can compute what each grid cell shows. For unreduced tokens."""
        return Tokens(
            x=self.x,
            prefix=self.prefix,
            grid=self.grid,
            rotary=self.rotary,
            content=content,
            frames=self.frames,
        )

    def lengths(self) -> list[int]:
        """Counts the rows of each image, prefix included.

        If these are only leading rows, the answer is that of all tokens of the block.
        """
        if self.whole is not None:
            return self.whole.lengths()
        if self.borders is not None:
            return [self.borders.prefix + count for count in self.borders.counts]
        if self.alive is not None and not self.alive.is_floating_point():
            real: list[int] = (self.alive.sum(dim=1) + self.prefix).tolist()
            return real
        return [self.x.shape[1]] * self.x.shape[0]

    def leading_rows(self, rows: int) -> Tokens:
        """Returns only the first `rows` rows of each image, which must belong to the prefix."""
        borders = self.borders
        if borders is not None:
            batch = len(borders.counts)
            borders = Borders.from_counts([0] * batch, rows, self.x.device)
            rows *= batch
        return Tokens(
            x=self.x[:, :rows],
            prefix=rows,
            grid=self.grid,
            borders=borders,
            whole=self,
            frames=self.frames,
        )

    def rejoin(self) -> Tokens:
        """Returns all rows, also those that waited, each in its former position.

        Every row that waited is moved by what its stand-in has gained meanwhile: the sum of the
        residual updates of all blocks that the stand-in went through (Evo-ViT's fast update).
        """
        if self.deferred is None:
            return self
        whole, kept, passed = self.deferred.whole, self.deferred.kept, self.x
        waiting, memory = whole.x, whole.memory
        if self.deferred.stand_in is not None:
            waiting = waiting + (passed[:, -1:] - self.deferred.stand_in)
            passed = passed[:, :-1]
        if memory is not None and self.memory is not None:
            memory = memory.scatter(1, kept, self.memory[:, : kept.shape[1]])
        x = put(waiting, with_prefix(kept, self.prefix), passed)
        return whole.copy_with(x, whole.origin, memory)

    def to_grid(self) -> Tokens:
        """Returns one row for every grid cell, in raster order. Needs the map to the grid."""
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
            frames=tokens.frames,
        )

    def subsample(self, stride: int) -> Tokens:
        """Returns every `stride`-th row and column of the grid, as tokens of a smaller grid."""
        height, width = self.grid
        rows = strided_cells(self.grid, stride, self.x.device)
        memory = None if self.memory is None else self.memory.index_select(1, rows)
        patches = self.x[:, self.prefix :].index_select(1, rows)
        x = torch.cat([self.x[:, : self.prefix], patches], dim=1)
        grid = (-(-height // stride), -(-width // stride))
        return Tokens(x=x, prefix=self.prefix, grid=grid, memory=memory).with_origin()

    def dense_features(self) -> Tensor:
        """Returns features in the order of the dense host: the prefix, then all grid cells.

        A merged cell gets a copy of the row it was merged into. A dropped cell gets a copy of the
        nearest row, by distance in the grid.
        """
        tokens = self.rejoin()
        if tokens.origin is None:
            return tokens.x
        return take(tokens.x, with_prefix(tokens.row_of_cell(), tokens.prefix))

    def row_of_cell(self) -> Tensor:
        """Finds for every cell the patch row that stands for it, or the nearest one (B, H*W)."""
        if self.origin is None:
            raise ValueError("these tokens were not tracked, so cells cannot be told from rows")
        return torch.where(self.origin >= 0, self.origin, self._nearest_rows())

    def copy_with(self, x: Tensor, origin: Tensor | None, memory: Tensor | None) -> Tokens:
        """Returns the same rows with these values; torch 2.6 cannot trace `dataclasses.replace`."""
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
            frames=self.frames,
        )

    def _nearest_rows(self) -> Tensor:
        """Finds for every grid cell the patch row that comes from the nearest cell (B, H*W)."""
        height, width = self.grid
        every = torch.arange(height * width, device=self.x.device)
        cells = self.cells()
        dy = (every // width)[None, :, None] - (cells // width)[:, None, :]
        dx = (every % width)[None, :, None] - (cells % width)[:, None, :]
        square = dy * dy + dx * dx
        if self.frames > 1:
            down, frame = height // self.frames, height // self.frames * width
            dt = (every // frame)[None, :, None] - (cells // frame)[:, None, :]
            dy = dy - dt * down
            square = dt * dt + dy * dy + dx * dx
        distance = square.to(torch.float32)
        if self.alive is not None:
            distance = distance.masked_fill(self.alive.unsqueeze(1) == 0, torch.inf)
        return distance.argmin(dim=2)
