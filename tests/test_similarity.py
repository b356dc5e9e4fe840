"""`similarity` and its relatives: what is refused, what is lost (nothing, with equal patches), and
which patches join where."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import patchslim
from child_process import needs_fork
from child_process import run_patchslim as run
from patchslim.errors import BadSetting, UnknownName
from patchslim.measurement.memory import peak_memory
from patchslim.methods import Place, Signals
from patchslim.methods._method import method_settings
from patchslim.methods.duplicates import Duplicates
from patchslim.methods.similarity import Similarity
from patchslim.tokens.tokens import Tokens
from timm_variants import randomise

PATCH = 4


def host(side=6, *, depth=3, positions=True, dtype=torch.float32, **args):
    """Makes a small host of side x side patches with strong weights, without positions if asked."""
    settings = {"embed_dim": 32, "num_heads": 4, "num_classes": 7, "patch_size": PATCH}
    made = VisionTransformer(img_size=PATCH * side, depth=depth, **settings, **args)
    randomise(made)
    if not positions:
        torch.nn.init.zeros_(made.pos_embed)
    return made.eval().to(dtype)


AVERAGE = {"class_token": False, "global_pool": "avg"}
QUERY = {"class_token": False, "global_pool": "map"}
REGISTERS = {"reg_tokens": 3}


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def repeating(kinds, side=6, *, dtype=torch.float32):
    """Makes images whose patches are of so many kinds each, spread over the grid."""
    every = []
    for seed, count in enumerate(kinds):
        some = noise(count, 3, PATCH, PATCH, seed=seed)
        lots = torch.randperm(side * side, generator=torch.Generator().manual_seed(seed)) % count
        rows = some[lots].view(side, side, 3, PATCH, PATCH)
        every.append(rows.permute(2, 0, 3, 1, 4).reshape(3, side * PATCH, side * PATCH))
    return torch.stack(every).to(dtype)


# --- what is refused

REFUSED = {
    "unknown preset": ({"preset": "bset"}, "'bset' | Did you mean 'best'"),
    "unknown group": ({"group": "leaders"}, "group | 'leaders' | Did you mean 'leader'"),
    "unknown measure": ({"measure": "cosinus"}, "measure | 'cosinus' | Did you mean 'cosine'"),
    "unknown thing compared": ({"on": "queries"}, "on of similarity | 'queries' | keys"),
    "unknown weight": ({"weight": "sise"}, "weight | 'sise' | Did you mean 'size'"),
    "unknown survivor": ({"survivor": "last"}, "survivor | 'last' | medoid"),
    "ward of cosines": ({"measure": "cosine"}, "group='ward' | measure='l2'"),
    "distances to all": (
        {"group": "redundancy", "measure": "l2"}, "group='redundancy' | measure='cosine'"),
    "a mean of no group": (
        {"group": "iterative", "measure": "cosine", "survivor": "mean"},
        "group='iterative' | no groups | 'alone'"),
    "attention before the first block": (
        {"on": "embedding", "weight": "class"}, "before the first block | weight='size'"),
    "attention received before it": (
        {"on": "embedding", "weight": "received"}, "before the first block | weight='size'"),
    "a threshold of density peaks": (
        {"group": "density", "threshold": 0.5}, "group='density' | no threshold"),
    "a threshold of medoids": (
        {"group": "medoids", "threshold": 0.5}, "group='medoids' | no threshold"),
    "a threshold of steps": (
        {"group": "iterative", "measure": "cosine", "threshold": 0.5},
        "group='iterative' | no threshold"),
    "leaders of no threshold": ({"group": "leader"}, "group='leader' | needs a threshold"),
    "components of no threshold": (
        {"group": "components", "measure": "cosine"}, "group='components' | needs a threshold"),
    "a distance below zero": ({"threshold": -0.1}, "threshold=-0.1 | above 0"),
    "a cosine of one": (
        {"group": "leader", "measure": "cosine", "threshold": 1.0}, "threshold=1.0 | -1 and 1"),
    "a cosine below minus one": (
        {"group": "nearest", "measure": "cosine", "threshold": -1.5}, "threshold=-1.5 | least -1"),
    "a cosine that is no number": (
        {"group": "nearest", "measure": "cosine", "threshold": math.nan}, "threshold=nan | number"),
    "a floor above all": ({"floor": 1.5}, "floor=1.5 | from 0 to 1"),
    "a floor below none": ({"floor": -0.1}, "floor=-0.1 | from 0 to 1"),
    "a floor that is no number": ({"floor": math.nan}, "floor=nan | takes a number"),
    "a window of less than nothing": ({"window": -1}, "window=-1 | at least 0"),
    "squares of less than nothing": ({"squares": -2}, "squares=-2 | at least 0"),
    "the paper with a mean": ({"preset": "paper", "survivor": "mean"}, "'redundancy' | 'alone'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_go_together_are_refused(name):
    settings, words = REFUSED[name]
    with pytest.raises((BadSetting, UnknownName)) as raised:
        Similarity(**settings)
    missing = [word for word in words.split(" | ") if word not in str(raised.value)]
    assert not missing, str(raised.value)


@pytest.mark.parametrize("kind", [Similarity, Duplicates])
def test_a_distance_that_is_not_a_number_is_refused(kind):
    name = "threshold" if kind is Similarity else "tolerance"
    with pytest.raises(BadSetting, match="nan"):
        kind(**{name: math.nan})


@pytest.mark.parametrize(
    "settings", [{"tolerance": -1.0}, {"window": -1}], ids=["tolerance", "window"]
)
def test_duplicates_of_less_than_nothing_are_refused(settings):
    with pytest.raises(BadSetting, match=r"=-1.*: .* must be at least 0"):
        Duplicates(**settings)


@needs_fork
def test_the_command_line_refuses_them_too(tmp_path):
    line = "slim test_vit --method similarity --set group=ward --set measure=cosine --keep 0.5"
    ended = run(tmp_path, *line.split())
    assert ended.code == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert ended.err.startswith("error: similarity: group='ward' adds up squared differences")


def test_more_squares_than_patches_may_stay_are_refused():
    model = patchslim.slim(host(), "similarity", keep_rate=0.5, at=(0,), squares=1)
    with pytest.raises(BadSetting, match=r"squares=1 .* 36 squares of this 6x6 .* asks for 18"):
        model(noise(1, 3, 24, 24))


# --- presets


def test_the_best_preset_is_the_default():
    best = Similarity(preset="best")
    assert method_settings(Similarity()) == method_settings(best)
    made = (best.group, best.measure, best.on, best.weight, best.survivor)
    assert made == ("ward", "l2", "features", "class", "weighted")
    assert best.place is Place.BEFORE_FEED
    assert best.needs_class_token
    assert best.proportional
    assert not best.adaptive


def test_the_paper_s_preset_drops_before_the_first_block():
    paper = Similarity(preset="paper")
    made = (paper.group, paper.measure, paper.on, paper.weight, paper.survivor)
    assert made == ("redundancy", "cosine", "embedding", "size", "alone")
    assert paper.place is Place.BEFORE_BLOCK
    assert not paper.needs_class_token
    assert not paper.proportional
    assert Similarity(preset="paper", threshold=0.3).adaptive


def test_settings_override_the_preset():
    paper = Similarity(preset="paper", on="keys", weight="received")
    assert (paper.on, paper.weight, paper.group) == ("keys", "received", "redundancy")
    again = Similarity(**method_settings(paper))
    assert method_settings(again) == method_settings(paper)


def test_the_paper_keeps_the_patches_least_like_all_others():
    made, x = host(), noise(3, 3, 24, 24)
    model = patchslim.slim(made, "similarity", keep_rate=0.75, at=(0,), preset="paper")
    unit = F.normalize(made.patch_embed(x), dim=2).detach()
    alike = unit @ unit.transpose(1, 2)
    for image, cells in enumerate(model.trace(x, 1)[0].cells()):
        mean = [float(row.sum() - row[i]) / 35 for i, row in enumerate(alike[image])]
        wanted = sorted(range(36), key=mean.__getitem__)[:27]
        assert sorted(cells.tolist()) == sorted(wanted)


# --- equal patches are merged without loss

COSINE = {"measure": "cosine", "threshold": 0.9999}
WEIGHED = {  # by attention of a class token or of a query
    "ward": {"threshold": 1e-6},
    "nearest": {"group": "nearest", "threshold": 1e-6},
    "leader": {"group": "leader", "survivor": "mean", **COSINE},
    "components": {"group": "components", "survivor": "first", **COSINE},
    "average": {"group": "average", "on": "keys", **COSINE},
    "medoid": {"group": "nearest", "survivor": "medoid", "on": "values", "threshold": 1e-6},
    "heaviest": {"group": "leader", "survivor": "heaviest", "threshold": 1e-6},
    "squares": {"threshold": 1e-6, "squares": 6},
}
UNWEIGHED = {
    "size": {"threshold": 1e-6, "weight": "size"},
    "received": {"threshold": 1e-6, "weight": "received"},
    "embedding": {"on": "embedding", "group": "leader", "survivor": "mean", **COSINE},
}
KINDS = (3, 36, 5, 1)  # of patches, in each image


def lossless(model, x, *, kinds=KINDS, tolerance=1e-5):
    """Asserts that all equal patches became one, and that the answer is the dense host's."""
    with torch.no_grad():
        got, wanted = model(x), model.host(x)
        counts = [tokens.lengths() for tokens in model.trace(x)]
    prefix = model.plan.shape.prefix
    assert counts[-1] == [kind + prefix for kind in kinds]
    assert float((got - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("args", [{}, REGISTERS, QUERY], ids=["class", "registers", "query"])
@pytest.mark.parametrize("name", [name for name in WEIGHED if name != "average"])
def test_equal_patches_weighed_by_attention_become_one_without_loss(name, args):
    made = host(positions=False, **args)
    model = patchslim.slim(made, "similarity", keep_rate=1.0, at=(0, 1), floor=0.0, **WEIGHED[name])
    lossless(model, repeating(KINDS))


@pytest.mark.parametrize(
    "kinds",
    [
        (3, 36, 5),
        (1,),
    ],
)
def test_equal_patches_become_one_by_average_linkage_without_loss(kinds):
    settings = {"keep_rate": 1.0, "at": (0, 1), "floor": 0.0, **WEIGHED["average"]}
    model = patchslim.slim(host(positions=False), "similarity", **settings)
    lossless(model, repeating(kinds), kinds=kinds)


@pytest.mark.parametrize("args", [{}, AVERAGE, QUERY], ids=["class", "average", "query"])
@pytest.mark.parametrize("name", UNWEIGHED)
def test_equal_patches_of_any_host_become_one_without_loss(name, args):
    made = host(positions=False, **args)
    budget = {"keep_rate": 1.0, "at": (0, 1)}
    model = patchslim.slim(made, "similarity", **budget, floor=0.0, **UNWEIGHED[name])
    lossless(model, repeating(KINDS))


@pytest.mark.parametrize("settings", [{}, {"tolerance": 1e-3}], ids=["same", "near"])
@pytest.mark.parametrize("args", [{}, REGISTERS, AVERAGE, QUERY], ids="crag")
def test_duplicates_become_one_before_the_first_block_without_loss(args, settings):
    model = patchslim.slim(host(positions=False, **args), "duplicates", **settings)
    lossless(model, repeating(KINDS))


@pytest.mark.parametrize("args", [{}, REGISTERS, AVERAGE, QUERY], ids="crag")
def test_tome_with_a_threshold_merges_equal_patches_without_loss(args):
    """A patch joins one of the other half, so that it takes some blocks until all are one."""
    made = host(depth=8, positions=False, **args)
    model = patchslim.slim(made, "tome", r=0, threshold=0.9999)
    x = repeating(KINDS)
    with torch.no_grad():
        got, wanted = model(x), made(x)
        counts = [tokens.lengths() for tokens in model.trace(x)]
    assert float((got - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    prefix = model.plan.shape.prefix
    assert all(18 <= counts[0][image] - prefix < 36 for image in (0, 2, 3))
    assert [after[1] - prefix for after in counts] == [36] * 8
    assert [counts[-1][image] - prefix for image in (0, 2, 3)] == [3, 5, 1]


@pytest.mark.parametrize("method", ["ward", "leader", "embedding", "duplicates", "tome"])
def test_equal_patches_become_one_to_the_last_digits_of_float64(method):
    made = host(positions=False, dtype=torch.float64)
    x = repeating(KINDS, dtype=torch.float64)
    if method == "duplicates":
        model = patchslim.slim(made, method)
    elif method == "tome":
        model = patchslim.slim(made, method, r=0, threshold=0.9999)
    else:
        settings = {"floor": 0.0, **(WEIGHED | UNWEIGHED)[method]}
        model = patchslim.slim(made, "similarity", keep_rate=1.0, at=(0, 1), **settings)
    with torch.no_grad():
        wanted = made(x)
        off = float((model(x) - wanted).abs().max())
    assert off <= 1e-10 * max(1.0, float(wanted.abs().max()))
    left = model.trace(x)[-1].lengths()
    assert left[1] == 37
    assert max(left[0], left[2], left[3]) < (37 if method == "tome" else 7)


# --- a threshold means what it says


def scene(seed=0, *, batch=2, grid=(4, 5), width=16, prefix=1):
    """Makes random tokens whose rows stand for some patches each, and what a method may read."""
    rows = prefix + grid[0] * grid[1]
    size = noise(batch, grid[0] * grid[1], seed=seed + 1).abs().ceil()
    tokens = Tokens(x=noise(batch, rows, width, seed=seed), prefix=prefix, grid=grid, size=size)
    q, k, v = (noise(batch, 2, rows, width // 2, seed=seed + part) for part in (2, 3, 4))
    return tokens, Signals(prefix, 0.3, q, k, v)


def distances(tokens):
    """Computes mean squared differences of the rows as the next layer sees them."""
    x = F.layer_norm(tokens.x[:, tokens.prefix :], (tokens.x.shape[2],))
    return (x.unsqueeze(2) - x.unsqueeze(1)).square().mean(dim=3)


def led(cost, worth, limit):
    """Counts the rows that lead: the next unclaimed row claims all rows within the limit."""
    leads, claimed = 0, set()
    for row in sorted(range(len(worth)), key=lambda row: -float(worth[row])):
        if row not in claimed:
            leads += 1
            claimed |= {other for other in range(len(worth)) if float(cost[row, other]) <= limit}
    return leads


def left(method, tokens, signals):
    """Counts the rows of each image that stay, if all may."""
    after = method.choose(tokens, signals, tokens.patches).apply(tokens)
    return [length - tokens.prefix for length in after.lengths()]


@pytest.mark.parametrize("limit", [1e-3, 0.5, 0.9])
def test_as_many_stay_as_lead(limit):
    tokens, signals = scene()
    weight, cost = signals.class_attention(), distances(tokens)
    method = Similarity(group="leader", threshold=limit, floor=0.0)
    wanted = [led(cost[image], weight[image], limit) for image in range(2)]
    assert left(method, tokens, signals) == wanted


@pytest.mark.parametrize("limit", [1.2, 1.6])
def test_as_many_stay_as_lead_by_a_threshold_above_one(limit):
    tokens, signals = scene()
    weight, cost = signals.class_attention(), distances(tokens)
    method = Similarity(group="leader", threshold=limit, floor=0.0)
    wanted = [led(cost[image], weight[image], limit) for image in range(2)]
    assert min(wanted) > 1
    assert left(method, tokens, signals) == wanted


def test_as_many_stay_as_lead_by_a_cosine_below_zero():
    tokens, signals = scene()
    unit = F.normalize(tokens.x[:, 1:], dim=2)
    cost, weight = 1 - unit @ unit.transpose(1, 2), signals.class_attention()
    method = Similarity(group="leader", measure="cosine", threshold=-0.2, floor=0.0)
    wanted = [led(cost[image], weight[image], 1.2) for image in range(2)]
    assert min(wanted) > 1
    assert left(method, tokens, signals) == wanted


@pytest.mark.parametrize("group", ["ward", "nearest", "components", "average", "bipartite"])
def test_a_higher_threshold_never_keeps_more(group):
    tokens, signals = scene()
    before = [20, 20]
    for threshold in (1e-4, 0.003, 0.01, 0.1, 0.3, 0.6, 0.9):
        method = Similarity(group=group, measure="l2", threshold=threshold, floor=0.0)
        now = left(method, tokens, signals)
        assert all(1 <= some <= most for some, most in zip(now, before, strict=True))
        before = now
    assert min(before) < 20


@pytest.mark.parametrize(("floor", "wanted"), [(0.0, 1), (0.33, 7), (0.7, 14), (1.0, 20)])
def test_the_floor_stays_whatever_the_threshold(floor, wanted):
    tokens, signals = scene()
    method = Similarity(threshold=1e3, floor=floor)
    assert left(method, tokens, signals) == [wanted, wanted]
    assert max(method.choose(tokens, signals, 5).apply(tokens).lengths()) <= 6


# --- who survives


def grouped(cost, weight, keep):
    """Lists heads and their groups: rows nearest to a heavier one join the nearest that stays."""
    rows = range(len(weight))
    heavy = [[o for o in rows if (weight[o], -o) > (weight[r], -r)] for r in rows]
    apart = [min((cost[r][o] for o in heavy[r]), default=math.inf) for r in rows]
    heads = sorted(rows, key=lambda row: -apart[row])[:keep]
    groups = {head: [head] for head in heads}
    for row in set(rows) - set(heads):
        groups[min(heads, key=lambda head: cost[row][head])].append(row)
    return groups


def survivor(name, group, cost, weight):
    """Finds the row that survives of a group."""
    if name == "first":
        return min(group)
    if name == "heaviest":
        return max(group, key=lambda row: weight[row])
    return min(sorted(group), key=lambda row: sum(cost[row][o] for o in group if o != row))


@pytest.mark.parametrize("threshold", [0.0, 0.8], ids=["fixed", "threshold"])
@pytest.mark.parametrize(
    "name",
    [
        *("alone", "first", "heaviest", "mean", "medoid", "weighted"),
    ],
)
def test_one_decision_leaves_the_survivors_of_the_groups(name, threshold):
    tokens, signals = scene()
    weights, costs = signals.class_attention(), distances(tokens)
    method = Similarity(group="nearest", survivor=name, threshold=threshold, floor=0.0)
    with torch.no_grad():
        after = method.choose(tokens, signals, 8).apply(tokens.with_origin())
    for image, length in enumerate(after.lengths()):
        weight, cost, x = weights[image].tolist(), costs[image].tolist(), tokens.x[image, 1:]
        groups = grouped(cost, weight, length - 1)
        assert after.cells()[image, : length - 1].unique().numel() == length - 1
        for head, group in groups.items():
            place = int(after.origin[image, head])
            size = float(tokens.size[image, group].sum())
            if name == "alone":
                wanted, size = x[head], float(tokens.size[image, head])
            elif name in ("mean", "weighted"):
                share = weights[image, group] if name == "weighted" else tokens.size[image, group]
                wanted = (x[group] * share.unsqueeze(1)).sum(dim=0) / share.sum()
                assert (after.origin[image, group] == place).all()
            else:
                speaker = survivor(name, group, cost, weight)
                wanted = x[speaker]
                assert int(after.cells()[image, place]) == speaker
                assert (after.origin[image, group] == place).all()
            torch.testing.assert_close(after.x[image, 1 + place], wanted)
            assert float(after.sizes()[image, place]) == size


def test_ward_joins_the_pairs_that_lose_least():
    """Joining two of weights a and b at squared distance d loses a b / (a + b) d."""
    tokens, signals = scene()
    weights, costs = signals.class_attention(), distances(tokens)
    after = Similarity().choose(tokens, signals, 8).apply(tokens.with_origin())
    for image in range(2):
        weight, cost = weights[image].tolist(), costs[image].tolist()
        loss = [
            [cost[a][b] * weight[a] * weight[b] / (weight[a] + weight[b]) for b in range(20)]
            for a in range(20)
        ]
        wanted = grouped(loss, weight, 8)
        assert set(after.cells()[image].tolist()) == set(wanted)
        for head, group in wanted.items():
            assert (after.origin[image, group] == after.origin[image, head]).all()


# --- where patches join


def squares_of(cells, side, across):
    return cells // across // side * across + cells % across // side


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.02, "floor": 0.0}], ids=["fixed", "own"])
@pytest.mark.parametrize(
    "window",
    [
        2,
        4,
    ],
)
def test_patches_join_within_their_square(window, settings):
    model = patchslim.slim(
        host(8, depth=2), "similarity", keep_rate=0.6, at=(0,), window=window, **settings
    )
    x = noise(3, 3, 32, 32)
    every = torch.arange(64).expand(3, -1)
    tokens = model.trace(x, 1)[0]
    speaker = tokens.cells().gather(1, tokens.origin)
    assert tokens.origin.min() >= 0
    assert max(tokens.lengths()) < 65
    assert torch.equal(squares_of(every, window, 8), squares_of(speaker, window, 8))


@pytest.mark.parametrize("window", [2, 3, 4])
def test_duplicates_join_within_their_square(window):
    model = patchslim.slim(host(8, depth=2), "duplicates", window=window)
    tokens = model.trace(repeating((2, 3), 8), 1)[0]
    every = torch.arange(64).expand(2, -1)
    speaker = tokens.cells().gather(1, tokens.origin)
    assert torch.equal(squares_of(every, window, 8), squares_of(speaker, window, 8))
    assert max(tokens.lengths()) < 65


def survivors_of_squares(model, x, side):
    """Counts in how many squares each image has a patch left at the end."""
    tokens = model.trace(x)[-1]
    squares = squares_of(tokens.cells(), side, 8)
    prefix = tokens.prefix
    return [
        len(set(image[: length - prefix].tolist()))
        for image, length in zip(squares, tokens.lengths(), strict=True)
    ]


SQUARES = {
    "ward": {},
    "ward with a threshold": {"threshold": 1e3, "floor": 0.0},
    "leader": {"group": "leader", "threshold": 0.5, "floor": 0.0},
    "density": {"group": "density"},
    "medoids": {"group": "medoids"},
    "average": {"group": "average", "measure": "cosine"},
    "paper": {"preset": "paper"},
    "alone": {"group": "nearest", "survivor": "alone"},
}


@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
@pytest.mark.parametrize("side", [3, 4])
@pytest.mark.parametrize("name", SQUARES)
def test_one_patch_of_each_square_stays(name, side):
    count = (-(-8 // side)) ** 2
    model = patchslim.slim(host(8), "similarity", keep=[41, 11, 11], squares=side, **SQUARES[name])
    assert survivors_of_squares(model, noise(4, 3, 32, 32), side) == [count] * 4


def test_one_patch_of_each_square_stays_where_half_of_them_may_go():
    model = patchslim.slim(
        host(8), "similarity", keep=[65, 33, 33], squares=2, group="bipartite", on="keys"
    )
    assert survivors_of_squares(model, noise(4, 3, 32, 32), 2) == [16] * 4


@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
def test_one_patch_of_each_square_stays_where_patches_go_in_steps():
    settings = {"group": "iterative", "measure": "cosine", "squares": 3}
    model = patchslim.slim(host(8), "similarity", keep=[41, 11, 11], **settings)
    assert survivors_of_squares(model, noise(4, 3, 32, 32), 3) == [9] * 4


@pytest.mark.parametrize("name", ["medoid", "first", "heaviest"])
def test_squares_refuse_a_survivor_that_its_group_elects(name):
    with pytest.raises(BadSetting, match="survivor is then mean, weighted or alone"):
        Similarity(group="nearest", survivor=name, squares=3)


@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
def test_squares_and_windows_together_keep_one_of_each():
    model = patchslim.slim(
        host(8), "similarity", keep=[41, 11, 11], squares=3, window=4, weight="class"
    )
    assert survivors_of_squares(model, noise(4, 3, 32, 32), 3) == [9] * 4


# --- batches and sizes


@pytest.mark.parametrize(
    "settings",
    [{}, {"threshold": 0.01, "floor": 0.2}, {"group": "medoids"}, {"preset": "paper"}],
    ids=["ward", "threshold", "medoids", "paper"],
)
def test_the_order_of_the_images_is_the_order_of_the_answers(settings):
    model = patchslim.slim(host(), "similarity", keep_rate=0.7, at=(0, 1), **settings)
    x = noise(5, 3, 24, 24)
    order = [3, 0, 4, 4, 1, 2]
    with torch.no_grad():
        torch.testing.assert_close(model(x[order]), model(x)[order], atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // 4)
        return out


LARGE = {
    "ward": ("similarity", {"keep_rate": 0.5, "at": (0,)}),
    "threshold": ("similarity", {"keep_rate": 0.6, "at": (0,), "threshold": 1e-3, "floor": 0.1}),
    "medoid": (
        "similarity",
        {"keep_rate": 0.5, "at": (0,), "group": "nearest", "survivor": "medoid"},
    ),
    "components": (
        "similarity",
        {"keep_rate": 0.5, "at": (0,), "group": "components", "threshold": 0.1},
    ),
    "iterative": (
        "similarity",
        {"keep_rate": 0.5, "at": (0,), "group": "iterative", "measure": "cosine"},
    ),
    "paper": ("similarity", {"keep_rate": 0.5, "at": (0,), "preset": "paper"}),
    "duplicates": ("duplicates", {"keep_rate": 0.9, "at": (0,), "tolerance": 0.5}),
}


@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
@pytest.mark.parametrize("name", LARGE)
def test_with_many_patches_only_those_of_a_window_are_compared(name):
    """33 x 33 patches, of which 16 x 16 are compared at a time: never all with all."""
    method, settings = LARGE[name]
    made, x = host(33, depth=2), noise(1, 3, 132, 132)
    model = patchslim.slim(made, method, **settings)
    with torch.no_grad():
        tokens = model.start_pass().embed(x, {}, track=False)
        q = noise(1, 4, tokens.x.shape[1], 8)
        signals = Signals(tokens.prefix, 0.3, q, q, q)
        keep = model.counts()[0] - 1
        with Largest() as largest:
            after = model.method.choose(tokens, signals, keep).apply(tokens)
        # Runs of 256 rows, of which the last is filled up.
        assert 0 < largest.elements < 1089 * 1089
        assert after.x.shape[1] == keep + 1 == model.trace(x, 1)[0].x.shape[1]
        if not model.method.adaptive:
            assert after.lengths() == [keep + 1]


def test_the_peak_of_many_patches_is_the_dense_host_s():
    made, x = host(33, depth=2), noise(1, 3, 132, 132)
    model = patchslim.slim(made, "similarity", keep_rate=0.5, at=(0,))
    with torch.no_grad():
        some = peak_memory(lambda: model(x))
    assert some < 4 * 1089 * 1089 * 2
