"""Plans: the search, the tables and their cache, the promise never to be slower, and errors."""

from __future__ import annotations

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch

import patchslim
from patchslim.benchmarking.result import Ratio
from patchslim.cli.main import main
from patchslim.deployment.registry import find_target
from patchslim.errors import (
    BadData,
    BadFile,
    BadSchedule,
    BadSetting,
    DeepCut,
    ImpossibleBudget,
    UnknownName,
    UnsteadyTimes,
    UnsupportedModel,
    UnusedTable,
)
from patchslim.measurement.score import kl_divergence
from patchslim.methods._registry import method_label
from patchslim.methods.tome import ToMe
from patchslim.methods.topk import TopK
from patchslim.model.load import load
from patchslim.model.plan import make_plan
from patchslim.model.slim import untouched_model
from patchslim.planning import cache
from patchslim.planning.damage import CUTS, Damage, fit_damage, probe_damage
from patchslim.planning.finalists import (
    CONTENDERS,
    FINALISTS,
    choose_contenders,
    choose_finalists,
    slim_untouched,
)
from patchslim.planning.latency_table import LatencyTable, Point, SelfCheck
from patchslim.planning.measuring import Key, remove_drift, time_decisions
from patchslim.planning.method_search import (
    MethodSearch,
    find_rules,
    fit_correction,
    plannable_methods,
)
from patchslim.planning.planner import Planner, is_faster
from patchslim.planning.runtimes import open_runtime
from patchslim.planning.search import find_levels, least_cost, path_sum
from patchslim.planning.tables import warn_if_unsteady
from patchslim.testing.trial import noise_images, tiny_host

QUESTION = {"host": "a", "batch": 8}
DEVICE = {"processor": "fast", "versions": {"torch": "2"}}


class Sleeper(TopK):
    """Takes much longer to choose than a block takes to run."""

    def choose(self, tokens, signals, keep):
        time.sleep(0.003)
        return super().choose(tokens, signals, keep)


quick = pytest.mark.filterwarnings("ignore::patchslim.errors.UnsteadyTimes")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "cache"))


def random_tables(seed, blocks, levels):
    """Costs and damages of steps that only go down; deeper costs less and damages more."""
    draw = np.random.default_rng(seed)
    cost, damage = draw.random((2, blocks, levels, levels)) + 0.6
    above = np.tril_indices(levels, -1)
    cost[:, above[0], above[1]] = np.inf
    cost -= 0.09 * np.arange(levels)
    damage *= np.arange(levels)
    return cost, damage


def brute_force(cost, damage, limit):
    blocks, levels, _ = cost.shape
    ways = itertools.combinations_with_replacement(range(levels), blocks)
    fitting = [path_sum(damage, [*way]) for way in ways if path_sum(cost, [*way]) <= limit]
    return min(fitting, default=None)


@pytest.mark.parametrize("seed", range(20))
def test_the_search_is_as_good_as_trying_everything(seed):
    cost, damage = random_tables(seed, blocks=5, levels=5)
    for share in (0.8, 1.0, 1.3, 2.0):
        limit = share * cost[:, 0, 0].sum()
        best = brute_force(cost, damage, limit)
        found = find_levels(cost, damage, limit)
        if best is None:
            assert found is None
            continue
        assert path_sum(cost, found) <= limit * (1 + 1e-8)
        assert path_sum(damage, found) == pytest.approx(best, rel=0.02)


def test_the_least_cost_can_be_reached_and_nothing_below_it():
    cost, damage = random_tables(1, blocks=4, levels=6)
    least = least_cost(cost)
    assert path_sum(cost, find_levels(cost, damage, least)) == pytest.approx(least)
    assert find_levels(cost, damage, least * 0.999) is None


def test_a_large_search_keeps_its_limit():
    cost, damage = random_tables(2, blocks=12, levels=40)
    limit = 0.7 * cost[:, 0, 0].sum()
    found = find_levels(cost, damage, limit)
    assert path_sum(cost, found) <= limit * (1 + 1e-8)
    assert found == sorted(found)


def test_the_curve_of_damages_is_found_again_and_a_step_costs_twice():
    true = Damage(level=-3.0, slope=-4.0, bend=0.0, power=2.0, twist=0.0)
    probes = [(x, cut, true.of_cut(x, cut)) for x in np.linspace(0, 1, 11) for cut in CUTS]
    found = fit_damage(probes)
    assert found.of_cut(0.3, 0.4) == pytest.approx(true.of_cut(0.3, 0.4), rel=1e-3)
    table = found.table([100, 80, 60], 3)
    gone, more = true.of_cut(0.5, 0.2), true.of_cut(0.5, 0.4)
    assert table[1, 0, 1] == pytest.approx(2 * gone, rel=1e-3)
    assert table[1, 1, 2] == pytest.approx(more - gone + true.of_cut(0.5, 0.25), rel=1e-3)
    assert table[0, 0, 1] > table[2, 0, 1] > 0
    assert table[1, 1, 1] == 0


def test_a_noisy_probe_never_makes_a_further_cut_free():
    draw = np.random.default_rng(0)
    probes = [(x, cut, float(draw.random()) * 1e-3) for x in (0, 0.5, 1) for cut in CUTS]
    table = fit_damage(probes).table([*range(64, 8, -4)], 6)
    assert (table[:, :-1, 1:].diagonal(axis1=1, axis2=2) > 0).all()


def test_probes_cut_after_every_block_but_the_last_and_damage_grows():
    host = tiny_host()
    dense = patchslim.model.slim.slim(host, "identity", keep=1.0)
    cutting = patchslim.model.slim.slim(host, "tome", r=0)
    probes = probe_damage(dense, cutting, [noise_images(3)], lambda _: None)
    depth = dense.plan.shape.depth
    assert len(probes) == (depth - 1) * len(CUTS)
    for at in {each[0] for each in probes}:
        small, *_, large = [kl for place, _, kl in probes if place == at]
        assert 0 <= small < large


def table_of(patches=64, depth=4, *, tail=True, block=0.2):
    """A table in which a block takes as long as the patches in it are many, and deciding 1 %."""
    whole, reduced, tails = [], [], []
    for entering in (patches, *(patches * part // 16 for part in (15, 12, 8, 4, 2))):
        share = block * entering / patches
        points = [Point(entering, entering, share, share * 0.99, share * 1.01)]
        for left in {entering - 1, entering // 2}:
            share = block / 2 * (entering + left) / patches + 0.01
            points.append(Point(entering, left, share, share * 0.99, share * 1.01))
        (whole if entering == patches else reduced).extend(points)
        tails.append(Point(entering, entering, 0.05, 0.05, 0.05))
    checks = (SelfCheck((64, 64, 64, 64), 0.98, 1.0),)
    tails = tails if tail else []
    return LatencyTable(depth, 0.1, (*whole,), (*reduced,), (*tails,), checks, 0.02, 9)


def test_a_table_says_what_was_measured_and_goes_straight_between():
    table = table_of()
    assert table.block_share(64, 64) == pytest.approx(0.2)
    assert table.block_share(64, 48) == pytest.approx(0.1 * 112 / 64 + 0.01)
    assert table.block_share(40, 40) == pytest.approx(0.2 * 40 / 64)
    assert table.block_share(40, 30) == pytest.approx(0.1 * 70 / 64 + 0.01)
    assert table.tail_share(20) == pytest.approx(0.05)
    assert table.checks[0].error == pytest.approx(-0.02)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    with pytest.raises(BadFile):
        LatencyTable.from_json({"depth": 4})


def test_a_table_knows_what_a_method_cannot_do():
    costs = table_of().costs([64, 48, 32, 16, 8], ToMe())
    assert costs[0, 0, 2] == pytest.approx(0.1 * 96 / 64 + 0.01)
    assert math.isinf(costs[0, 0, 3])  # tome removes at most half at once
    assert math.isinf(costs[-1, 1, 2])  # the last block decides nothing for rows nobody reads
    assert costs[-1, 2, 2] == pytest.approx(0.05)
    assert np.isfinite(table_of(tail=False).costs([64, 48], ToMe())[-1, 0, 1])


def test_a_search_meets_its_limits_in_time_and_in_operations():
    host = tiny_host()
    plan = make_plan(host, "tome", r=0, tail="exact")
    model = patchslim.SlimModel(host, plan)
    table = table_of(patches=16, depth=plan.shape.depth)
    search = MethodSearch(model, table, Damage(-3.0, -2.0, 0.0, 2.0, 0.0))
    for by, planned in search.plans_for_time(0.9 * search.predict(plan)):
        assert by == "search" or by.startswith("rule")
        assert search.predict(planned) <= 0.9 * search.predict(plan) * (1 + 1e-9)
    target = 0.8 * plan.dense_cost.total
    found = dict(search.plans_for_macs(target))
    assert {*found} == {"search", "rule"}
    assert all(0.6 * target < each.cost.total <= target for each in found.values())


def test_whole_schedules_correct_sums_by_a_line():
    def checks(*pairs):
        return [SelfCheck((), total, share) for total, share in pairs]

    line = fit_correction(checks((0.9, 0.9), (0.7, 0.74), (0.5, 0.58)))
    assert line == pytest.approx((0.18, 0.8))
    assert line.of_sum(0.6) == pytest.approx(0.66)
    assert line.sum_for(0.66) == pytest.approx(0.6)
    assert fit_correction(checks((0.5, 0.6))) == pytest.approx((0.0, 1.2))
    assert fit_correction(checks((0.8, 0.7), (0.6, 0.75), (0.5, 0.7))).start == 0.0
    assert fit_correction([]) == (0.0, 1.0)


def test_a_table_is_kept_for_this_device_alone():
    assert cache.read_table(QUESTION, DEVICE) is None
    cache.write_table(QUESTION, DEVICE, {"depth": 3})
    assert cache.read_table(QUESTION, DEVICE) == {"depth": 3}
    assert cache.read_table({**QUESTION, "batch": 1}, DEVICE) is None
    other = {**DEVICE, "processor": "slow"}
    with pytest.warns(UnusedTable, match="processor 'fast', and here 'slow'"):
        assert cache.read_table(QUESTION, other) is None
    file = cache.table_file(QUESTION)
    file.write_text(file.read_text().replace('"depth": 3', '"depth": 4'))
    with pytest.warns(UnusedTable, match="edited or damaged"):
        assert cache.read_table(QUESTION, DEVICE) is None
    file.write_text("[]")
    with pytest.warns(UnusedTable, match="no table of latencies"):
        assert cache.read_table(QUESTION, DEVICE) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv(cache.FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.warns(UnusedTable, match=cache.FOLDER_VARIABLE):
        cache.write_table(QUESTION, DEVICE, {"depth": 3})


def test_a_slow_round_does_not_count():
    fast = {Key("dense"): 1.0, Key("block", 9, 9): 0.1, Key("block", 9, 5): 0.08}
    taken = {key: [value, 3 * value, value, 2 * value] for key, value in fast.items()}
    for key, times in remove_drift(taken).items():
        assert times == pytest.approx([times[0]] * 4)
        assert times[0] / remove_drift(taken)[Key("dense")][0] == pytest.approx(fast[key])


def test_times_under_load_are_told():
    loaded = Point(64, 64, 0.2, 0.1, 0.3)
    table = LatencyTable(1, 0.1, (loaded,), (loaded,), (), (), 0.02, 5)
    with pytest.warns(UnsteadyTimes, match="100% from round to round"):
        warn_if_unsteady(table)
    warn_if_unsteady(table_of())


def test_only_what_is_faster_beyond_noise_is_faster():
    assert is_faster(Ratio(0.9, 0.85, 0.99))
    assert not is_faster(Ratio(0.97, 0.93, 1.01))
    assert not is_faster(Ratio(1.2, 1.1, 1.3))


def batches(count=8):
    return [(noise_images(count), None)]


@quick
def test_a_method_that_is_slower_than_dense_gives_the_dense_model():
    host = tiny_host()
    planned = patchslim.plan(host, batches(), Sleeper(), macs=0.7, batch=1, seconds=0.01)
    assert planned.is_dense
    assert planned.to_json()["method"] == "dense"
    assert planned.kl.value < 1e-9
    assert "nothing that was found is faster" in str(planned)
    images = noise_images(2)
    assert torch.allclose(planned.model(images), host(images), atol=1e-5)


@quick
def test_more_time_than_the_dense_model_takes_gives_the_dense_model(tmp_path):
    host = tiny_host()
    planned = patchslim.plan(host, batches(), "topk", latency_ms=1e5, batch=2, seconds=0.01)
    assert planned.is_dense
    planned.model.save(tmp_path / "model")
    saved = load(tmp_path / "model", model=host)
    assert saved.calibrated["planned"]["goal"] == {"latency_ms": 1e5}


@quick
def test_no_time_at_all_is_refused_with_the_fastest_that_is_possible():
    with pytest.raises(ImpossibleBudget, match=r"fastest that is possible here is about .* ms"):
        patchslim.plan(tiny_host(), batches(), "topk", latency_ms=1e-6, batch=2, seconds=0.01)


def finalists(share, decisions=None):
    untouched = untouched_model(tiny_host(), None)
    methods = [TopK(), ToMe(), Sleeper(), patchslim.find_method("random")()]
    models = [slim_untouched(untouched, method) for method in methods]
    decisions = [0.0] * len(models) if decisions is None else decisions
    chosen = choose_finalists(untouched, models, decisions, noise_images(8), share, lambda _: None)
    return [type(model.method).__name__ for model in chosen]


def test_what_a_decision_takes_is_known_before_the_search():
    untouched = untouched_model(tiny_host(), None)
    models = [slim_untouched(untouched, method) for method in (TopK(), Sleeper())]
    with open_runtime("eager", None, None, 2, untouched.host) as device:
        quick_one, slow_one = time_decisions(models, device, noise_images(2), lambda _: None)
    assert slow_one > quick_one >= 0


def test_methods_that_lose_least_at_their_time_are_searched():
    host, images = tiny_host(), noise_images(8)
    losses = {}
    for method in (TopK(), ToMe(), Sleeper(), patchslim.find_method("random")()):
        slimmed = patchslim.slim(host, method, macs=0.8)
        with torch.no_grad():
            loss = kl_divergence(host(images), slimmed(images)).mean()
        losses[type(method).__name__] = float(loss)
    ranked = sorted(losses, key=losses.__getitem__)
    chosen = finalists(0.8, [0.0, 0.0, 0.0, 0.0])
    assert chosen[:FINALISTS] == ranked[:FINALISTS]
    # After them the one of the others that decides fastest, which alone may get there.
    assert finalists(0.5, [3.0, 2.0, 3.0, 3.0]) == ["ToMe"]
    assert finalists(0.65, [0.0, 9.0, 9.0, 5.0]) == ["TopK", "Random"]


def test_contenders_are_those_that_lose_least_and_the_one_that_computes_least():
    untouched = untouched_model(tiny_host(), None)
    models = [slim_untouched(untouched, method) for method in plannable_methods(untouched)]
    chosen = choose_contenders(untouched, models, noise_images(8), 0.8, lambda _: None)
    losses, work = {}, {}
    for model in models:
        slimmed = patchslim.slim(untouched.host, model.method, macs=0.8)
        with torch.no_grad():
            loss = kl_divergence(untouched.host(noise_images(8)), slimmed(noise_images(8))).mean()
        name = method_label(model.method)
        losses[name], work[name] = float(loss), slimmed.macs().choosing
    names = [method_label(model.method) for model in chosen]
    assert names[:CONTENDERS] == sorted(losses, key=losses.__getitem__)[:CONTENDERS]
    assert min(work[name] for name in names) == min(work.values())


def test_where_decisions_take_long_a_rule_decides_in_fewer_blocks():
    model = slim_untouched(untouched_model(tiny_host(depth=12), None), ToMe())
    whole = model.plan.dense_cost.total

    def share_of(plan):
        return plan.cost.total / whole + 0.03 * len(plan.decision_blocks)

    found = dict(find_rules(model, lambda plan: share_of(plan) <= 0.9))
    assert [*found] == ["rule", "rule at 3, 5, 7, 9", "rule at 3, 6, 9"]
    assert all(share_of(plan) <= 0.9 for plan in found.values())
    assert found["rule at 3, 6, 9"].cost.total > found["rule"].cost.total
    stages = slim_untouched(untouched_model(tiny_host(depth=12), None), TopK())
    assert [by for by, _ in find_rules(stages, lambda plan: share_of(plan) <= 0.9)] == ["rule"]


def test_a_method_that_is_not_meant_for_so_many_patches_is_not_planned_for():
    host = tiny_host(img_size=132)
    methods = plannable_methods(untouched_model(host, None))
    assert "atc" not in {method_label(each) for each in methods}
    with pytest.raises(BadSetting, match=r"planned for: atc .* not meant for more than 1024"):
        patchslim.plan(host, [(torch.zeros(8, 3, 132, 132), None)], "atc", macs=0.7, batch=1)


def test_a_full_disk_in_a_plan_for_a_runtime_is_told(monkeypatch):
    """OpenVINO raises whatever it likes where a file cannot be written."""

    def write(*_):
        raise RuntimeError("cannot write: no space left")

    monkeypatch.setattr(find_target("openvino"), "write", write, raising=False)
    on = {"runtime": "openvino", "batch": 2, "seconds": 0.01}
    with pytest.raises(BadFile, match=r"Could not write .*no space left"):
        patchslim.plan(tiny_host(), batches(), "topk", macs=0.6, **on)


def test_an_answer_without_half_of_the_operations_brings_a_warning(monkeypatch):
    script_times(monkeypatch, lambda model: 0.5 if model.plan.decision_blocks else 1.0)
    with pytest.warns(DeepCut, match="without any training"):
        patchslim.plan(tiny_host(depth=6), batches(), "topk", macs=0.4, batch=2)


class Misjudged(TopK):
    """Takes three times as long as the table of its blocks says."""


def script_times(monkeypatch, times):
    """Lets blocks take what `table_of` says, and whole models what `times` returns for each."""

    def find_table(model, *_, **__):
        shape = model.plan.shape
        block = 0.85 / (shape.depth - 1)
        return table_of(shape.entering - shape.prefix, shape.depth, block=block)

    def time_it(planner, model):
        return Ratio.of([times(model)] * 9, 0), 1.0

    monkeypatch.setattr("patchslim.planning.plan.find_table", find_table)
    monkeypatch.setattr(Planner, "_time", time_it)


def test_a_target_that_the_best_methods_miss_is_met_by_the_one_that_decides_fastest(monkeypatch):
    methods = [Misjudged(), Misjudged(), TopK()]
    monkeypatch.setattr("patchslim.planning.plan.plannable_methods", lambda _: methods)
    monkeypatch.setattr("patchslim.planning.planner.time_decisions", lambda *_: [0.0, 0.0, 0.001])

    def times(model):
        if not model.plan.decision_blocks:
            return 1.0
        return 2.4 if type(model.method) is Misjudged else 0.8

    script_times(monkeypatch, times)
    planned = patchslim.plan(tiny_host(), batches(), latency_ms=800, batch=8)
    assert type(planned.model.method) is TopK


@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
@pytest.mark.parametrize(("first", "more"), [(0.5, True), (0.9, False)])
def test_a_plan_that_takes_another_time_than_predicted_is_planned_again(monkeypatch, first, more):
    """One that is faster than it need be, too: it would lose answers for nothing."""
    shares, planned = iter([1.0, first, 0.79]), {}

    def times(model):
        if model.plan.steps not in planned:
            planned[model.plan.steps] = model.macs().total, next(shares)
        return planned[model.plan.steps][1]

    script_times(monkeypatch, times)
    found = patchslim.plan(tiny_host(), batches(), "topk", latency_ms=800, batch=2)
    assert found.measured.median == 0.79
    _, one, other = [total for total, _ in planned.values()]
    assert (other > one) == more


def test_a_time_that_other_work_has_spread_out_is_measured_again(monkeypatch):
    timed = []

    def time_it(planner, model):
        if not model.plan.decision_blocks:
            return Ratio.of([1.0] * 9, 0), 1.0
        timed.append(model)
        return Ratio.of([0.7, 1.4, 2.1] if len(timed) == 1 else [0.79] * 9, 0), 1.0

    script_times(monkeypatch, None)
    monkeypatch.setattr(Planner, "_time", time_it)
    found = patchslim.plan(tiny_host(), batches(), "topk", latency_ms=800, batch=2)
    assert found.measured.median == 0.79
    assert len(timed) == 2
    assert timed[0] is timed[1]


@quick
@pytest.mark.slow
def test_a_plan_for_a_runtime_times_blocks_and_models_there(monkeypatch):
    monkeypatch.setattr("patchslim.planning.measuring.ROWS", (0.7, 0.4))
    monkeypatch.setattr("patchslim.planning.measuring.TAIL_ROWS", (1.0, 0.3))
    on = {"runtime": "openvino", "precision": "bfloat16", "batch": 2, "seconds": 0.01}
    planned = patchslim.plan(tiny_host(), batches(), "topk", macs=0.6, **on)
    assert planned.latency_ms > 0
    assert planned.dense_ms > 0


@pytest.mark.slow
@quick
def test_a_second_plan_measures_no_blocks():
    host = tiny_host()
    patchslim.plan(host, batches(), "topk", macs=0.8, batch=2, seconds=0.01)
    lines = []
    patchslim.plan(host, batches(), "topk", macs=0.7, batch=2, seconds=0.01, progress=lines.append)
    assert not [line for line in lines if "preparing block" in line]
    patchslim.plan(
        host, batches(), "topk", macs=0.7, batch=2, seconds=0.01, fresh=True, progress=lines.append
    )
    assert [line for line in lines if "preparing block" in line]


@pytest.mark.slow
@quick
def test_several_methods_are_counted_while_they_are_searched(monkeypatch):
    monkeypatch.setattr("patchslim.planning.plan.plannable_methods", lambda _: [TopK(), ToMe()])
    lines = []
    patchslim.plan(tiny_host(), batches(), macs=0.7, batch=2, seconds=0.01, progress=lines.append)
    told = {line.partition(": ")[0] for line in lines if "damage" in line}
    assert told == {"method 1 of 2, topk", "method 2 of 2, tome"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, BadSchedule, "No target was given"),
        ({"latency_ms": 5, "macs": 0.5}, BadSchedule, "Got latency_ms and macs"),
        ({"latency_ms": -1}, BadSchedule, "latency_ms must be above 0"),
        ({"macs": 0.5, "runtime": "tensorrt"}, UnknownName, "Known: .*eager"),
        ({"macs": 0.5, "runtime": "pt2"}, BadSetting, "cannot be planned for yet"),
        ({"macs": 0.5, "precision": "bfloat16"}, BadSetting, r"model\.to\(torch\.bfloat16\)"),
        ({"macs": 0.5, "method": "ats"}, BadSetting, r"calibrate\(\) finds its threshold"),
        ({"macs": 0.5, "method": "dynamicvit"}, BadSetting, "trained or calibrated first"),
        ({"macs": 0.5, "method": "evo"}, BadSetting, "depends on the blocks before"),
        ({"macs": 0.5, "method": "identity"}, BadSetting, "removes nothing"),
        ({"macs": 0.5, "method": "topkk"}, UnknownName, "topk"),
        ({"macs": 0.5, "images": []}, BadData, "none came"),
        ({"macs": 0.5, "images": [(noise_images(2), None)]}, BadData, "and 2 came"),
        ({"macs": 0.5, "batch": 0}, BadSetting, "batch"),
    ],
)
def test_a_mistake_has_one_answer(arguments, error, message):
    given = {"images": batches(), "method": "topk", "seconds": 0.01, **arguments}
    with pytest.raises(error, match=message):
        patchslim.plan(tiny_host(), **given)


def test_a_slimmed_model_is_refused():
    slimmed = patchslim.slim(tiny_host(), "tome", r=1)
    with pytest.raises(UnsupportedModel, match="slimmed already"):
        patchslim.plan(slimmed, batches(), macs=0.5)


def test_auto_takes_a_target_and_images_and_nothing_else():
    with pytest.raises(BadSetting, match="give images"):
        patchslim.slim(tiny_host(), "auto", macs=0.5)
    with pytest.raises(BadSetting, match="leave out keep"):
        patchslim.slim(tiny_host(), "auto", keep=0.5, images=batches())
    with pytest.raises(BadSetting, match=r"patchslim\.plan\(model, images, 'tome'"):
        patchslim.slim(tiny_host(), "tome", latency_ms=3.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan digits", "No target was given"),
        ("plan digits --macs 0.5 --set fuse=false", "--set is for one method"),
        ("plan test_vit --macs 0.5", "random weights"),
        ("plan digits --macs 0.5 --method tone", "Did you mean 'tome'"),
        ("slim digits --macs 0.5 --method auto", "`patchslim plan` finds the best method"),
    ],
)
def test_a_command_that_cannot_be_followed_has_one_answer(words, message, capsys):
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


@quick
@pytest.mark.slow
def test_the_command_saves_a_model_that_others_take(tmp_path, capsys):
    out = tmp_path / "planned"
    words = "plan digits --macs 0.7 --method tome --limit 16 --seconds 0.5 --batch 2 --json"
    assert main([*words.split(), "--out", str(out)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["goal"] == {"macs": 0.7}
    assert data["images"] == 8
    assert load(out).calibrated["planned"]["measured"] == data["measured"]


@quick
@pytest.mark.slow
def test_auto_takes_the_best_method_and_no_plan_is_slower_than_dense():
    host = tiny_host()
    slimmed = patchslim.slim(host, "auto", macs=0.7, images=batches(), batch=2, seconds=0.01)
    fits = slimmed.macs().total <= 0.7 * slimmed.dense_macs().total
    assert fits or not slimmed.plan.decision_blocks
    for goal in ({"max_kl": 1.0}, {"macs": 0.6}, {"images_per_second": 1.0}):
        planned = patchslim.plan(host, batches(), "topk", batch=2, seconds=0.01, **goal)
        assert planned.is_dense or planned.measured.high < 1
