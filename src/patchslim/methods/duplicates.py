"""`duplicates`: merges patches with identical pixels before the first block.

For flat scans, screenshots, documents and padded images; every block gets fewer tokens. The choice
needs no weight of the network. With a `tolerance`, patches that are nearly the same merge too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.errors import BadSetting
from patchslim.methods import Method, Place, Placement, Signals, Threshold
from patchslim.methods import _clustering as clustering
from patchslim.methods._clustering import Groups
from patchslim.methods._windows import Windows
from patchslim.settings import Range, check_value
from patchslim.tokens.merging import Merge
from patchslim.tokens.rows import take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MAX_PAIRWISE = 1024  # with more patches than this, only those of one window are compared
WINDOW_SIDE = 16  # side of that window, in grid cells
PIXEL_CHUNK = 64  # pixels of a patch that are compared at a time


class Duplicates(Method):
    """Merges patches with the same pixels, in the whole image or within windows of the grid.

    `window` is the side of a window in grid cells; 0 is the whole image. `tolerance` is the root
    mean square by which the normalised pixels of two patches may differ; 0 is not at all.
    Attention still counts every merged patch, so that only the averaged positions change the
    answer.
    """

    place = Place.BEFORE_BLOCK
    placement: ClassVar[Placement] = Placement.FIRST
    reads = ("pixels",)
    proportional = True
    adaptive = True
    tuned_threshold = Threshold("tolerance", first=0.05)

    def __init__(self, *, tolerance: float = 0.0, window: int = 0) -> None:
        super().__init__()
        self.tolerance = check_value("tolerance", tolerance, float, Range(0, 1e6))
        self.window = check_value("window", window, int, Range(0, 2**16))

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Keeps the first of the patches with the same content, and merges the others into it."""
        if tokens.content is None:
            raise BadSetting("Duplicates are found by pixels, and these tokens come without.")
        keep = min(keep, tokens.patches)
        rows = tokens.rows()
        real = torch.ones_like(rows, dtype=torch.bool) if tokens.alive is None else tokens.alive
        shown = tokens.content()
        if tokens.position is not None:
            shown = take(shown, tokens.position)
        window = window_of(tokens.cells(), tokens.grid, self.window)
        to = first_identical(shown, window, real)
        first = real & (to == rows)
        near = self._near_duplicates(tokens, shown, first, window) if self.tolerance else None
        apart = _rank_by_contrast(shown, first) if near is None else near.apart
        kept = apart.masked_fill(~real, -torch.inf).topk(keep, dim=1).indices
        count = ((apart > 0) & real).sum(dim=1, keepdim=True).clamp(1, keep)
        padding = torch.arange(keep, device=kept.device) < count
        stays = torch.zeros_like(real).scatter(1, kept, padding)
        other = _previous_kept(stays) if near is None else near.assign_rows(stays)
        to = torch.where(stays.gather(1, to), to, other.gather(1, to))
        to = torch.where(stays | ~real, rows, to)
        place = torch.zeros_like(rows).scatter(
            1, kept, torch.arange(keep, device=kept.device).expand_as(kept)
        )
        return Merge(kept, rows, place.gather(1, to), padding, real & ~stays)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts nothing without a tolerance; with one, the products of patches with patches."""
        count = rows - prefix
        window = self._window_side(count) ** 2 or count
        pairs = -(-count // window) * window * min(window, count)
        return pairs * block.pixels if self.tolerance else 0

    def fewest(self, patches: int) -> int:
        """Counts one patch of each window in which near-duplicates are compared."""
        window = self._window_side(patches) ** 2 or patches
        return max(1, -(-patches // window)) if self.tolerance else 1

    def _window_side(self, patches: int) -> int:
        """Returns the side of windows in which near-duplicates are compared; 0 is one window."""
        return self.window or (WINDOW_SIDE if patches > MAX_PAIRWISE else 0)

    def _near_duplicates(
        self, tokens: Tokens, shown: Tensor, first: Tensor, window: Tensor
    ) -> NearDuplicates:
        """Groups the `first` patches by how nearly they equal others of their window."""
        # Exact duplicates take no part: they follow the first patch with the same content.
        windows = Windows.from_cells(
            tokens.cells(), tokens.grid, first, self._window_side(tokens.patches)
        )
        some = windows.of(shown.to(torch.promote_types(shown.dtype, torch.float32)))
        power = torch.linalg.vector_norm(some, dim=2).square() / some.shape[2]
        cost = power.unsqueeze(2) + power.unsqueeze(1)
        cost = torch.baddbmm(cost, some, some.transpose(1, 2), alpha=-2 / some.shape[2])
        del some  # as large as the images
        never = ~(windows.alive.unsqueeze(1) & windows.alive.unsqueeze(2))
        of = windows.of(window)
        never = never | (of.unsqueeze(1) != of.unsqueeze(2))
        cost.masked_fill_(never, torch.inf)
        worth = windows.of(-tokens.rows().to(cost.dtype))  # the first of a group stays
        groups = clustering.leaders(cost, worth, self.tolerance**2)
        apart, best = windows.to_rows(groups.apart), windows.best_rows(worth)
        apart = torch.where(apart > 0, _rank_by_contrast(shown, first), apart)
        if best is not None:
            apart = torch.where(best, clustering.unjoinable_distance(apart), apart)
        return NearDuplicates(apart.masked_fill(~first, -1.0), windows, groups, cost)


@dataclass(frozen=True)
class NearDuplicates:
    """How the patches that differ, but not much, may be grouped.

    Attributes:
        apart: how far each patch is from merging (B, n); the nearest go first.
        windows, groups, cost: the windows, and the groups and distances inside of each.
    """

    apart: Tensor
    windows: Windows
    groups: Groups
    cost: Tensor

    def assign_rows(self, stays: Tensor) -> Tensor:
        """Finds for each patch the nearest one that stays, or else the last before it (B, n)."""
        rows = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
        to = self.windows.assign_rows(self.groups, self.cost, stays, rows)
        return torch.where(stays.gather(1, to), to, _previous_kept(stays))


def _rank_by_contrast(shown: Tensor, first: Tensor) -> Tensor:
    """Ranks patches by contrast: exact duplicates go first, then flat patches (B, n)."""
    shown = shown.to(torch.promote_types(shown.dtype, torch.float32))
    some = torch.compiler.is_compiling() or len(shown)  # torch warns of the variance of nothing
    contrast = shown.var(dim=2, correction=0) if some else shown.new_zeros(shown.shape[:2])
    rows = torch.arange(first.shape[1], device=first.device)
    return torch.where(first, 1 + contrast / (1 + contrast) - 1e-6 * rows, -1.0)


def _previous_kept(stays: Tensor) -> Tensor:
    """Finds for each row the last one before it that stays, or the first that stays (B, n)."""
    rows = torch.arange(stays.shape[1], device=stays.device)
    kept = torch.where(stays, rows, -1)
    if torch.compiler.is_compiling():  # runtimes have no running maximum
        last = kept.unsqueeze(1).masked_fill(rows > rows.unsqueeze(1), -1).amax(dim=2)
    else:
        last = kept.cummax(dim=1).values
    first = stays.to(torch.int8).argmax(dim=1, keepdim=True)
    return torch.where(last < 0, first, last)


def window_of(cells: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Numbers the window that each cell is in (B, n); all 0 if `side` is 0."""
    if not side:
        return torch.zeros_like(cells)
    return cells // grid[1] // side * grid[1] + cells % grid[1] // side


def first_identical(shown: Tensor, window: Tensor, real: Tensor) -> Tensor:
    """Finds for each row the first one of its window with the same entries, or itself (B, n).

    Rows with equal hashes are compared entry by entry.
    """
    to = (_first_in_graph if torch.compiler.is_compiling() else _first_of_hash)(shown, window, real)
    same = window.gather(1, to) == window
    for some in shown.split(PIXEL_CHUNK, dim=2):
        same = same & (take(some.contiguous(), to) == some).all(dim=2)
    return torch.where(same, to, torch.arange(to.shape[1], device=to.device))


def _first_of_hash(shown: Tensor, window: Tensor, real: Tensor) -> Tensor:
    """For each row the first one with its hash: a sum of its bits, which any order leaves equal."""
    key = window * 0x5851F42D4C957F2D
    for start in range(0, shown.shape[2], PIXEL_CHUNK):
        bits = shown[..., start : start + PIXEL_CHUNK].float().contiguous().view(torch.int32)
        number = torch.arange(start + 1, start + 1 + bits.shape[2], device=bits.device)
        key = key + (bits.to(torch.int64) * (number * 0x9E3779B97F4A7C1 * 2 + 1)).sum(dim=2)
    key = torch.where(real, key, torch.arange(key.shape[1], device=key.device) - (1 << 62))
    ordered, order = key.sort(dim=1, stable=True)
    begins = torch.ones_like(real)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = torch.arange(key.shape[1], device=key.device).expand_as(key)
    first = torch.where(begins, place, 0).cummax(dim=1).values
    return torch.empty_like(order).scatter(1, order, order.gather(1, first))


def _first_in_graph(shown: Tensor, window: Tensor, real: Tensor) -> Tensor:
    """The same by two sums of entries, since runtimes neither read bits nor count in 64."""
    rows = torch.arange(shown.shape[1], device=shown.device)
    entries = torch.arange(1, shown.shape[2] + 1, device=shown.device, dtype=torch.float32)
    same = (window.unsqueeze(1) == window.unsqueeze(2)) & real.unsqueeze(1) & real.unsqueeze(2)
    for weight in (torch.sin(entries), torch.cos(entries * 0.7)):
        hashed = (shown.float() * weight).sum(dim=2)
        same = same & (hashed.unsqueeze(1) == hashed.unsqueeze(2))
    first = torch.where(same, rows, rows.shape[0]).amin(dim=2)
    return torch.minimum(first, rows)
