"""Laws of thresholds: the mean meets the budget, no image exceeds the cap, a report shows both.

Hosts are tiny, and their heads are moved so that images have different answers.
"""

import copy
import functools
import json

import pytest
import torch

import patchslim
from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.errors import ImpossibleBudget
from patchslim.example import digits
from patchslim.measurement.measure import measure
from patchslim.methods._method import method_settings
from patchslim.methods.ats import ATS
from patchslim.methods.duplicates import Duplicates
from patchslim.methods.similarity import Similarity
from patchslim.methods.tome import ToMe
from patchslim.report.report import Report
from patchslim.runs.layout import MODEL_FOLDER, RECORD_FILE
from patchslim.saving.folder import read_recipe
from patchslim.schedules.schedule import Counts
from patchslim.testing.trial import tiny_host

COUNT, SIDE, DEPTH = 16, 24, 4  # images, their pixels, and blocks; patches are 6 * 6

# name: (the method, a budget that it can meet on these images)
METHODS = {
    "similarity": (lambda: "similarity", 0.75),
    "leader": (lambda: Similarity(group="leader", measure="cosine", threshold=0.9), 0.75),
    "tome": (lambda: "tome", 0.65),
    "tome with a threshold": (lambda: ToMe(threshold=0.5, proportional=False), 0.7),
    "ats": (lambda: "ats", 0.5),
    "duplicates": (lambda: "duplicates", 0.6),
}
SETTING = {"similarity": "threshold", "ats": None, "duplicates": "tolerance"}

each_method = pytest.mark.parametrize("name", METHODS)
some_methods = pytest.mark.parametrize("name", ["similarity", "tome", "ats"])
some_by_default = pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("similarity", "tome", "ats")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
    ],
)


@functools.cache
def images(seed=0):
    """Makes two batches without labels, from images that are nearly flat to images of noise."""
    drawn = torch.randn(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    for number, image in enumerate(drawn):
        flat = number * SIDE // COUNT
        image[:, :flat] = image[:, :1, :1] + 0.1 * image[:, :flat]
    drawn = drawn[torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed))]
    return [(drawn[:10], None), (drawn[10:], None)]


def every(data=None):
    return torch.cat([batch for batch, _ in data or images()])


@functools.cache
def host(**changes):
    """Makes a tiny host whose answers to the images differ."""
    made = tiny_host(depth=DEPTH, img_size=SIDE, **changes)
    with torch.no_grad():
        made.head.bias -= made(every()).mean(dim=0)
    return made


@functools.cache
def usual(name):
    """Calibrates the threshold for the method's budget, which many laws read."""
    return fit(name)


def fit(name="tome", *, of=None, data=None, **asked):
    """Calibrates a threshold, for the method's budget unless something else is asked for."""
    method, macs = METHODS[name]
    if "agreement" not in asked:
        asked = {"macs": macs} | asked
    asked = {"config": PatchSlimmingConfig(images=COUNT, batch=COUNT)} | asked
    return calibrate(of or host(), data or images(), method(), **asked)


def spent(model, pixels=None):
    """Computes what each image costs, as a share of the host's operations."""
    costs = model.macs_of(every() if pixels is None else pixels)
    return torch.tensor([each.total for each in costs]).double() / model.dense_macs().total


def most(model):
    return model.macs().total / model.dense_macs().total


def plain(record):
    """Returns the record as its file has it."""
    return json.loads(json.dumps(record, allow_nan=False))


def agreed(model, of):
    with torch.no_grad():
        same = model(every()).argmax(dim=1) == of(every()).argmax(dim=1)
    return float(same.double().mean())


def test_the_answers_of_these_images_differ():
    with torch.no_grad():
        counts = host()(every()).argmax(dim=1).bincount(minlength=5)
    assert (counts > 0).sum() >= 3


# --- budgets


@each_method
def test_a_budget_is_met_on_average_and_used(name):
    budget = METHODS[name][1]
    result = usual(name)
    shares = spent(result.model)
    assert budget - 0.01 <= shares.mean() <= budget
    assert shares.std() > 0  # images cost what they show
    assert shares.max() <= most(result.model) + 1e-9
    assert result.search_result is None


@each_method
def test_recorded_costs_are_the_costs_of_images_in_the_model(name):
    result = usual(name)
    shares, record = spent(result.model), result.record
    assert record["spent"] == pytest.approx(
        {
            "mean": float(shares.mean()),
            "p50": float(shares.quantile(0.5)),
            "p99": float(shares.quantile(0.99)),
            "max": float(shares.max()),
        }
    )
    assert record["macs"] == record["spent"]["mean"]
    assert record["cap"] == most(result.model)
    assert record["images"] == COUNT
    assert record["agreement"] == pytest.approx(agreed(result.model, host()))
    entering = [rows[DEPTH - 2] for rows in result.model.start_pass().count_rows(every())]
    assert record["tokens"]["mean"] == pytest.approx(sum(entering) / COUNT)
    assert (record["tokens"]["max"], record["tokens"]["max"] % 1) == (max(entering), 0)
    assert record["settings"] == method_settings(result.model.method)
    setting = SETTING.get(name, "threshold")
    assert record["threshold"]["setting"] == setting
    if setting is not None:
        assert record["threshold"]["value"] == record["settings"][setting]
    assert plain(record)["spent"] == record["spent"]


@pytest.mark.parametrize("name", ["similarity", "tome"])
def test_a_budget_in_operations_is_the_same_as_a_share(name):
    whole, budget = patchslim.macs(host()).total, METHODS[name][1]
    assert fit(name, macs=budget * whole).record == usual(name).record


@pytest.mark.parametrize("name", ["similarity", "tome", "duplicates"])
def test_a_smaller_budget_has_a_wider_threshold(name):
    cosine = name == "tome"
    one, other = usual(name).record, fit(name, macs=METHODS[name][1] + 0.05).record
    narrow, wide = other["threshold"]["value"], one["threshold"]["value"]
    assert narrow > wide if cosine else narrow < wide
    assert one["spent"]["mean"] < other["spent"]["mean"]


@pytest.mark.parametrize("name", METHODS)
def test_no_image_costs_more_than_the_cap(name):
    budget = METHODS[name][1]
    model = fit(name, cap=budget + 0.02).model
    assert spent(model).mean() <= budget
    assert most(model) <= budget + 0.02
    noise = 5 * torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    for shown in (every(), noise, torch.zeros_like(noise)):
        assert spent(model, shown).max() <= most(model) + 1e-9


@pytest.mark.parametrize("name", [*METHODS][::2])
def test_a_cap_that_is_the_budget_gives_a_threshold_too(name):
    budget = METHODS[name][1]
    model = fit(name, cap=budget).model
    assert spent(model).max() <= budget


@pytest.mark.parametrize("name", ["similarity", *[*METHODS][4:]])
def test_a_schedule_is_the_most_that_an_image_keeps(name):
    kept = (37, 31, 25, 25) if name != "duplicates" else (31, 31, 31, 31)
    model = fit(name, macs=0.75, schedule=Counts(kept, 37, 1)).model
    for rows in model.start_pass().count_rows(every()):
        assert all(left <= cap for left, cap in zip(rows, kept, strict=True))
    if model.method.tuned_threshold is not None:
        assert model.counts() == kept
    assert spent(model).max() <= most(model) + 1e-9


@some_methods
def test_a_budget_above_all_that_images_cost_is_met(name):
    result = fit(name, macs=0.99)
    assert result.record["spent"]["mean"] <= 0.99
    assert result.model.method.adaptive


def test_a_budget_that_cannot_be_met_says_how_near_it_comes():
    with pytest.raises(ImpossibleBudget, match=r"macs=0\.3") as raised:
        fit("tome", macs=0.3)
    assert "on average" in str(raised.value)


# --- answers that stay


@some_by_default
def test_the_given_share_of_answers_stays_and_a_lower_share_costs_no_more(name):
    few, many = (fit(name, agreement=share) for share in (0.6, 0.85))
    for result, share in ((few, 0.6), (many, 0.85)):
        assert agreed(result.model, host()) >= share
        assert result.record["agreement"] == pytest.approx(agreed(result.model, host()))
    assert few.record["macs"] <= many.record["macs"]


def test_where_nothing_joins_at_first_wider_thresholds_are_tried():
    data = [(torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2)), None)]
    result = fit("duplicates", data=data, agreement=0.5)  # of noise, that nothing resembles
    assert result.record["macs"] < result.record["cap"] - 0.05


def test_answers_stay_below_a_cap_too():
    model = fit("similarity", agreement=0.7, cap=0.8).model
    assert most(model) <= 0.8
    assert agreed(model, host()) >= 0.7


# --- hosts, images and files


@some_methods
def test_the_host_stays_as_it_was(name):
    given = copy.deepcopy(host())
    given.blocks[1].train()
    modes = [module.training for module in given.modules()]
    before = {key: tensor.clone() for key, tensor in given.state_dict().items()}
    model = fit(name, of=given).model
    assert [module.training for module in given.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in given.state_dict().items())
    assert all(parameter.grad is None for parameter in given.parameters())
    assert model.trained is None


def test_a_host_in_evaluation_mode_is_not_copied():
    assert usual("tome").model.host is host()


def test_a_host_in_training_mode_gives_a_model_in_evaluation_mode():
    model = fit("tome", of=copy.deepcopy(host()).train()).model
    assert {module.training for module in model.modules()} == {False}


@pytest.mark.parametrize("readout", ["average", "query"])
@pytest.mark.parametrize("name", ["tome", "similarity"])
def test_heads_of_other_kinds_meet_a_budget_too(name, readout):
    method = METHODS[name][0]() if readout == "query" else {
        "tome": ToMe(), "similarity": Similarity(weight="size"),
    }[name]  # fmt: skip
    given = tiny_host(readout=readout, depth=DEPTH, img_size=SIDE)
    model = calibrate(
        given, images(), method, macs=0.85, config=PatchSlimmingConfig(images=COUNT)
    ).model
    assert model.plan.tail == "full"
    assert 0.84 <= spent(model).mean() <= 0.85


@some_by_default
def test_saved_and_loaded_it_answers_the_same(name, tmp_path):
    result = fit(name, out=tmp_path)
    again = patchslim.load(tmp_path / MODEL_FOLDER, model=host())
    assert json.loads((tmp_path / RECORD_FILE).read_text()) == plain(result.record)
    assert {entry.name for entry in tmp_path.iterdir()} == {MODEL_FOLDER, RECORD_FILE}
    assert again.calibrated == result.model.calibrated
    assert again.calibrated["spent"] == result.record["spent"]
    assert read_recipe(tmp_path / MODEL_FOLDER)["calibrated"] == result.model.calibrated
    assert method_settings(again.method) == method_settings(result.model.method)
    assert again.counts() == result.model.counts()
    with torch.no_grad():
        assert torch.equal(again(every()), result.model(every()))
    assert torch.equal(spent(again), spent(result.model))


@some_by_default
def test_the_same_images_give_the_same_threshold_in_any_batches(name):
    one = usual(name).record
    other = fit(name, config=PatchSlimmingConfig(images=COUNT, batch=5)).record
    assert other["spent"] == pytest.approx(one["spent"])
    assert other["schedule"] == one["schedule"]
    if SETTING.get(name, "threshold"):
        assert other["threshold"]["value"] == pytest.approx(one["threshold"]["value"])


def test_a_host_that_takes_any_size_is_calibrated_for_the_images():
    given = tiny_host(depth=DEPTH, dynamic_img_size=True)  # made for 16x16
    result = calibrate(given, images(), "tome", macs=0.65, config=PatchSlimmingConfig(images=COUNT))
    model, size = result.model, (SIDE, SIDE)
    costs = torch.tensor([each.total for each in model.macs_of(every())]).double()
    whole = model.dense_macs(size).total
    assert 0.64 <= costs.mean() / whole <= 0.65
    assert result.record["cap"] == pytest.approx(model.macs(size).total / whole)
    assert result.record["spent"]["max"] <= result.record["cap"] + 1e-9


def test_images_are_taken_up_to_the_number_asked_for():
    assert fit(config=PatchSlimmingConfig(images=9)).record["images"] == 9


def test_progress_shows_the_candidate_and_its_cost():
    lines = []
    fit(progress=lines.append)
    assert len(lines) > 2
    assert all("tolerance" in line and "on average" in line for line in lines)
    assert all("at most" in line and "same answers" in line for line in lines)
    assert all("\n" not in line for line in lines)


def test_patch_slimming_is_calibrated_as_before():
    result = calibrate(
        host(),
        images(),
        macs=0.7,
        config=PatchSlimmingConfig(mode="free", images=12, probe=8, step=6),
    )
    assert result.search_result is not None
    assert "threshold" not in result.record


# --- reports


ADAPTIVE = {
    "similarity": lambda: Similarity(threshold=3e-3, floor=0.3),
    "tome": lambda: ToMe(threshold=0.9),
    "ats": lambda: ATS(floor=2),
    "duplicates": lambda: Duplicates(tolerance=0.5),
}
BUDGET = {"macs": 0.78}


@pytest.fixture(scope="module")
def models():
    of = copy.deepcopy(host())
    made = {name: patchslim.slim(of, make(), **BUDGET) for name, make in ADAPTIVE.items()}
    return {**made, "fixed": patchslim.slim(of, "topk", macs=0.7)}


def labelled():
    return [(batch, torch.arange(len(batch)) % 5) for batch, _ in images()]


@pytest.fixture(scope="module")
def report(models):
    return measure(models, labelled(), batch=8, repeats=2)


def row(report, name):
    (one,) = [each for each in report.rows if each.name == name]
    return one


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_report_has_the_distribution_of_all_images(name, models, report):
    shares, one = spent(models[name]), row(report, name)
    expected = [
        float(each) for each in (shares.mean(), shares.quantile(0.5), shares.quantile(0.99))
    ]
    assert [one.spent.mean, one.spent.p50, one.spent.p99] == pytest.approx(expected)
    assert one.spent.most == pytest.approx(float(shares.max()))
    assert one.spent.cap == pytest.approx(most(models[name]))
    assert one.spent.p50 <= one.spent.p99 <= one.spent.most <= one.spent.cap + 1e-9
    assert one.macs_share == pytest.approx(one.spent.mean, rel=1e-5)
    assert one.macs == round(one.spent.mean * report.dense.macs)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_conversion_is_of_the_images_that_were_timed(name, models, report):
    timed = float(spent(models[name], every()[:8]).mean())
    assert timed != pytest.approx(row(report, name).spent.mean)  # otherwise this would show nothing
    assert row(report, name).conversion == pytest.approx(row(report, name).speedup.median * timed)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_random_is_measured_at_the_mean_of_its_counts(name, models):
    first = images()[0][0]
    report = measure({name: models[name]}, labelled(), batch=len(first), repeats=0)
    one, lots = row(report, name), row(report, f"random/{name}")
    assert report.baseline(one) == lots
    assert lots.spent is None
    rows = models[name].start_pass().count_rows(torch.cat([batch for batch, _ in images()]))
    means = [sum(each) / len(rows) for each in zip(*rows, strict=True)]
    assert lots.tokens == one.tokens == tuple(round(mean) for mean in means)
    assert report.gain(one) == pytest.approx(one.accuracy.value - lots.accuracy.value)


def test_fixed_counts_have_no_distribution_and_a_baseline_of_their_own(report):
    fixed = row(report, "fixed")
    assert fixed.spent is None
    assert report.baseline(fixed).name == "random/fixed"
    assert report.baseline(fixed).macs == fixed.macs
    assert row(report, "dense").spent is None


def test_padded_as_in_a_graph_images_cost_and_score_the_same(models, report):
    for name in ADAPTIVE:
        models[name].packs = False
    try:
        other = measure(models, labelled(), batch=8, repeats=0, baseline=False)
    finally:
        for name in ADAPTIVE:
            models[name].packs = True
    for name in ADAPTIVE:
        assert row(other, name).spent == row(report, name).spent
        assert row(other, name).agreement == row(report, name).agreement
        assert row(other, name).kl.value == pytest.approx(row(report, name).kl.value, abs=1e-5)


def test_a_distribution_survives_its_file(report, tmp_path):
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again == report
    assert row(again, "similarity").spent == row(report, "similarity").spent
    data = report.to_json()
    for each in data["rows"]:
        del each["spent"]  # as it was before images had numbers of their own
    assert {each.spent for each in Report.from_json(data).rows} == {None}


def test_the_table_shows_how_far_images_differ_from_the_mean(report):
    one = row(report, "similarity")
    shown = (
        f"{one.spent.mean:.3f} (p99 {one.spent.p99:.2f}, max {one.spent.most:.2f}, "
        f"cap {one.spent.cap:.2f})"
    )
    assert one.spent.show() == shown
    (line,) = [line for line in report.markdown().splitlines() if line.startswith("| similarity ")]
    assert shown in line
    (line,) = [line for line in report.markdown().splitlines() if line.startswith("| fixed ")]
    assert "p99" not in line
    lines = report.table().splitlines()
    assert f"similarity: MACs {shown}" in lines
    (line,) = [line for line in lines if line.startswith("similarity ")]
    assert f" {one.spent.mean:.3f} " in line
    assert f",{one.macs_share:.4f}," in report.csv()


def test_without_a_name_it_is_called_by_its_cap(models):
    report = measure(models["tome"], repeats=0, baseline=False)
    assert report.rows[1].name == f"tome up to {most(models['tome']):.2f}"
    assert report.rows[1].method == "tome"


def test_without_images_there_are_costs_on_noise(models, tmp_path):
    report = measure({"ats": models["ats"]}, repeats=1, batch=2)
    one = row(report, "ats")
    assert (one.accuracy, one.agreement, one.kl, report.provenance.images) == (None, None, None, 0)
    assert 0 < one.spent.mean <= one.spent.cap == pytest.approx(most(models["ats"]))
    assert report.baseline(one).name == "random/ats"
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert one.spent.show() in report.table()


def test_two_adaptive_models_at_the_same_counts_each_have_their_random(models):
    twice = {"one": models["tome"], "two": models["tome"]}
    report = measure(twice, labelled(), repeats=0)
    names = [each.name for each in report.rows]
    assert names == ["dense", "one", "random/one", "two", "random/two"]


@pytest.mark.parametrize("first", [0, 1], ids=["flat images first", "noise first"])
def test_random_costs_what_the_model_does_on_all_images(first, models):
    noise = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    kinds = [noise[:, :, :1, :1] + 0.02 * noise, noise]
    data = [(kinds[first], None), (kinds[1 - first], None)]
    report = measure({"tome": models["tome"]}, data, repeats=0)
    assert abs(row(report, "tome").macs_share - row(report, "random/tome").macs_share) < 0.05


@pytest.mark.parametrize(("name", "threshold"), [("similarity", 0.05), ("tome", 0.9)])
def test_a_mild_cap_leaves_the_choice_to_the_method(name, threshold):
    """At 0.85 the cap itself removes a token in some of the blocks only."""
    given = digits.untrained_host(depth=6)
    free = patchslim.slim(given, name, threshold=threshold)
    mild = patchslim.slim(given, name, threshold=threshold, macs=0.85)
    assert mild.counts() != free.counts()
    assert mild.plan.decision_blocks[:4] == free.plan.decision_blocks[:4]
