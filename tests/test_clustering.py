"""Groups of similar rows, against the same rules written as plain loops over a few rows."""

import math

import pytest
import torch

from patchslim.methods import _clustering as grouping
from patchslim.methods._clustering import Groups
from patchslim.methods._sorting import is_heavier

SEEDS = range(12)
KINDS = ("spread", "clusters", "chain")


def points(seed, kind, count=None):
    """Makes some rows in the plane: spread out, in clusters, or one behind the other."""
    noise = torch.Generator().manual_seed(seed)
    count = 2 + seed * 2 if count is None else count
    x = torch.randn(count, 2, generator=noise, dtype=torch.float64)
    if kind == "clusters":
        return x * 0.1 + torch.randint(3, (count, 1), generator=noise) * 3
    if kind == "chain":
        order = torch.randperm(count, generator=noise)
        return torch.stack([order * 1.0, torch.zeros(count)], dim=1).double() + x * 0.01
    return x


def costs(x):
    """Computes squared distances of rows (..., n, d), and inf for a row with itself."""
    apart = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(dim=-1)
    return apart.masked_fill(torch.eye(x.shape[-2], dtype=torch.bool), math.inf)


def worths(seed, count):
    """Draws positive worths, all different."""
    noise = torch.Generator().manual_seed(100 + seed)
    return torch.rand(count, generator=noise, dtype=torch.float64)


def problem(seed, kind, count=None):
    x = points(seed, kind, count)
    return costs(x), worths(seed, len(x))


def limits(cost):
    """Lists thresholds from below the least cost to above the greatest."""
    finite = cost[cost.isfinite()]
    return [float(finite.quantile(share)) * 1.0001 for share in (0, 0.1, 0.3, 0.6, 1)] + [0.0]


def heavier_rows(row, worth):
    """Lists the rows before which `row` goes: worth more, or the same and earlier."""
    mine = (-worth[row], row)
    return [other for other in range(len(worth)) if (-worth[other], other) < mine]


def partition(heads):
    """Groups the rows that join the same one."""
    groups = {}
    for row, head in enumerate(heads):
        groups.setdefault(head, set()).add(row)
    return sorted(map(sorted, groups.values()))


def cut(groups, cost, keep):
    """Finds which row joins which of the `keep` rows that are farthest apart, of one image."""
    stays = torch.zeros(1, len(cost), dtype=torch.bool)
    stays[0, groups.apart[0].topk(keep).indices] = True
    every = torch.arange(len(cost)).unsqueeze(0)
    heads = grouping.assign_rows(groups, cost.unsqueeze(0), stays, every)
    return torch.where(stays, every, heads)[0].tolist()


every_seed = pytest.mark.parametrize("seed", SEEDS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_seed
def test_the_worthier_row_is_heavier_and_of_equal_ones_the_first(seed):
    worth = worths(seed, 9).mul(4).round()
    got = is_heavier(worth.unsqueeze(0))[0]
    for row in range(9):
        assert got[row].nonzero().flatten().tolist() == heavier_rows(row, worth.tolist())


def test_rows_that_never_join_are_beyond_all_and_in_their_order():
    for dtype in (torch.float32, torch.float64):
        far = grouping.unjoinable_distance(torch.zeros(2, 1024, dtype=dtype))
        assert far.isfinite().all()
        assert (far[:, 1:] < far[:, :-1]).all()
        assert far.min() > 1e29


# --- each way of grouping


@every_kind
@every_seed
def test_nearest_is_the_least_cost_of_joining_a_heavier_row(seed, kind):
    cost, worth = problem(seed, kind)
    got = grouping.nearest(cost.unsqueeze(0), worth.unsqueeze(0))
    assert got.parent is None
    for row in range(len(cost)):
        heavy = heavier_rows(row, worth.tolist())
        if heavy:
            assert float(got.apart[0, row]) == min(float(cost[row, other]) for other in heavy)
        else:
            assert float(got.apart[0, row]) >= grouping.UNJOINABLE


@every_seed
@pytest.mark.parametrize("first", [0, 1])
def test_bipartite_rows_are_as_far_as_the_nearest_of_the_other_side(seed, first):
    cost, _ = problem(seed, "spread")
    apart = grouping.bipartite(cost.unsqueeze(0), first).apart[0]
    for row in range(len(cost)):
        if row % 2 == first:
            other = range(1 - first, len(cost), 2)
            assert float(apart[row]) == min(float(cost[row, each]) for each in other)
        else:
            assert float(apart[row]) > 1e29


def greedy_leaders(cost, worth, limit):
    """Lets the next unclaimed row lead and claim all rows within the limit, one after another."""
    leads, claimed = [], set()
    for row in sorted(range(len(worth)), key=lambda row: (-worth[row], row)):
        if row not in claimed:
            leads.append(row)
            claimed |= {other for other in range(len(worth)) if float(cost[row, other]) <= limit}
    return sorted(leads)


@every_kind
@every_seed
def test_leaders_are_those_of_the_greedy_pass(seed, kind):
    cost, worth = problem(seed, kind)
    for limit in limits(cost):
        got = grouping.leaders(cost.unsqueeze(0), worth.unsqueeze(0), limit)
        wanted = greedy_leaders(cost, worth.tolist(), limit)
        leads = (got.apart[0] > 0).nonzero().flatten().tolist()
        assert leads == wanted
        assert got.parent is None
        for row in set(range(len(cost))) - set(wanted):
            assert float(got.apart[0, row]) == -min(float(cost[row, each]) for each in wanted)
        ranked = got.apart[0].topk(len(wanted)).indices.tolist()
        assert ranked == sorted(wanted, key=lambda row: -float(worth[row]))


@every_seed
def test_leaders_of_a_long_chain_are_those_of_the_greedy_pass(seed):
    cost, worth = problem(seed, "chain", 60)
    got = grouping.leaders(cost.unsqueeze(0), worth.unsqueeze(0), 1.5)
    leads = (got.apart[0] > 0).nonzero().flatten().tolist()
    assert leads == greedy_leaders(cost, worth.tolist(), 1.5)


def test_rows_left_open_by_a_chain_of_lighter_rows_lead():
    """No row leads that the greedy pass would have claimed, and all near a leader are claimed."""
    cost = costs(torch.arange(60.0).unsqueeze(1))
    worth = torch.arange(60.0, 0, -1)
    wanted = set(greedy_leaders(cost, worth.tolist(), 1.5))
    got = grouping.leaders(cost.unsqueeze(0), worth.unsqueeze(0), 1.5).apart[0]
    leads = set((got > 0).nonzero().flatten().tolist())
    assert wanted < leads
    assert (got[got <= 0] == -1).all()


def connected(cost, limit):
    """Labels each row's component, by union-find."""
    parent = list(range(len(cost)))

    def find(row):
        while parent[row] != row:
            row = parent[row]
        return row

    for one in range(len(cost)):
        for other in range(len(cost)):
            if one != other and float(cost[one, other]) <= limit:
                parent[find(one)] = find(other)
    return [find(row) for row in range(len(cost))]


def check_components(cost, worth, limit):
    got = grouping.components(cost.unsqueeze(0), worth.unsqueeze(0), limit)
    groups = partition(connected(cost, limit))
    assert partition(got.parent[0].tolist()) == groups
    for group in groups:
        head = max(group, key=lambda row: float(worth[row]))
        for row in group:
            assert int(got.parent[0, row]) == head
            apart = float(got.apart[0, row])
            assert apart > 0 if row == head else apart == -float(cost[row, head])


@every_kind
@every_seed
def test_components_are_what_chains_connect(seed, kind):
    cost, worth = problem(seed, kind)
    for limit in limits(cost):
        check_components(cost, worth, limit)


@pytest.mark.parametrize("count", [60, pytest.param(196, marks=pytest.mark.slow)])
def test_components_of_long_chains_in_any_order(count):
    for seed in SEEDS:
        cost, worth = problem(seed, "chain", count)
        check_components(cost, worth, 1.5)


@pytest.mark.parametrize("count", [2, 60, 196])
def test_components_of_a_chain_in_order_and_of_equal_worth(count):
    cost = costs(torch.arange(float(count)).unsqueeze(1))
    parent = grouping.components(cost.unsqueeze(0), torch.ones(1, count), 1.5).parent
    assert (parent == 0).all()


def average_linkage(cost, keep=1, limit=math.inf):
    """Joins one pair at a time: the two groups whose members are nearest on average."""
    groups = [[row] for row in range(len(cost))]
    cost = cost.tolist()

    def between(one, other):
        return sum(cost[a][b] for a in one for b in other) / (len(one) * len(other))

    while len(groups) > keep:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = min(pairs, key=lambda pair: between(groups[pair[0]], groups[pair[1]]))
        if between(groups[a], groups[b]) > limit:
            break
        groups[b] = groups[b] + groups.pop(a)
    return sorted(map(sorted, groups))


@every_kind
@pytest.mark.parametrize("seed", range(8))
def test_average_linkage_is_the_textbook_s_at_every_cut(seed, kind):
    cost, worth = problem(seed, kind)
    groups = grouping.agglomerative(cost.unsqueeze(0), worth.unsqueeze(0))
    assert int(groups.apart.isinf().sum()) == 1
    for keep in range(1, len(cost) + 1):
        assert partition(cut(groups, cost, keep)) == average_linkage(cost, keep)
    for limit in limits(cost):
        stay = int((groups.apart > limit).sum())
        assert partition(cut(groups, cost, stay)) == average_linkage(cost, limit=limit)


@every_kind
@pytest.mark.parametrize("linkage", grouping.LINKAGES)
@pytest.mark.parametrize("count", [24, 100])
def test_linkage_is_scipy_s_at_every_height(count, linkage, kind):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    for seed in range(4):
        cost, worth = problem(seed, kind, count)
        condensed = cost[tuple(torch.triu_indices(count, count, 1))].numpy()
        tree = hierarchy.linkage(condensed, method=linkage)
        groups = grouping.agglomerative(cost.unsqueeze(0), worth.unsqueeze(0), linkage)
        heights = groups.apart[0].sort().values
        assert heights[-1] == math.inf
        torch.testing.assert_close(heights[:-1], torch.from_numpy(tree[:, 2]))
        for keep in (1, 2, 5, count // 2, count - 1):
            wanted = hierarchy.fcluster(tree, keep, "maxclust").tolist()
            assert partition(cut(groups, cost, keep)) == partition(wanted)


def test_a_row_never_joins_a_lighter_one_by_average_linkage():
    cost, worth = problem(7, "spread")
    groups = grouping.agglomerative(cost.unsqueeze(0), worth.unsqueeze(0))
    for row, parent in enumerate(groups.parent[0].tolist()):
        assert row == parent or worth[parent] > worth[row]


@pytest.mark.parametrize("count", [24, 196])
def test_average_linkage_joins_rows_that_are_all_equal(count):
    cost = costs(torch.zeros(count, 2))
    groups = grouping.agglomerative(cost.unsqueeze(0), torch.ones(1, count))
    assert groups.apart[0].isinf().nonzero().flatten().tolist() == [0]
    assert (groups.apart[0, 1:] == 0).all()


@pytest.mark.parametrize("count", [24, 60])
def test_average_linkage_joins_rows_of_which_each_is_farther_than_the_last(count):
    cost = costs(1.5 ** torch.arange(count, dtype=torch.float64).unsqueeze(1))
    groups = grouping.agglomerative(cost.unsqueeze(0), torch.ones(1, count, dtype=torch.float64))
    assert groups.apart[0].isinf().nonzero().flatten().tolist() == [0]


def density_peaks(cost, *, itself, neighbours=5):
    """Computes exp(-mean squared distance to the nearest) times the distance to a denser row."""
    count = len(cost)
    squared = [[float(cost[a, b]) for b in range(count) if a != b] for a in range(count)]
    near = [sorted([0.0] * itself + each)[:neighbours] for each in squared]
    dense = [math.exp(-sum(each) / len(each)) for each in near]
    most = max(map(max, squared))
    score = []
    for row in range(count):
        to = [float(cost[row, other]) for other in heavier_rows(row, dense)]
        score.append(dense[row] * math.sqrt(min(to, default=most)))
    return score


@every_kind
@every_seed
@pytest.mark.parametrize("itself", [False, True])
def test_density_peaks_are_dense_and_far_from_denser_rows(seed, kind, itself):
    cost, _ = problem(seed, kind)
    got = grouping.density(cost.unsqueeze(0), itself=itself)
    assert got.parent is None
    wanted = torch.tensor(density_peaks(cost, itself=itself), dtype=torch.float64)
    torch.testing.assert_close(got.apart[0], wanted)


def test_one_row_is_a_peak():
    assert grouping.density(costs(torch.zeros(1, 1, 2))).apart.tolist() == [[0.0]]


def alternated(cost, worth, keep, *, weighted):
    """Takes five turns: rows go to their nearest centre, then the least distant one leads."""
    weight = worth if weighted else torch.ones_like(worth)
    count = len(cost)
    centres = sorted(range(count), key=lambda row: -float(worth[row]))[:keep]
    for _ in range(5):
        groups = [[] for _ in centres]
        for row in range(count):
            near = [-1.0 if row == each else float(cost[row, each]) for each in centres]
            groups[near.index(min(near))].append(row)
        centres = [
            min(
                group,
                key=lambda row: (
                    sum(float(cost[row, o] * weight[o]) for o in group if o != row),
                    row,
                ),
            )
            for group in groups
        ]
    return centres


@every_kind
@every_seed
@pytest.mark.parametrize("weighted", [False, True])
def test_medoids_after_five_turns(seed, kind, weighted):
    cost, worth = problem(seed, kind)
    for keep in sorted({1, 2, len(cost) // 2 or 1, len(cost) - 1 or 1, len(cost)}):
        got = grouping.medoids(cost.unsqueeze(0), worth.unsqueeze(0), keep, weighted=weighted)
        wanted = alternated(cost, worth, keep, weighted=weighted)
        assert len(set(wanted)) == keep
        assert sorted(got.apart[0].topk(keep).indices.tolist()) == sorted(wanted)


def unit_rows(seed, count=None):
    x = points(seed, "spread", count)
    return torch.nn.functional.normalize(torch.cat([x, torch.ones(len(x), 1)], dim=1), dim=1)


@every_seed
def test_redundancy_is_the_mean_similarity_to_all_others_that_are_real(seed):
    unit = unit_rows(seed)
    alive = torch.arange(len(unit)) < max(2, len(unit) - seed)
    got = grouping.redundancy(unit.unsqueeze(0), alive.unsqueeze(0)).apart[0]
    real = alive.nonzero().flatten().tolist()
    for row in real:
        alike = [float(unit[row] @ unit[other]) for other in real if other != row]
        assert float(got[row]) == pytest.approx(1 - sum(alike) / len(alike))


@every_seed
@pytest.mark.parametrize("steps", [1, 4])
def test_the_row_most_like_the_remaining_ones_goes_in_steps(seed, steps):
    unit = unit_rows(seed)
    count = len(unit)
    for keep in {1, count // 2 or 1, count - 1 or 1, count}:
        batches = leaving_batches(unit, keep, steps)
        if batches is None:
            continue
        alive = torch.ones(1, count, dtype=torch.bool)
        apart = grouping.iterative_redundancy(unit.unsqueeze(0), alive, keep, steps).apart[0]
        gone = {row for batch in batches for row in batch}
        assert set((apart >= steps).nonzero().flatten().tolist()) == set(range(count)) - gone
        for step, batch in enumerate(batches):
            assert (apart == step).nonzero().flatten().tolist() == sorted(batch)


def leaving_batches(unit, keep, steps):
    """The rows that go in each step; None where rounding decides, as between the last two."""
    left, batches = list(range(len(unit))), []
    for step in range(steps):
        some = (len(unit) - keep) * (step + 1) // steps - (len(unit) - keep) * step // steps
        total = {a: sum(float(unit[a] @ unit[b]) for b in left if a != b) for a in left}
        ranked = sorted(left, key=lambda row: -total[row])
        if 0 < some < len(left) and total[ranked[some - 1]] - total[ranked[some]] < 1e-5:
            return None
        batches.append(ranked[:some])
        left = ranked[some:]
    return batches


# --- which row stands for a group, and which row joins which


@every_seed
def test_elected_is_the_worthiest_of_each_label(seed):
    noise = torch.Generator().manual_seed(seed)
    count = 2 + seed * 2
    label = torch.randint(min(4, count), (count,), generator=noise)
    worth = worths(seed, count).mul(3).round() - 1  # with equal ones, and negative ones
    got = grouping.elect_heaviest(label.unsqueeze(0), worth.unsqueeze(0))[0].tolist()
    for row in range(count):
        members = [other for other in range(count) if label[other] == label[row]]
        assert got[row] == min(members, key=lambda other: (-float(worth[other]), other))


def test_elected_is_a_row_where_worths_are_no_numbers():
    worth = torch.tensor([[math.nan, 1.0, math.nan, math.nan]])
    assert grouping.elect_heaviest(torch.tensor([[0, 0, 1, 1]]), worth).tolist() == [[1, 1, 2, 2]]


@every_seed
def test_rows_that_stay_keep_their_order_and_others_join_one_of_them(seed):
    cost, _ = problem(seed, "spread")
    apart = torch.full((1, len(cost)), math.inf)  # all equal: a runtime may take any order
    apart[0, ::3] = torch.arange(len(apart[0, ::3]), dtype=torch.float32)
    keep = int(apart.isinf().sum())
    kept, gone, into = grouping.join_nearest(Groups(apart), cost[None], keep)
    assert kept[0].tolist() == apart[0].isinf().nonzero().flatten().tolist()
    for row, head in zip(gone[0].tolist(), kept[0][into[0]].tolist(), strict=True):
        assert head == min(kept[0].tolist(), key=lambda other: float(cost[row, other]))


@every_seed
def test_without_parents_a_row_joins_the_nearest_that_stays(seed):
    cost, worth = problem(seed, "spread")
    stays = worth >= worth.median()
    gone = (~stays).nonzero().flatten()
    got = grouping.assign_rows(Groups(worth[None]), cost[None], stays[None], gone[None])[0]
    staying = stays.nonzero().flatten().tolist()
    for row, head in zip(gone.tolist(), got.tolist(), strict=True):
        assert head == min(staying, key=lambda other: float(cost[row, other]))


@every_seed
def test_a_row_joins_its_first_ancestor_that_stays_or_else_the_nearest(seed):
    cost, worth = problem(seed, "spread", 24)
    noise = torch.Generator().manual_seed(seed)
    older = [heavier_rows(row, worth.tolist()) or [row] for row in range(24)]
    pick = torch.rand(24, generator=noise)
    parent = torch.tensor(
        [each[int(pick[row] * len(each))] for row, each in enumerate(older)]
    )  # a tree whose root is the worthiest
    stays = torch.rand(24, generator=noise) < 0.3
    stays[seed] = True
    every = torch.arange(24).unsqueeze(0)
    groups = Groups(worth.unsqueeze(0), parent.unsqueeze(0))
    got = grouping.assign_rows(groups, cost.unsqueeze(0), stays.unsqueeze(0), every)[0].tolist()
    staying = stays.nonzero().flatten().tolist()
    for row in range(24):
        head = row
        while not stays[head] and int(parent[head]) != head:
            head = int(parent[head])
        if not stays[head]:
            head = min(staying, key=lambda other: float(cost[row, other]))
        assert got[row] == head


def test_a_long_chain_of_parents_is_followed_to_its_end():
    count = 200
    parent = (torch.arange(count) - 1).clamp(min=0).unsqueeze(0)
    stays = (torch.arange(count) == 0).unsqueeze(0)
    cost = costs(torch.zeros(1, count, 1))
    every = torch.arange(count).unsqueeze(0)
    assert (grouping.assign_rows(Groups(cost[:, 0], parent), cost, stays, every) == 0).all()


# --- images do not affect each other

WAYS = {
    "nearest": lambda cost, worth, unit: grouping.nearest(cost, worth),
    "bipartite": lambda cost, worth, unit: grouping.bipartite(cost, 1),
    "leaders": lambda cost, worth, unit: grouping.leaders(cost, worth, 0.5),
    "components": lambda cost, worth, unit: grouping.components(cost, worth, 0.2),
    "agglomerative": lambda cost, worth, unit: grouping.agglomerative(cost, worth),
    "density": lambda cost, worth, unit: grouping.density(cost),
    "medoids": lambda cost, worth, unit: grouping.medoids(cost, worth, 5),
    "redundancy": lambda cost, worth, unit: grouping.redundancy(unit, unit[..., 0] < 9),
    "iterative": lambda cost, worth, unit: grouping.iterative_redundancy(
        unit, unit[..., 0] < 9, 5, 4
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [6, 17])
def test_images_together_are_grouped_as_they_are_alone(way, count):
    x = torch.stack([points(seed, KINDS[seed % 3], count) for seed in range(6)])
    cost, worth = costs(x), torch.stack([worths(seed, count) for seed in range(6)])
    unit = torch.stack([unit_rows(seed, count) for seed in range(6)])
    together = WAYS[way](cost, worth, unit)
    for image in range(6):
        some = slice(image, image + 1)
        alone = WAYS[way](cost[some], worth[some], unit[some])
        torch.testing.assert_close(together.apart[some], alone.apart)
        if alone.parent is not None:
            assert torch.equal(together.parent[some], alone.parent)


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("redundancy", "iterative")])
def test_the_cost_of_a_row_to_join_itself_is_not_read(way):
    cost, worth = problem(5, "clusters")
    wanted = WAYS[way](cost.unsqueeze(0), worth.unsqueeze(0), None)
    for itself in (0.0, 1e-7, -1e-7, 9.0):
        other = torch.where(cost.isinf(), itself, cost).unsqueeze(0)
        got = WAYS[way](other, worth.unsqueeze(0), None)
        torch.testing.assert_close(got.apart, wanted.apart)
        if wanted.parent is not None:
            assert torch.equal(got.parent, wanted.parent)


@pytest.mark.parametrize("way", ["nearest", "leaders", "components", "agglomerative"])
def test_rows_of_padding_change_nothing(way):
    cost, worth = problem(5, "spread")
    count = len(cost)
    longer = torch.full((1, count + 4, count + 4), math.inf, dtype=cost.dtype)
    longer[0, :count, :count] = cost
    more = torch.cat([worth, torch.full((4,), 9.0, dtype=worth.dtype)]).unsqueeze(0)
    got = WAYS[way](longer, more, None)
    wanted = WAYS[way](cost.unsqueeze(0), worth.unsqueeze(0), None)
    torch.testing.assert_close(got.apart[:, :count], wanted.apart)
    if wanted.parent is not None:
        assert torch.equal(got.parent[:, :count], wanted.parent)


def test_a_graph_has_enough_rounds_for_a_long_chain(monkeypatch):
    cost = costs(1.5 ** torch.arange(196, dtype=torch.float64).unsqueeze(1)).unsqueeze(0)
    worth = torch.ones(1, 196, dtype=torch.float64)
    wanted = grouping.agglomerative(cost, worth).apart.sort().values[:, :40]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = grouping.agglomerative(cost, worth).apart.sort().values[:, :40]
    assert torch.equal(got, wanted)


def test_distances_of_features_that_are_alike_keep_their_digits():
    apart = torch.from_numpy(points(3, "spread", 20).numpy())
    x = (100 + 1e-2 * apart).unsqueeze(0)
    wanted = costs(x).masked_fill(torch.eye(20, dtype=torch.bool), 0) / 2
    torch.testing.assert_close(
        grouping.feature_distances(x.float()).double(), wanted, rtol=1e-2, atol=1e-8
    )
