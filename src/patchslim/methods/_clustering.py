"""Groups similar rows, given what it costs to join any two of them. Knows no methods and no tokens.

Every function takes a batch: cost (B, n, n), infinite for two rows that must not join, and worth
(B, n), larger for rows that should rather stay. There are no loops over rows or images, only over
rounds. The result is `Groups`: how hard each row is to remove, and which row it would join.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.methods._sorting import first_least, is_heavier, rank_rows
from patchslim.tokens.reduction import new_index
from patchslim.tokens.rows import mark_diagonal, take
from patchslim.tokens.spelling import is_by_product

DENSITY_NEIGHBOURS = 5  # neighbours that make up the density of a row, as in TCFormer
ABOVE_LIMITS = 1e20  # a distance larger than any threshold
UNJOINABLE = 1e30  # a distance larger still, for rows that must stay
EPSILON = 1e-5  # what layer norms add to the variance
MEDOID_ROUNDS = 5  # rounds of k-medoids, as in Haurum et al.
# How the distances of two clusters to a third become the distance of both together.
LINKAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average": torch.add,
    "complete": torch.maximum,
    "single": torch.minimum,
}


@dataclass(frozen=True)
class Groups:
    """Order in which rows are removed, and the rows that they join.

    Attributes:
        apart: how far each row is from joining another (B, n). Rows with the largest values stay.
        parent: the row that each row joins (B, n), which may itself join another. None if a row
            joins whichever row that stays is cheapest.
    """

    apart: Tensor
    parent: Tensor | None = None


def unjoinable_distance(like: Tensor) -> Tensor:
    """Makes a distance for rows that must not join any other (B, n), largest for the first row.

    It is not infinity: a choice among equal rows would then depend on how many rows there are.
    """
    rows = torch.arange(like.shape[1], device=like.device, dtype=like.dtype)
    return (UNJOINABLE * (1 - 1e-6 * rows)).expand_as(like)


def least_to_heavier(cost: Tensor, worth: Tensor) -> Tensor:
    """Finds what it costs each row to join the cheapest row of greater worth (B, n).

    `UNJOINABLE` or more for a row that has none.
    """
    if torch.compiler.is_compiling():
        return torch.where(is_heavier(worth), cost, math.inf).amin(dim=2)
    # On a CPU arithmetic in place is faster than a selection.
    rank = rank_rows(worth).to(cost.dtype)
    lighter = (rank + 1).unsqueeze(1).sub(rank.unsqueeze(2)).clamp_(0, 1)
    return lighter.mul_(UNJOINABLE).add_(cost).amin(dim=2)


def nearest(cost: Tensor, worth: Tensor) -> Groups:
    """Lets each row join any heavier one; rows with the cheapest partner go first."""
    return Groups(least_to_heavier(cost, worth))


def bipartite(cost: Tensor, first: int) -> Groups:
    """Lets every second row, from `first` on, join one of the others (ToMe's matching)."""
    apart = unjoinable_distance(cost[:, 0]).clone()
    apart[:, first::2] = cost[:, first::2, 1 - first :: 2].amin(dim=2)
    return Groups(apart)


def leaders(cost: Tensor, worth: Tensor, limit: float) -> Groups:
    """Goes through rows by worth; each row that is not claimed yet leads, and claims all near rows.

    All rows are treated at once, in rounds: a row leads if all its heavier neighbours are
    claimed, and is claimed if a neighbour leads. Rows still open after the last round lead.
    """
    rival = (cost <= limit) & is_heavier(worth)
    leads = torch.zeros_like(worth, dtype=torch.bool)
    claimed = torch.zeros_like(leads)
    graph = torch.compiler.is_compiling()
    for _ in range(_round_count(worth.shape[1])):
        leads = ~claimed & ~(rival & ~claimed.unsqueeze(1)).any(dim=2)
        claimed = claimed | (rival & leads.unsqueeze(1)).any(dim=2)
        if not graph and bool((leads | claimed).all()):
            break
    leads = ~claimed
    near = cost.masked_fill(~leads.unsqueeze(1), math.inf).amin(dim=2).clamp(min=0)
    return Groups(torch.where(leads, _above_limits(worth), -near))


def components(cost: Tensor, worth: Tensor, limit: float) -> Groups:
    """Groups rows that a chain of near rows connects; the row of the greatest worth stays."""
    count = worth.shape[1]
    near, graph = cost <= limit, torch.compiler.is_compiling()
    label = torch.arange(count, device=cost.device).expand_as(worth)
    for _ in range(2 * _round_count(count)):
        before = label
        least = torch.minimum(label, torch.where(near, label.unsqueeze(1), count).amin(dim=2))
        label = torch.minimum(least, _least_of_labels(label, least))
        label = torch.minimum(label, label.gather(1, label))
        if not graph and torch.equal(label, before):
            break
    head = elect_heaviest(label, worth)
    stays = head == torch.arange(count, device=cost.device)
    far = cost.gather(2, head.unsqueeze(2)).squeeze(2).clamp(min=0)
    return Groups(torch.where(stays, _above_limits(worth), -far), head)


def agglomerative(cost: Tensor, worth: Tensor, linkage: str = "average") -> Groups:
    """Clusters bottom up: the height at which each row joins one of greater worth, and which.

    `linkage` is one of `LINKAGES`: whether the mean, the greatest or the least distance between
    the rows of two clusters is that of the clusters. In every round, all pairs of clusters that
    are nearest to each other join. With these linkages that gives the same tree as joining one
    pair at a time. A compiled graph has a fixed number of rounds; rows that would need more do not
    join.
    """
    batch, count = worth.shape
    rows = torch.arange(count, device=cost.device)
    itself = mark_diagonal(cost)
    alive = cost.masked_fill(itself, math.inf).amin(dim=2).isfinite()
    combine = LINKAGES[linkage]
    between = cost.masked_fill(itself, 0)
    if linkage == "average":
        between = between.masked_fill(~cost.isfinite(), 0)
    size = torch.ones_like(cost[:, 0])
    height = cost.new_full((batch, count), math.inf)
    parent = rows.expand(batch, -1)
    graph = torch.compiler.is_compiling()
    for _ in range(3 * _round_count(count) if graph else count):
        apart = between
        if linkage == "average":
            apart = between / (size.unsqueeze(1) * size.unsqueeze(2))
        apart = apart.masked_fill(~(alive.unsqueeze(1) & alive.unsqueeze(2)), math.inf)
        apart = apart.masked_fill(itself, math.inf)
        best = apart.min(dim=2)
        partner = best.indices
        mutual = alive & best.values.isfinite() & (partner.gather(1, partner) == rows)
        theirs = worth.gather(1, partner)
        goes = mutual & ((worth < theirs) | ((worth == theirs) & (rows > partner)))
        height = torch.where(goes, best.values, height)
        parent = torch.where(goes, partner, parent)
        grows = (mutual & ~goes).unsqueeze(2)
        for _axis in "rows", "columns":
            joined = combine(between, take(between, partner))
            between = torch.where(grows, joined, between).transpose(1, 2)
        size = torch.where(grows.squeeze(2), size + size.gather(1, partner), size)
        alive = alive & ~goes
        if not graph and not bool(goes.any()):
            break
    return Groups(height, parent)


def density(cost: Tensor, *, itself: bool = False) -> Groups:
    """Finds density peaks (DPC-KNN): rows in dense regions, far from any denser row, stay.

    `cost` is a squared distance. With `itself`, a row is the first of its own neighbours.
    """
    neighbours = min(DENSITY_NEIGHBOURS - itself, cost.shape[1] - 1)
    if not neighbours:
        return Groups(torch.zeros_like(cost[:, 0]))
    cost = cost.masked_fill(mark_diagonal(cost), math.inf)
    near = cost.topk(neighbours, dim=2, largest=False).values
    dense = (-near.clamp(max=1e4).sum(dim=2) / (neighbours + itself)).exp()
    far = least_to_heavier(cost, dense)
    most = cost.masked_fill(~cost.isfinite(), 0).amax(dim=(1, 2)).unsqueeze(1)
    return Groups(dense * torch.where(far < UNJOINABLE, far, most).clamp(min=0).sqrt())


def medoids(cost: Tensor, worth: Tensor, keep: int, *, weighted: bool = False) -> Groups:
    """Clusters by k-medoids, starting from the rows of the greatest worth.

    With `weighted`, the distance of a row to the medoid counts by the row's worth.
    """
    rows = torch.arange(cost.shape[1], device=cost.device).expand_as(worth)
    finite = cost.masked_fill(mark_diagonal(cost) | ~cost.isfinite(), 0)
    finite = finite * worth.unsqueeze(1) if weighted else finite
    centres = worth.topk(keep, dim=1).indices
    for _ in range(MEDOID_ROUNDS):
        own = rows.unsqueeze(2) == centres.unsqueeze(1)
        to = cost.gather(2, centres.unsqueeze(1).expand(-1, cost.shape[1], -1))
        slot = to.masked_fill(own, -1.0).argmin(dim=2)
        sums = finite.new_zeros(*finite.shape[:2], keep)
        sums = sums.scatter_add(2, slot.unsqueeze(1).expand_as(finite), finite)
        within = sums.gather(2, slot.unsqueeze(2)).squeeze(2)
        centres = elect_heaviest(centres.gather(1, slot), -within).gather(1, centres)
    return Groups(_above_limits(worth) * torch.ones_like(worth).scatter(1, centres, 4.0))


def redundancy(unit: Tensor, alive: Tensor) -> Groups:
    """Removes the rows most similar to all others on average; rows of unit have length 1."""
    real = unit * alive.unsqueeze(2).to(unit.dtype)
    total = real.sum(dim=1, keepdim=True)
    others = (alive.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return Groups(1 - ((unit * total).sum(dim=2) - unit.square().sum(dim=2)) / others)


def iterative_redundancy(unit: Tensor, alive: Tensor, keep: int, steps: int) -> Groups:
    """Removes the rows most similar to all that are left, some in each step, until `keep` stay."""
    gone = torch.zeros_like(alive)
    apart = unit.new_zeros(unit.shape[:2])
    leaving = unit.shape[1] - keep
    for step in range(steps):
        like = redundancy(unit, alive & ~gone).apart.masked_fill(gone, math.inf)
        some = leaving * (step + 1) // steps - leaving * step // steps
        first = like.topk(some, dim=1, largest=False).indices
        apart = apart.scatter(1, first, float(step))
        gone = gone.scatter(1, first, True)
    unlike = redundancy(unit, alive & ~gone).apart
    return Groups(torch.where(gone, apart, steps + unlike))


def elect_heaviest(label: Tensor, worth: Tensor) -> Tensor:
    """Finds for each row the row of the greatest worth with the same label, the first of equals.

    A worth that is not a number is the least, so that broken images have rows to keep, too.
    """
    count = worth.shape[1]
    worth = worth.masked_fill(worth.isnan(), -math.inf)
    rows = torch.arange(count, device=label.device).expand_as(label)
    if torch.compiler.is_compiling():  # runtimes have no scatter that takes the greatest
        same = label.unsqueeze(1) == label.unsqueeze(2)
        theirs = worth.unsqueeze(1)
        best = torch.where(same, theirs, -math.inf).amax(dim=2, keepdim=True)
        return torch.where(same & (theirs == best), rows.unsqueeze(1), count).amin(dim=2)
    most = torch.full_like(worth, -math.inf).scatter_reduce(1, label, worth, "amax")
    candidate = torch.where(worth == most.gather(1, label), rows, count)
    first = torch.full_like(label, count).scatter_reduce(1, label, candidate, "amin")
    return first.gather(1, label)


def assign_rows(groups: Groups, cost: Tensor, stays: Tensor, rows: Tensor | None) -> Tensor:
    """Finds for each of `rows` (B, r) the row that it joins among those that stay (B, n).

    None means all rows.
    """
    if groups.parent is None:
        of_each = cost
        if rows is not None:
            of_each = take(cost, rows)
        return first_least(of_each.masked_fill(~stays.unsqueeze(1), math.inf))
    every = torch.arange(cost.shape[1], device=cost.device)
    head = torch.where(stays, every, groups.parent)
    for _ in range(_round_count(cost.shape[1])):
        head = head.gather(1, head)
    # If no row of a group stays, its rows join the nearest row that does.
    lost = ~stays.gather(1, head)
    near = first_least(cost.masked_fill(~stays.unsqueeze(1), math.inf))
    joined = torch.where(lost, near, head)
    return joined if rows is None else joined.gather(1, rows)


def join_nearest(groups: Groups, cost: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the `keep` rows that are farthest apart, and lets the others join them.

    Returns the rows that stay (B, keep), those that go (B, r), and for each of these the index of
    a row among those that stay (B, r): what a `Merge` is made of. Rows that stay keep their order:
    by how far they are apart, it would depend on rounding, and later blocks break ties by it.
    """
    count = cost.shape[1]
    order = groups.apart.topk(count, dim=1).indices
    kept = order[:, :keep].topk(keep, dim=1, largest=False).values
    gone = order[:, keep:]
    stays = new_index(kept, count, otherwise=-1)
    head = assign_rows(groups, cost, stays >= 0, gone)
    return kept, gone, stays.gather(1, head)


def feature_distances(x: Tensor) -> Tensor:
    """Computes the mean squared differences of features (B, n, d), in float32 or better (B, n, n).

    They are taken from their mean first: of what all rows have in common, rounding would else
    leave more than of the differences between rows that are alike.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return squared_distances((x - x.mean(dim=1, keepdim=True)) * x.shape[2] ** -0.5)


def squared_distances(x: Tensor) -> Tensor:
    """Computes the squared distances of rows: (B, n, d) gives (B, n, n)."""
    graph = torch.compiler.is_compiling()  # outside of graphs a norm is faster
    square = x.square().sum(dim=2) if graph else torch.linalg.vector_norm(x, dim=2).square_()
    sums = square.unsqueeze(2) + square.unsqueeze(1)
    if is_by_product():  # in OpenVINO a factor, before the product or after it, costs float32
        product = x @ x.transpose(1, 2)
        return sums - (product + product)
    return torch.baddbmm(sums, x, x.transpose(1, 2), alpha=-2)


def normalised_distances(x: Tensor) -> Tensor:
    """Computes the squared distances of features (B, n, d) after `normalise_features` (B, n, n).

    In graphs for runtimes it is from the products of the features as they are. These are exact
    where features are in bfloat16, and those of normalised features would not be.
    """
    if not is_by_product():
        return squared_distances(normalise_features(x))
    # No number is multiplied with a constant and spread over a matrix then: in a model in int8,
    # OpenVINO takes that for a scale, moves it, and rounds.
    total, mean, product = x.sum(dim=2), x.mean(dim=2), x @ x.transpose(1, 2)
    square = product.flatten(1)[:, :: x.shape[1] + 1] - total * mean
    room = square + EPSILON * x.shape[2]
    own, scale = square / room, (room * 0.5).rsqrt()
    shared = product - total.unsqueeze(2) * mean.unsqueeze(1)
    between = shared * scale.unsqueeze(2) * scale.unsqueeze(1)  # twice what they have in common
    return own.unsqueeze(2) + own.unsqueeze(1) - between


def normalise_features(x: Tensor) -> Tensor:
    """Normalises features (B, n, d) as a layer norm does, without learned scale, to length 1."""
    width = x.shape[2]
    if torch.compiler.is_compiling():  # one operation, which runtimes fuse
        return torch.mul(F.layer_norm(x, (width,)), width**-0.5)
    centred = x - x.mean(dim=2, keepdim=True)
    square: Tensor = torch.linalg.vector_norm(centred, dim=2, keepdim=True).square_()
    return centred.mul_(square.add_(EPSILON * width).rsqrt_())


def _least_of_labels(label: Tensor, values: Tensor) -> Tensor:
    """For each row the least value (B, n) of itself and of all rows that have it as their label."""
    if not torch.compiler.is_compiling():
        return values.scatter_reduce(1, label, values, "amin")
    rows = torch.arange(label.shape[1], device=label.device)
    labelled = label.unsqueeze(1) == rows.unsqueeze(1)
    theirs = torch.where(labelled, values.unsqueeze(1), label.shape[1]).amin(dim=2)
    return torch.minimum(values, theirs)


def _above_limits(worth: Tensor) -> Tensor:
    """Maps worth to distances above every threshold, in the same order."""
    return ABOVE_LIMITS * (1 + worth / (1 + worth.abs()))


def _round_count(count: int) -> int:
    """Counts the rounds that reach `count` by doubling, and adds a few."""
    return max(count, 2).bit_length() + 2
