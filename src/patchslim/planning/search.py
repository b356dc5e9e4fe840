"""Finds the cheapest way through the blocks, by dynamic programming. Plain numbers, no tensors.

A *level* is a number of patches that may be left after a block. A block with level i in and level
j out has a cost (time, or operations) and a damage. Both are added up over the blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]  # (blocks, level in, level out); infinite where a step is impossible
MOST_LABELS = 400  # ways to one level that are kept after a block: the best in each range of costs

ROUNDING = 1e-9  # sums are taken in several orders; by so much a limit may be exceeded


class Labels(NamedTuple):
    """Ways to reach one level, none of which is worse than another in both cost and damage.

    Attributes:
        cost: what each way costs, ascending.
        damage: the damage of each, descending.
        level: the level before the last block.
        label: the number of the way to that level.
    """

    cost: Table
    damage: Table
    level: NDArray[np.int64]
    label: NDArray[np.int64]


def find_levels(cost: Table, damage: Table, limit: float) -> list[int] | None:
    """Returns the level after each block, with the least damage at a cost of at most `limit`.

    All levels start at 0. Returns None if nothing is as cheap as the limit.
    """
    limit += ROUNDING * abs(limit)
    after = _cheapest_rest(cost)
    start = Labels(np.zeros(1), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64))
    reached: list[dict[int, Labels]] = [{0: start}]
    for block in range(len(cost)):
        reached.append(
            _pass_block(reached[-1], cost[block], damage[block], after[block + 1], limit)
        )
    ends = [(float(way.damage[-1]), level) for level, way in reached[-1].items()]
    if not ends:
        return None
    level = min(ends)[1]
    label = len(reached[-1][level].cost) - 1
    path = []
    for ways in reversed(reached[1:]):
        path.append(level)
        level, label = int(ways[level].level[label]), int(ways[level].label[label])
    return path[::-1]


def least_cost(cost: Table) -> float:
    """Returns what the cheapest way through all blocks costs."""
    return float(_cheapest_rest(cost)[0][0])


def path_sum(table: Table, levels: list[int]) -> float:
    """Adds up costs or damages on a way through the blocks."""
    entering = [0, *levels[:-1]]
    steps = zip(entering, levels, strict=True)
    return float(sum(table[block, i, j] for block, (i, j) in enumerate(steps)))


def _cheapest_rest(cost: Table) -> list[Table]:
    """For each block and each level that enters it, the least that all later blocks cost."""
    rest = [np.zeros(cost.shape[1])]
    for block in cost[::-1]:
        rest.append((block + rest[-1][None, :]).min(axis=1))
    return rest[::-1]


def _pass_block(
    before: dict[int, Labels], cost: Table, damage: Table, rest: Table, limit: float
) -> dict[int, Labels]:
    """Returns the ways to each level after a block, from the ways to each level before it."""
    after = {}
    for level in range(len(rest)):
        sources = [i for i in before if np.isfinite(cost[i, level])]
        if not sources:
            continue
        ways = Labels(
            np.concatenate([before[i].cost + cost[i, level] for i in sources]),
            np.concatenate([before[i].damage + damage[i, level] for i in sources]),
            np.concatenate([np.full(len(before[i].cost), i) for i in sources]),
            np.concatenate([np.arange(len(before[i].cost)) for i in sources]),
        )
        kept = _undominated(ways, limit - rest[level])
        if len(kept):
            after[level] = Labels(
                ways.cost[kept], ways.damage[kept], ways.level[kept], ways.label[kept]
            )
    return after


def _undominated(ways: Labels, limit: float) -> NDArray[np.int64]:
    """Returns which ways to keep: within the limit, and better than all that cost less."""
    order = np.lexsort((ways.damage, ways.cost))
    order = order[ways.cost[order] <= limit]
    damage = ways.damage[order]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], damage]))[:-1]
    order = order[damage < best_before]
    if len(order) <= MOST_LABELS:
        return order
    cost = ways.cost[order]
    ranges = ((cost - cost[0]) / (cost[-1] - cost[0]) * MOST_LABELS).astype(np.int64)
    last = np.append(ranges[1:] != ranges[:-1], True)
    kept: NDArray[np.int64] = order[last]
    return kept
