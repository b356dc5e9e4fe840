"""`Tokens`: the value that travels between blocks, and nothing about who moves it.

Rows are ordered: first the prefix (class, distillation, registers), which is never touched, then
the patch rows. Everything that belongs to a patch row travels with it, so that hosts with rotary
positions, size-weighted heads and dense outputs stay right whatever was removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from patchslim.reduction import Reduction

Shown = Literal["pixels", "embedding"]  # what a grid cell shows by itself


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
    back: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], prefix: int, device: torch.device) -> Borders:
        """The borders of images with `counts` patch rows each."""
        batch = len(counts)
        leading = torch.arange(prefix * batch).view(prefix, batch).T
        patches = torch.arange(prefix * batch, prefix * batch + sum(counts)).split(list(counts))
        parts = [part for pair in zip(leading, patches, strict=True) for part in pair]
        order = torch.cat(parts)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return cls(tuple(counts), prefix, order.to(device), back.to(device))

    def places(self, longest: int) -> Tensor:
        """For images side by side, the packed patch row of each place (B, longest)."""
        counts = torch.tensor(self.counts, device=self.order.device).unsqueeze(1)
        first = counts.cumsum(0) - counts
        within = torch.arange(longest, device=self.order.device).expand(len(self.counts), -1)
        last = first + (counts - 1).clamp(min=0)
        return torch.minimum(first + within, last).clamp(max=max(sum(self.counts) - 1, 0))


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
        return self._with(x, self.origin)

    def tracked(self) -> Tokens:
        """The same tokens, keeping from now on the map from grid cells to rows."""
        return self if self.origin is not None else self._with(self.x, self.cells())

    def showing(self, content: Callable[[], Tensor]) -> Tokens:
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

    def leading(self, rows: int) -> Tokens:
        """The first `rows` rows of each image alone, which must belong to the prefix."""
        borders = self.borders
        if borders is not None:
            batch = len(borders.counts)
            borders = Borders.of([0] * batch, rows, self.x.device)
            rows *= batch
        return Tokens(x=self.x[:, :rows], prefix=rows, grid=self.grid, borders=borders, whole=self)

    def reduce(self, reduction: Reduction) -> Tokens:
        """The tokens after `reduction`: features averaged, sizes added, the rest carried along."""
        before, size = None, None
        if self.size is not None or reduction.merges:
            before = self.sizes()
            size = reduction.move(before)
        origin = self.origin
        if origin is not None:
            moved = reduction.remap(self.patches).to(origin.device).expand(len(origin), -1)
            moved = moved.gather(1, origin.clamp(min=0))
            origin = torch.where(origin >= 0, moved, origin)
        alive = None if self.alive is None else reduction.represent(self.alive)
        return Tokens(
            x=reduction.move(self.x, weight=before, total=size, prefix=self.prefix),
            prefix=self.prefix,
            grid=self.grid,
            size=size,
            position=reduction.represent(self.cells()),
            alive=reduction.mask(alive),
            origin=origin,
            rotary=self.rotary,
            content=self.content,
        )

    def restored(self) -> Tensor:
        """Features in the dense host's order: prefix, then every grid cell in raster order.

        A merged cell gets a copy of the row it was merged into; a dropped cell gets a copy of the
        row that survived nearest to it in the grid.
        """
        if self.origin is None:
            return self.x
        row = torch.where(self.origin >= 0, self.origin, self._nearest())
        return take(self.x, with_leading(row, self.prefix))

    def _with(self, x: Tensor, origin: Tensor | None) -> Tokens:
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
        )

    def _nearest(self) -> Tensor:
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


def take(x: Tensor, rows: Tensor, prefix: int = 0) -> Tensor:
    """Rows of every image: x (B, N, ...) at rows (B, K), counted from `prefix`, gives (B, K, ...).

    One flat `index_select`: on a CPU several times faster than `gather` with an expanded index,
    and a plain Gather in every exporter.
    """
    batch, count = x.shape[:2]
    if x.ndim == 2:
        return x.gather(1, rows + prefix if prefix else rows)
    first = torch.arange(prefix, prefix + batch * count, count, device=x.device).unsqueeze(1)
    flat = x.flatten(0, 1).index_select(0, (rows + first).flatten())
    return flat.view(batch, rows.shape[1], *x.shape[2:])


def with_leading(rows: Tensor, prefix: int) -> Tensor:
    """Rows of the whole sequence: the prefix rows, and then the patch rows `rows` (B, K)."""
    if not prefix:
        return rows
    first = torch.arange(prefix, device=rows.device).expand(rows.shape[0], -1)
    return torch.cat([first, rows + prefix], dim=1)
