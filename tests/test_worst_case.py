"""The cap holds whatever the images show: noise, flat ones, and ones made to keep everything."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.errors import DeepCut, ImpossibleBudget, ShortSchedule
from patchslim.methods.similarity import Similarity
from patchslim.methods.tome import ToMe
from patchslim.testing.counting import count_macs
from timm_variants import randomise

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIDE, PATCH, EACH = 6, 4, 8
PIXELS = (SIDE * PATCH, SIDE * PATCH)
CAPS = (0.6, 0.8)
KEEPING, JOINING = 1e-6, 0.05  # tolerances: with the first hardly any patches join
GROUPS = {
    "nearest": {"group": "nearest"},
    "bipartite keys": {"group": "bipartite", "on": "keys", "measure": "cosine"},
    "leader": {"group": "leader"},
    "components": {"group": "components"},
    "average": {"group": "average"},
    "redundancy": {"group": "redundancy", "measure": "cosine"},
    "paper": {"preset": "paper"},
    "squares": {"squares": 3},
    "windows": {"window": 3},
}


@pytest.fixture(scope="module")
def attack():
    """Imports the benchmark of the worst case as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import worst_case

        yield worst_case
        for name in ("worst_case", "train_deit_tiny"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def host():
    made = VisionTransformer(
        img_size=SIDE * PATCH, patch_size=PATCH, embed_dim=32, depth=4, num_heads=4, num_classes=7
    )
    randomise(made)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images(attack, host):
    """Makes a few images of each kind, some of them moved by the attack."""
    dark_light = (torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = [kind(EACH, PIXELS, dark_light) for kind in (attack.uniform, attack.gaussian)]
        made.append(attack.plain(EACH, PIXELS, dark_light))
        made.append(attack.attacked(host, made[0], (1, 2), steps=4))
    loud = 1e4 * made[0][:2]
    return torch.cat([*made, loud, torch.zeros(1, 3, *PIXELS)])


def with_tolerance(name, tolerance):
    """Makes the method with its threshold at this tolerance; None if it has no threshold."""
    method_class = patchslim.find_method(name)
    threshold = method_class().tuned_threshold
    return (
        None
        if threshold is None
        else method_class(**{threshold.setting: threshold.setting_at(tolerance)})
    )


def adaptive():
    """Lists every adaptive method that ships, in as many ways as it can be set."""
    methods = {}
    for name in patchslim.method_names():
        plain = patchslim.find_method(name)()
        if plain.adaptive:
            methods[name] = plain
        for tolerance in (KEEPING, JOINING):
            if (other := with_tolerance(name, tolerance)) is not None:
                methods[f"{name} {tolerance:g}"] = other
    for name, settings in GROUPS.items():
        methods[f"similarity {name}"] = Similarity(threshold=0.01, **settings)
    return methods


ADAPTIVE = adaptive()
BOTH_FORMS = pytest.mark.parametrize(
    "packs", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["packed", "padded"]
)


def capped(host, method, cap):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeepCut)
        return patchslim.slim(host, method, macs=cap)


def test_every_method_of_this_kind_is_attacked():
    assert {name.split()[0] for name in ADAPTIVE} >= {"similarity", "tome", "ats", "duplicates"}
    assert all(method.adaptive for method in ADAPTIVE.values())


@BOTH_FORMS
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_no_image_costs_more_than_the_cap(host, images, name, cap, packs):
    model = capped(host, ADAPTIVE[name], cap)
    model.packs = packs
    most = model.macs()
    assert most.total <= cap * model.dense_macs().total
    with torch.no_grad():
        output, costs = model.forward_with_costs(images)
        every = model.start_pass().count_rows(images)
    assert output.isfinite().all()
    assert max(cost.total for cost in costs) <= most.total
    assert max(cost.choosing for cost in costs) <= most.choosing
    before_last = slice(0, -1)  # in the last block nobody decides about rows that nobody reads
    for rows in every:
        pairs = zip(rows[before_last], model.counts()[before_last], strict=True)
        assert all(got <= allowed for got, allowed in pairs)


@BOTH_FORMS
@pytest.mark.parametrize("name", ADAPTIVE)
def test_what_runs_is_below_the_cap_too(host, images, name, packs):
    """It is counted by torch's own counter, which knows nothing of counts of rows."""
    model = capped(host, ADAPTIVE[name], CAPS[1])
    model.packs = packs
    most = model.macs()
    for image in (images[:1], images[-EACH : -EACH + 1], images[-1:]):
        assert count_macs(model, image) <= 1.005 * (most.total + most.choosing)


@pytest.mark.parametrize("name", ["similarity", "tome", "duplicates"])
def test_what_keeps_everything_meets_the_cap_exactly(host, images, name):
    """Otherwise there would be nothing for the cap to limit."""
    model = capped(host, with_tolerance(name, KEEPING), CAPS[0])
    with torch.no_grad():
        costs = model.macs_of(images[:EACH])
    assert {cost.total for cost in costs} == {model.macs().total}


def test_the_attack_makes_patches_unlike(attack, host):
    start = attack.uniform(4, PIXELS, (torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)))
    moved = attack.attacked(host, start, (1, 2), steps=6)
    assert moved.isfinite().all()
    assert start.amin() <= moved.amin() <= moved.amax() <= start.amax()
    method = attack.Listener()
    model = patchslim.slim(host, method, keep_rate=1.0, at=(1, 2))
    goals = []
    for shown in (start, moved):
        method.heard.clear()
        with torch.no_grad():
            model(shown)
        goals.append(torch.stack(method.heard).sum(dim=0))
    assert (goals[1] > goals[0]).all()


def test_a_cap_below_what_a_method_reaches_is_refused_with_the_nearest(host, images):
    method = ToMe(threshold=0.9)
    with pytest.raises(ImpossibleBudget, match="ToMe cannot go below") as refused:
        capped(host, method, 0.05)
    nearest = float(re.search(r"macs=([\d.]+)\.$", str(refused.value)).group(1))
    model = capped(host, method, nearest)
    with torch.no_grad():
        costs = model.macs_of(images)
    assert max(cost.total for cost in costs) <= nearest * model.dense_macs().total


def test_a_schedule_below_what_a_method_reaches_warns_and_is_kept(host, images):
    with pytest.warns(ShortSchedule, match="ToMe cannot remove all"):
        model = patchslim.slim(host, ToMe(threshold=0.9), r=[30, 0, 0, 0])
    assert model.counts()[0] == 1 + SIDE * SIDE // 2
    with torch.no_grad():
        costs = model.macs_of(images)
    assert max(cost.total for cost in costs) <= model.macs().total
