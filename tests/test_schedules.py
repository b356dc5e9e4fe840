"""Schedules and budgets: every rule, every error, and the largest cost below every target."""

import json
import math
import warnings
from fractions import Fraction

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchslim
from patchslim.errors import (
    BadFile,
    BadSchedule,
    BadSetting,
    DeepCut,
    ImpossibleBudget,
    ShortSchedule,
    UnknownName,
)
from patchslim.hosts._registry import find_adapter
from patchslim.methods import Place, Placement
from patchslim.methods._method import remembers
from patchslim.schedules.blocks import later_blocks, stage_blocks, unit_blocks
from patchslim.schedules.budget import (
    MIN_BLOCK_RATE,
    blocks_always_decided,
    make_schedule,
    schedule_for_macs,
)
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import (
    Constant,
    Counts,
    Rate,
    Removed,
    Schedule,
    round_half_up,
)
from patchslim.testing.trial import noise_images, tiny_host
from patchslim.tokens.shapes import BlockShape, HostShape, dense_macs
from toy_methods import KeepAttendedOnQueries, KeepLongestBefore, MergeShortestOnMap

CASES = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def method(name, **given_settings):
    return patchslim.find_method(name)(**given_settings)


def shape(side=14, depth=12, width=192, *, prefix=1, read=1):
    """Makes the shape of a plain vision transformer of any size, without building one."""
    return HostShape(
        grid=(side, side),
        prefix=prefix,
        embed=side * side * 768 * width,
        blocks=(BlockShape.standard(width, 3),) * depth,
        head=1000 * width,
        read=read,
    )


# ------------------------------------------------------------------------------------ the rules


def test_constant_removes_r_in_every_block():
    assert Constant(13).counts(197, 1, 12, method("tome")) == tuple(range(184, 40, -13))
    assert Constant(0).counts(17, 1, 3, method("identity")) == (17, 17, 17)


def test_a_fraction_of_r_is_spread_evenly():
    assert Constant(2.5).counts(197, 1, 4, method("tome")) == (194, 192, 189, 187)
    assert Constant(0.25).counts(17, 1, 4, method("random")) == (17, 16, 16, 16)


def official_tome(r, inflect, patches, depth):
    """Computes ToMe's tilted schedule with its own limit: at most half of the patches a block."""
    first = int(r * (1 - inflect))
    step = (2 * r - 2 * first) / (depth - 1)
    left = []
    for block in range(depth):
        patches -= min(int(first + step * block), patches // 2)
        left.append(patches + 1)
    return tuple(left)


@CASES
@given(
    st.integers(0, 40),
    st.sampled_from([-1, -0.5, 0, 0.5, 1]),
    st.sampled_from([16, 64, 196, 576]),
    st.integers(2, 24),
)
def test_tilted_schedules_are_the_official_ones_at_the_limit_too(r, inflect, patches, depth):
    counts = Constant(r, inflect).counts(patches + 1, 1, depth, method("tome"))
    assert counts == official_tome(r, inflect, patches, depth)


def test_a_list_of_r_is_the_official_one_at_the_limit_too():
    removed = Removed((40, 3, 3, 0))
    assert removed.counts(65, 1, 4, method("tome")) == (33, 30, 27, 27)
    assert removed.counts(65, 1, 4, method("random")) == (25, 22, 19, 19)


@CASES
@given(st.integers(1, 99), st.integers(1, 400), st.booleans())
def test_rates_keep_the_ceiling_and_the_fused_row(percent, patches, fuse):
    rate = percent / 100
    counts = Rate(rate, (1, 2)).counts(patches + 1, 1, 4, method("evit", fuse=fuse))
    rows, wanted = patches, [patches]
    for _ in range(2):
        rows = min(rows, math.ceil(Fraction(percent, 100) * rows) + fuse)
        wanted.append(rows)
    assert counts == (wanted[0] + 1, wanted[1] + 1, wanted[2] + 1, wanted[2] + 1)


def test_counts_are_given_as_they_are():
    assert Counts((17, 12, 12), 17, 1).counts(17, 1, 3, method("random")) == (17, 12, 12)


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [(12, (3, 6, 9)), (24, (6, 12, 18)), (4, (1, 2, 3)), (3, (1, 2)), (2, (1,)), (1, (0,))],
)
def test_stages_are_quarters_of_the_depth(depth, wanted):
    assert stage_blocks(depth) == wanted


@pytest.mark.parametrize(
    "rule",
    [Constant(13), Constant(7.5, -1), Removed((3, 0, 2)), Rate(0.7, (3, 6)), Counts((9, 8), 17, 1)],
)
def test_a_rule_survives_json_and_a_file(rule, tmp_path):
    assert Schedule.from_json(json.loads(json.dumps(rule.to_json()))) == rule
    rule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == rule
    assert Schedule.load(str(tmp_path / "schedule.json")) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a saved schedule"),
        ("[1, 2]", "JSON object, not list"),
        ('{"kind": "constant", "s": 3}', "does not take ['s']"),
        ('{"kind": "constant", "r": "many"}', "r takes a number"),
        ('{"kind": "rate", "rate": 0.5, "at": 3}', "give a list or a tuple"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(tmp_path, text, message):
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(BadFile) as caught:
        Schedule.load(path)
    assert message in str(caught.value)


def test_a_rule_of_another_kind_names_the_nearest(tmp_path):
    with pytest.raises(UnknownName, match="'constant'"):
        Schedule.from_json({"kind": "constnt", "r": 3})
    with pytest.raises(BadFile, match="not a saved schedule"):
        Schedule.load(tmp_path / "missing.json")
    with pytest.raises(BadSchedule, match="whole numbers"):
        Schedule.from_json({"kind": "counts", "kept": ["a"], "entering": 17, "prefix": 1})


# ------------------------------------------------------------------------------------ the errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1), "r must be 0 or more"),
        (lambda: Constant(float("nan")), "r must be 0 or more"),
        (lambda: Constant(float("inf")), "r must be 0 or more"),
        (lambda: Constant(3, 1.5), "between -1"),
        (lambda: Removed((3, -1)), "whole numbers from 0"),
        (lambda: Removed((3, 1.5)), "whole numbers from 0"),
        (lambda: Removed((True, 1)), "whole numbers from 0"),
        (lambda: Rate(0, (3,)), "share of patches *kept*"),
        (lambda: Rate(1.1, (3,)), "say keep_rate=0.7"),
        (lambda: Rate(70, (3,)), "at most 1"),
        (lambda: Rate(float("nan"), (3,)), "at most 1"),
        (lambda: Rate(0.7, ()), "ascending, such as 3,6,9"),
        (lambda: Rate(0.7, (6, 3)), "ascending"),
        (lambda: Rate(0.7, (3, 3)), "ascending"),
        (lambda: Rate(0.7, (-1, 3)), "from 0"),
        (lambda: Rate(0.7, (1.5,)), "block numbers"),
        (lambda: Counts((17, 0), 17, 1), "above the host's 1 prefix"),
        (lambda: Counts((17, 1), 17, 1), "above the host's 1 prefix"),
        (lambda: Counts((17, 9.5), 17, 1), "whole numbers"),
    ],
)
def test_a_rule_that_means_nothing_is_refused_where_it_is_made(make, message):
    with pytest.raises(BadSchedule) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rate(0.7, (1, 3)), "blocks 0 to 2"),
        (Removed((1, 1)), "has 2 numbers, and the host has 3 blocks"),
        (Counts((17, 9), 17, 1), "has 2 counts, and the host has 3 blocks"),
        (Counts((9, 12, 9), 17, 1), "only 9 enter it"),
        (Counts((18, 9, 9), 17, 1), "Counts only fall"),
        (Counts((9, 9, 9), 26, 1), "made for 26 tokens"),
        (
            Counts((9, 9, 9), 26, 1),
            "images give 17 tokens (1 of them prefix). Resize them, or slim",
        ),
        (Counts((9, 9, 9), 17, 2), "made for 17 tokens (2 of them prefix)"),
    ],
)
def test_a_rule_that_does_not_fit_the_host_is_refused(rule, message):
    with pytest.raises(BadSchedule) as caught:
        patchslim.slim(tiny_host(), "random", rule)
    assert message in str(caught.value)
    with pytest.raises(BadSchedule):
        patchslim.macs(tiny_host(), "random", rule)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "How much is to be kept?"),
        ({"r": -1}, "r must be 0 or more"),
        ({"r": [1, 2]}, "has 2 numbers, and the host has 3 blocks"),
        ({"r": [1, -2, 0]}, "whole numbers from 0"),
        ({"r": "3"}, "r='3': r takes a number"),
        ({"keep": "0.5"}, "keep='0.5': keep takes a number"),
        ({"r": (3, 2)}, "between -1"),
        ({"keep_rate": 1.2}, "at most 1"),
        ({"keep_rate": 0.5, "at": (5,)}, "blocks 0 to 2"),
        ({"keep_rate": 0.5, "at": ()}, "ascending"),
        ({"keep": 0.5, "at": ()}, "ascending"),
        ({"keep": 0}, "above 0 and at most 1"),
        ({"keep": 1.5}, "above 0 and at most 1"),
        ({"keep": [12, 13, 9]}, "only 12 enter it"),
        ({"keep": [12, 9]}, "has 2 counts"),
        ({"keep": [12, 9, 1]}, "above the host's 1 prefix"),
        ({"keep": [12, 9, 3.5]}, "whole numbers"),
        ({"r": 3, "keep": 0.5}, "Give one of them, not several: keep, r"),
        ({"macs": 0.6, "keep_rate": 0.5}, "Give one of them, not several: macs, keep_rate"),
        ({"r": 3, "schedule": Constant(2)}, "Give one of them, not several: r, schedule"),
        ({"r": [3, 3, 3], "at": (1,)}, "at=(1,) goes with one number"),
        ({"keep": [9, 9, 9], "at": (1,)}, "at=(1,) goes with one number"),
        ({"macs": 0}, "above 0 and at most 1"),
        ({"macs": -0.5}, "above 0 and at most 1"),
        ({"macs": float("nan")}, "above 0 and at most 1"),
        ({"macs": 60}, "share of the model's own"),
        ({"macs": 1e12}, "more than the model itself has"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(budget, message):
    with pytest.raises(BadSchedule) as caught:
        patchslim.slim(tiny_host(), "random", **budget)
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "near"), [("keep_rat", "keep_rate"), ("mac", "macs"), ("R", "r")])
def test_an_unknown_budget_names_the_nearest(name, near):
    with pytest.raises(UnknownName, match=f"{near}"):
        patchslim.slim(tiny_host(), "random", **{name: 0.5})


def test_a_method_that_removes_nothing_needs_no_budget():
    assert patchslim.slim(tiny_host(), "identity").counts() == (17, 17, 17)


# ---------------------------------------------------------------------------------- the warnings


def test_rows_that_a_method_cannot_remove_warn_at_the_users_line():
    with pytest.warns((ShortSchedule, DeepCut)) as caught:
        slimmed = patchslim.slim(tiny_host(), "tome", r=12)
    assert slimmed.counts() == (9, 5, 3)
    assert [warning.category for warning in caught] == [ShortSchedule, DeepCut]
    assert "ToMe cannot remove all that the schedule asks at block 0" in str(caught[0].message)
    assert "leaves at least 9 tokens there" in str(caught[0].message)
    assert {warning.filename for warning in caught} == {__file__}


def test_no_warning_if_everything_asked_is_removed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patchslim.slim(tiny_host(), "tome", r=2).counts() == (15, 13, 11)


def test_a_deep_cut_warns_at_the_users_line():
    with pytest.warns(DeepCut, match="of the operations are removed") as caught:
        patchslim.slim(tiny_host(), "random", keep=[5, 5, 5])
    assert [warning.filename for warning in caught] == [__file__]


def test_half_of_the_work_is_no_deep_cut():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patchslim.slim(tiny_host(depth=12), "random", macs=0.52)


# -------------------------------------------------------------------------------- what users ask


def test_the_words_of_papers_become_rules():
    host, random, tome = shape(), method("random"), method("tome")
    assert make_schedule(host, tome, r=13) == Constant(13)
    assert make_schedule(host, tome, r=(7, -1)) == Constant(7, -1.0)
    assert make_schedule(host, tome, r=[3] * 12) == Removed((3,) * 12)
    assert make_schedule(host, random, keep_rate=0.7) == Rate(0.7, (3, 6, 9))
    assert make_schedule(host, tome, keep_rate=0.7, at=[2, 4]) == Rate(0.7, (2, 4))
    assert make_schedule(host, random, keep=0.125) == Rate(0.5, (3, 6, 9))
    assert make_schedule(host, tome, keep=0.5) == Constant(196 * 0.5 / 12)
    assert make_schedule(host, tome, keep=0.25, at=(4, 8)) == Rate(0.5, (4, 8))
    assert make_schedule(host, random, keep=range(197, 185, -1)) == Counts(
        (*range(197, 185, -1),), 197, 1
    )
    assert make_schedule(host, random, Constant(4)) == Constant(4)


def test_the_share_to_keep_is_what_is_left():
    for name in ("random", "tome"):
        for keep in (0.9, 0.5, 0.3):
            counts = make_schedule(shape(), method(name), keep=keep).counts(
                197, 1, 12, method(name)
            )
            assert abs((counts[-1] - 1) / 196 - keep) < 0.02


def test_a_saved_schedule_is_taken_by_its_path(tmp_path):
    path = tmp_path / "schedule.json"
    Removed((4, 2, 0)).save(path)
    for given_as in (path, str(path), Schedule.load(path)):
        slimmed = patchslim.slim(tiny_host(), "tome", schedule=given_as)
        assert slimmed.counts() == (13, 11, 11)
        assert slimmed(noise_images(1)).shape == (1, 5)


def test_rules_follow_a_free_image_size_and_counts_do_not():
    host = tiny_host(dynamic_img_size=True)
    assert patchslim.slim(host, "tome", r=2).counts((32, 32))[-1] == 65 - 6
    assert patchslim.slim(host, "tome", r=[2, 0, 1]).counts((32, 32))[-1] == 65 - 3
    assert patchslim.slim(host, "random", keep_rate=0.75, at=(0,)).counts((32, 32))[-1] == 49
    with pytest.raises(BadSchedule, match="made for 17 tokens"):
        patchslim.slim(host, "tome", keep=[15, 13, 11]).counts((32, 32))


# ----------------------------------------------------------------------------------- the budgets

HOSTS = {
    "deit": shape(),
    "small images": shape(side=8, depth=6, width=64),
    "wide": shape(side=7, depth=4, width=768),
    "distilled": shape(side=9, depth=5, prefix=2, read=2),
    "average": shape(side=10, depth=7, prefix=0, read=None),
}
METHODS = [
    *(method(name) for name in patchslim.method_names() if name != "identity"),
    method("evit", fuse=False),
    KeepLongestBefore(),
    KeepAttendedOnQueries(),
    MergeShortestOnMap(),
]
TARGETS = (0.95, 0.8, 0.6, 0.45, 0.3)


def family(host, method, at=None):
    """Lists every schedule of the rule that is natural to the method, by its exact break points."""
    patches = host.entering - host.prefix
    if method.placement is Placement.EVERY_BLOCK:
        steps = {
            (2 * removed - 1) / (2 * (block + 1))
            for block in range(host.depth)
            for removed in range(1, patches + 1)
        }
        return [Constant(0), *(Constant(r + 1e-9) for r in sorted(steps))]
    rates = {kept / rows for rows in range(1, patches + 1) for kept in range(1, rows + 1)}
    # A method may take its share of all patches, and a power of the rate for each stage.
    rates |= {(kept / patches) ** (1 / stage) for kept in range(1, patches + 1) for stage in (2, 3)}
    natural = {
        Placement.FIRST: (0,),
        Placement.STAGES: stage_blocks(host.depth),
        Placement.UNITS: unit_blocks(host.depth, {}),
    }
    at = at or natural[method.placement]
    return [Rate(rate, at) for rate in sorted(rates, reverse=True)]


def spent(host, method, rule, *, tail):
    """Counts what a schedule costs, with the blocks in which the method decides anyway."""
    counts = rule.counts(host.entering, host.prefix, host.depth, method)
    named = blocks_always_decided(method, rule, host.depth)
    return slim_macs(host, method, counts, tail=tail, named=named).total


def costs(host, method, at=None, *, tail):
    """Finds the different costs in a family, largest first, each with its mildest rule."""
    rules = {}
    for rule in family(host, method, at):
        rules.setdefault(spent(host, method, rule, tail=tail), rule)
    return dict(sorted(rules.items(), reverse=True))


def families(host, method, *, tail):
    """Lists the costs of the one family, or of those that begin earlier and earlier."""
    if method.placement is not Placement.LATER:
        return [costs(host, method, tail=tail)]
    begins = range(host.depth // 4, 0, -1)
    return [
        costs(host, method, later_blocks(host.depth, begin), tail=tail) for begin in begins or (1,)
    ]


def largest(every, most):
    """Finds the largest cost that fits, of the first family with a rate not steep, or the last."""
    for each in every:
        fitting = [cost for cost in each if cost <= most]
        if fitting and getattr(each[fitting[0]], "rate", 1) >= MIN_BLOCK_RATE:
            break
    return fitting[0] if fitting else None


def tailed():
    """Lists methods and tails whose cost falls with every token removed.

    On the map (P3) it does not: a decision in the last block needs the queries of all rows, which
    the exact tail otherwise spares. The budget holds there too, but need not be the largest. By
    default each is tried with one tail.
    """
    for method in METHODS:
        for tail in ("exact", "full"):
            on_map = method.place is Place.ON_MAP
            if not on_map or tail == "full":
                yield pytest.param(
                    method,
                    tail,
                    id=f"{type(method).__name__}({method.extra_repr()})-{tail}",
                    marks=[pytest.mark.slow] * (tail == "full" and not on_map),
                )


@pytest.mark.parametrize(("method", "tail"), list(tailed()))
@pytest.mark.parametrize(
    "name",
    [
        "small images",
        pytest.param("distilled", marks=pytest.mark.slow),
        pytest.param("wide", marks=pytest.mark.slow),
        pytest.param("average", marks=pytest.mark.slow),
    ],
)
def test_the_solved_schedule_is_the_largest_below_the_target(method, name, tail):
    host = HOSTS[name]
    dense = dense_macs(host).total
    every = families(host, method, tail=tail == "exact")
    for target in TARGETS:
        wanted = largest(every, target * dense)
        if wanted is None:
            with pytest.raises(ImpossibleBudget):
                schedule_for_macs(host, method, target, tail=tail)
            continue
        rule = schedule_for_macs(host, method, target, tail=tail)
        assert spent(host, method, rule, tail=tail == "exact") == wanted


@CASES
@given(
    st.sampled_from(METHODS),
    st.sampled_from(sorted(HOSTS)),
    st.floats(0.05, 1.0),
    st.sampled_from(["full", "exact"]),
)
def test_a_solved_cost_never_exceeds_its_target(method, name, target, tail):
    host = HOSTS[name]
    try:
        rule = schedule_for_macs(host, method, target, tail=tail)
    except ImpossibleBudget:
        return
    cost = spent(host, method, rule, tail=tail == "exact")
    assert cost <= target * dense_macs(host).total
    assert Schedule.from_json(json.loads(json.dumps(rule.to_json()))) == rule


@CASES
@given(
    st.sampled_from([each for each in METHODS if not remembers(each)]),  # r names the first block
    st.floats(0, 60),
    st.floats(0, 60),
)
def test_more_removed_never_costs_more(method, r, more):
    host = HOSTS["deit"]
    few, many = sorted((r, more))
    costs_of = [
        slim_macs(host, method, Constant(each).counts(197, 1, 12, method), tail=False).total
        for each in (few, many)
    ]
    assert costs_of[1] <= costs_of[0]


@pytest.mark.parametrize("name", sorted(HOSTS))
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_an_impossible_budget_names_the_nearest_and_that_one_works(method, name):
    host = HOSTS[name]
    with pytest.raises(ImpossibleBudget, match="Nearest possible: macs=") as caught:
        schedule_for_macs(host, method, 0.001, tail="full")
    nearest = float(str(caught.value).rpartition("macs=")[2].rstrip("."))
    rule = schedule_for_macs(host, method, nearest, tail="full")
    counts = rule.counts(host.entering, host.prefix, host.depth, method)
    cost = slim_macs(host, method, counts, tail=False).total
    assert cost <= nearest * dense_macs(host).total
    with pytest.raises(ImpossibleBudget):
        schedule_for_macs(host, method, nearest - 0.001, tail="full")


def test_identity_has_no_cheaper_schedule():
    with pytest.raises(ImpossibleBudget, match=r"Identity cannot go below 1\.000"):
        schedule_for_macs(shape(), method("identity"), 0.9, tail="full")
    rule = schedule_for_macs(shape(), method("identity"), 0.95, tail="exact")
    assert rule.counts(197, 1, 12, method("identity")) == (197,) * 12


def test_what_the_exact_tail_saves_is_spent_on_tokens():
    host, tome = shape(), method("tome")
    full, exact = (schedule_for_macs(host, tome, 0.6, tail=tail) for tail in ("full", "exact"))
    assert sum(exact.kept) > sum(full.kept)
    assert schedule_for_macs(host, tome, 0.95, tail="exact").counts(197, 1, 12, tome) == (197,) * 12


def test_a_budget_is_a_share_or_a_number():
    host = tiny_host()
    dense = patchslim.macs(host).total
    share = patchslim.slim(host, "tome", macs=0.6)
    number = patchslim.slim(host, "tome", macs=0.6 * dense)
    assert share.counts() == number.counts()
    assert share.plan.tail == number.plan.tail == "exact"
    assert share.macs().total <= 0.6 * dense
    assert patchslim.macs(host, "tome", macs=0.6) == share.macs()
    assert patchslim.macs(host, macs=0.6) == share.macs()  # the method that `slim` takes, too
    assert patchslim.macs(host, macs=None).total == dense
    assert patchslim.slim(host, "tome", macs=0.6, tail="full").plan.tail == "full"
    assert patchslim.slim(host, "tome", macs=1.0).counts() == (17, 17, 17)


def test_blocks_may_be_named_with_a_budget():
    for name in ("tome", "random"):
        counts = patchslim.slim(tiny_host(), name, macs=0.7, at=(1,)).counts()
        assert counts[0] == 17
        assert counts[1] == counts[2] < 17


def test_a_budget_on_a_real_model():
    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    dense = patchslim.macs(host).total
    for name in ("tome", "evit", "topk", "random"):
        for share in (0.4, 0.6, 0.8):
            cost = patchslim.macs(host, name, macs=share)
            assert share - 0.01 < cost.total / dense <= share
    assert find_adapter(host).shape(host).entering == 197


@pytest.mark.parametrize(("value", "wanted"), [(0.5, 1), (1.5, 2), (2.4999, 2), (-0.5, 0), (3, 3)])
def test_halves_round_up(value, wanted):
    assert round_half_up(value) == wanted


# --------------------------------------------------------------------------------------- pyramids

PYRAMID = {2: 12, 4: 4}  # patches after the blocks that stride, of 35


@pytest.mark.parametrize(
    ("depth", "resets", "places"),
    [
        (12, {}, (4, 8)),
        (3, {}, (1, 2)),
        (2, {}, (1,)),
        (11, {4: 16, 7: 4}, (2, 5, 8)),  # Evo-LeViT: two blocks before the first selection
        (7, PYRAMID, (3, 5)),  # block 2 strides
        (5, {3: 4}, (2, 4)),
        (4, {3: 4}, (2,)),  # no block is left behind the stride
    ],
)
def test_units_are_the_first_blocks_of_stages(depth, resets, places):
    assert unit_blocks(depth, resets) == places


def test_counts_begin_anew_where_the_grid_is_subsampled():
    topk, tome = method("topk"), method("tome")
    rate = Rate(0.5, (1, 3, 5))
    assert rate.counts(36, 1, 7, topk, PYRAMID) == (36, 19, 13, 7, 5, 3, 3)
    assert Constant(3).counts(36, 1, 7, tome, PYRAMID) == (33, 30, 13, 10, 5, 3, 2)
    assert Removed((3, 3, 9, 0, 9, 1, 0)).counts(36, 1, 7, tome, PYRAMID) == (
        (33, 30, 13, 13, 5, 4, 4)
    )
    evo = method("evo")
    assert rate.counts(36, 1, 7, evo, PYRAMID) == (36, 19, 13, 8, 5, 4, 4)


def test_counts_at_a_stride_are_the_hosts_own():
    kept = [36, 20, 13, 13, 5, 5, 5]
    topk = method("topk")
    assert Counts(tuple(kept), 36, 1).counts(36, 1, 7, topk, PYRAMID) == tuple(kept)
    for place, count in ((2, 12), (2, 14), (4, 4)):
        wrong = Counts((*kept[:place], count, *kept[place + 1 :]), 36, 1)
        with pytest.raises(BadSchedule, match=f"leaves {count} .* Say {kept[place]} there"):
            wrong.counts(36, 1, 7, topk, PYRAMID)


def test_a_rate_names_no_block_that_subsamples():
    with pytest.raises(BadSchedule, match=r"block 4 subsamples .* Take the block after it, 5"):
        Rate(0.5, (1, 4)).counts(36, 1, 7, method("topk"), PYRAMID)


def test_the_same_rate_holds_in_every_block_from_the_first_place_on():
    assert Rate(0.5, (4, 8)).in_every_block(12, {}).at == tuple(range(4, 12))
    assert Rate(0.5, (2, 5, 8)).in_every_block(11, {4: 16, 7: 4}).at == (2, 3, 5, 6, 8, 9, 10)
    assert Rate(0.5, (3,)).in_every_block(7, PYRAMID) == Rate(0.5, (3, 5, 6))
    for rule in (Constant(2), Removed((1, 1)), Counts((9, 8), 10, 1)):
        with pytest.raises(BadSchedule, match=f"{rule.kind!r} has no rate"):
            rule.in_every_block(2, {})


def test_a_rate_counts_all_patches_if_they_come_back():
    evo = method("evo")
    rate = Rate(0.5, (4, 8))
    assert rate.counts(197, 1, 12, evo) == (*[197] * 4, *[100] * 8)
    plain = method("evo", representative=False)
    assert rate.counts(197, 1, 12, plain) == (*[197] * 4, *[99] * 8)
    assert Rate(1.0, (4, 8)).counts(197, 1, 12, evo) == (197,) * 12
    assert make_schedule(HOSTS["deit"], evo, keep=0.5) == rate


@pytest.mark.parametrize(
    ("method", "size", "most"),
    [("atc", 132, 1024), ("kmedoids", 132, 1024), ("topk+atc", 132, 1024), ("dpcknn", 260, 4096)],
)
def test_more_patches_than_a_method_is_meant_for_are_refused_before_images_come(method, size, most):
    with pytest.raises(BadSetting, match=f"not meant for more than {most}.* Use similarity"):
        patchslim.slim(tiny_host(img_size=size), method, keep_rate=0.99, at=(1,))
    slimmed = patchslim.slim(tiny_host(dynamic_img_size=True), method, keep_rate=0.9, at=(1,))
    with pytest.raises(BadSetting, match=f"not meant for more than {most}"):
        slimmed(torch.zeros(1, 3, size, size))
