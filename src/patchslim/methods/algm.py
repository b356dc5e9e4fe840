"""`algm`: merges the most even squares of the grid first, and similar pairs anywhere later.

Norouzi et al., "ALGM: Adaptive Local-then-Global Token Merging for Efficient Semantic Segmentation
with Plain Vision Transformers" (CVPR 2024).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.methods import Method, Signals
from patchslim.methods._matching import ascending, compare_sets, count_pairs, match_sets
from patchslim.methods._sorting import rank_rows
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import new_index
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

SIDE = 2  # of a square, in grid cells


class ALGM(Method):
    """Merges squares of four patches while the grid is whole, and after that the closest pairs."""

    reads = ("x",)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Takes the squares whose patches are most alike, or the most similar pairs of A and B."""
        x = tokens.x[:, tokens.prefix :]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        count = tokens.patches - keep
        if _is_whole(tokens):
            return _merge_squares(F.normalize(x, dim=2), tokens.grid, count)
        return Merge(*match_sets(compare_sets(x, tokens.prefix), tokens.prefix, count))

    def fewest(self, patches: int) -> int:
        """Halves `patches`, which both ways can do."""
        return patches - patches // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the similarities between A and B; squares are compared by sums alone."""
        whole = rows - prefix == block.cells
        return 0 if whole else count_pairs(rows - prefix, prefix) * block.width


def _is_whole(tokens: Tokens) -> bool:
    """Whether every cell of the grid still has a row of its own, in raster order."""
    return tokens.position is None and tokens.patches == tokens.grid[0] * tokens.grid[1]


def _merge_squares(unit: Tensor, grid: tuple[int, int], count: int) -> Merge:
    """Merges the squares of the highest mean cosine, so that `count` rows go; the last in part."""
    batch, patches, _ = unit.shape
    across = -(-grid[1] // SIDE)
    cells = torch.arange(patches, device=unit.device)
    down, right = cells // grid[1], cells % grid[1]
    square = down // SIDE * across + right // SIDE
    place = down % SIDE * SIDE + right % SIDE
    first = cells - down % SIDE * grid[1] - right % SIDE  # the cell in the corner of the square

    squares = -(-grid[0] // SIDE) * across
    members = unit.new_zeros(squares).scatter_add(0, square, unit.new_ones(patches))
    total = unit.new_zeros(batch, squares, unit.shape[2])
    total = total.scatter_add(1, square[None, :, None].expand_as(unit), unit)
    # The mean cosine of all pairs is 1 less this, which tells patches apart that are nearly alike.
    away = (unit - (total / members[:, None]).index_select(1, square)).square().sum(dim=2)
    spread = away.new_zeros(batch, squares).scatter_add(1, square.expand(batch, -1), away)
    spread = spread / (members - 1).clamp(min=1)
    rank = rank_rows(-spread).gather(1, square.expand(batch, -1))

    key = rank * SIDE**2 + place + torch.where(place == 0, SIDE**2 * squares, 0)
    order = key.topk(patches, dim=1, largest=False).indices
    gone, kept = order[:, :count], ascending(order[:, count:])
    corner = first.expand(batch, -1).gather(1, gone)
    return Merge(kept, gone, new_index(kept, patches, otherwise=-1).gather(1, corner))
