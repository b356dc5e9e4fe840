"""`calibrate` on tiny hosts: budgets, modes, what is written, and how it is resumed."""

import json
from pathlib import Path

import pytest
import torch

import patchslim
from child_process import kill_when, needs_fork
from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.errors import BadFile, PatchslimError
from patchslim.runs.checkpoint import write
from patchslim.runs.layout import CHECKPOINT_FILE, MODEL_FOLDER, RECORD_FILE
from patchslim.saving.folder import read_recipe
from patchslim.schedules.schedule import Counts
from patchslim.testing.trial import noise_images, tiny_host

METHODS = ("patch_slimming", "patch_slimming_dynamic")
ONE_BY_DEFAULT = pytest.mark.parametrize(
    "method", ["patch_slimming_dynamic", pytest.param("patch_slimming", marks=pytest.mark.slow)]
)


def host(readout="class", **changes):
    return tiny_host(readout=readout, depth=4, **changes)


def images(seed=0):
    """Makes twelve images of noise, of which no two batches are alike."""
    drawn = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [(drawn[:8], None), (drawn[8:], None)]


def make_config(**given):
    return PatchSlimmingConfig(
        **{"images": 12, "probe": 8, "batch": 4, "lr": 1e-3, "epochs": 2} | given
    )


def free(**given):
    return make_config(mode="free", epochs=0, **given)


def paper(**given):
    return make_config(mode="paper", step=5, epochs=1, **given)


def fit(*, of=None, data=None, method="patch_slimming", **asked):
    """Calibrates the tiny host, to a tolerance unless something else is asked for."""
    if not {"macs", "tolerance", "schedule"} & asked.keys():
        asked["tolerance"] = 0.05
    return calibrate(of or host(), data or images(), method, **{"config": make_config()} | asked)


def same(one, other):
    """Tells whether two calibrations gave bit-equal weights and equal records."""
    first, second = one.model.state_dict(), other.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert one.record == other.record
    return one.search_result == other.search_result


# --- budgets and modes


@pytest.mark.parametrize(
    "macs",
    [pytest.param(0.5, marks=pytest.mark.slow), 0.6, pytest.param(0.75, marks=pytest.mark.slow)],
)
def test_a_budget_is_met_and_used(macs):
    result = fit(macs=macs, config=free())
    assert macs - 0.03 <= result.record["macs"] <= macs
    assert result.record["macs"] == result.model.macs().total / result.model.dense_macs().total
    assert result.record["tolerance"] > 0


def test_a_budget_in_operations_is_the_same_as_a_share():
    whole, how = patchslim.macs(host()).total, free(images=4, probe=4)
    one, other = fit(macs=0.7, config=how), fit(macs=0.7 * whole, config=how)
    assert one.search_result == other.search_result


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_needs_no_removal_removes_nothing(method):
    model = fit(macs=1.0, method=method, config=free()).model
    assert set(model.counts()) == {17}
    shown = noise_images()
    with torch.no_grad():
        assert torch.allclose(model(shown), host()(shown), atol=1e-5)


def test_a_larger_tolerance_leaves_fewer_patches_and_each_layer_keeps_to_it():
    costs = []
    for tolerance in (0.01, 0.05, 0.2):
        result = fit(tolerance=tolerance, config=free(slack=1.0))
        assert result.record["tolerance"] == tolerance
        assert all(each.error <= tolerance * each.scale for each in result.search_result.layers)
        costs.append(result.record["macs"])
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]


def test_the_last_block_may_be_off_by_the_slack():
    strict, slack = (fit(tolerance=0.001, config=free(slack=s)).search_result for s in (1.0, 8.0))
    assert slack.layers[0].kept < strict.layers[0].kept


def test_known_counts_are_taken_as_they_are():
    counts = Counts((15, 12, 9, 9), 17, 1)
    result = fit(schedule=counts)
    assert result.model.schedule == counts
    assert result.record["tolerance"] is None
    assert result.search_result.kept() == {2: 8, 1: 11, 0: 14}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [make_config(), free(), paper()], ids=["fast", "free", "paper"])
def test_every_mode_runs_and_the_given_host_stays_as_it_was(how, method):
    given = host().train()
    next(given.parameters()).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    wanted = [each.requires_grad for each in given.parameters()]
    result = fit(of=given, method=method, config=how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    assert [each.requires_grad for each in given.parameters()] == wanted
    assert given.training
    assert not result.model.training
    assert result.model.host is not given  # which is in training, and the model is not
    at_rest = host()
    untouched = fit(of=at_rest, method=method, config=how).model.host is at_rest
    assert untouched == (how.mode == "free")
    assert (result.model.trained is None) == (how.mode == "free")
    moved = [not torch.equal(t, before[name]) for name, t in result.model.host.state_dict().items()]
    assert any(moved) == (how.mode != "free")
    counts = result.model.counts()
    assert sorted(counts, reverse=True) == list(counts)
    assert result.model(noise_images()).shape == (3, 5)


def test_tuning_lowers_the_error_of_a_layer_and_changes_its_block_alone():
    counts = Counts((15, 12, 9, 9), 17, 1)
    plain = fit(schedule=counts, config=free())
    tuned = fit(schedule=counts, config=make_config(epochs=8))
    assert tuned.search_result.kept() == plain.search_result.kept()
    (first, *_), (fitted, *_) = plain.search_result.layers, tuned.search_result.layers
    assert fitted.block == first.block == 2
    assert fitted.error < 0.9 * first.error
    assert dict(fitted.curve)[fitted.kept] == pytest.approx(first.error)
    before = host().state_dict()
    changed = {
        name
        for name, t in tuned.model.host.state_dict().items()
        if not torch.equal(t, before[name])
    }
    assert {name.split(".")[1] for name in changed} == {"0", "1", "2"}
    assert all(name.startswith("blocks.") for name in changed)


@pytest.mark.parametrize("readout", ["average", "query"])
@ONE_BY_DEFAULT
def test_a_head_that_reads_all_patches_keeps_its_share(readout, method):
    result = fit(of=host(readout), method=method, macs=0.7, config=free(images=4, outputs=0.3))
    assert result.record["macs"] <= 0.7
    assert result.model.counts()[-1] == 5
    assert result.model.plan.tail == "full"


def test_images_are_taken_up_to_the_number_asked_for():
    result = fit(config=free(images=9))
    assert result.record["images"] == 9
    fewer = [(torch.cat([batch for batch, _ in images()])[:9], None)]
    assert result.search_result == fit(data=fewer, config=free(images=9)).search_result


# --- what is written


@pytest.mark.parametrize("method", METHODS)
def test_record_and_recipe_hold_every_setting(method, tmp_path):
    how = make_config(seed=3)
    result = fit(method=method, config=how, out=tmp_path)
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    assert record == json.loads(json.dumps(result.record))
    assert record["search"] == how.to_json() == PatchSlimmingConfig(**record["search"]).to_json()
    assert (record["method"], record["images"]) == (method, 12)
    assert record["schedule"]["kept"] == list(result.model.counts())
    assert [each["block"] for each in record["layers"]] == [2, 1, 0]
    assert all(each["curve"] for each in record["layers"])
    recipe = read_recipe(tmp_path / MODEL_FOLDER)
    assert recipe["calibrated"]["search"] == how.to_json()
    assert recipe["calibrated"]["tolerance"] == record["tolerance"]
    assert recipe["trained"]["epochs"] == how.epochs
    if method == "patch_slimming":
        assert recipe["settings"] == {"order": record["order"]}
    else:
        assert record["gates"].keys() == {str(block) for block in result.model.plan.decision_blocks}
    assert (tmp_path / "pyramid.svg").read_text().lstrip().startswith("<")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [make_config(), free()], ids=["fast", "free"])
def test_saved_and_loaded_it_answers_the_same(method, how, tmp_path):
    result = fit(method=method, config=how, out=tmp_path)
    again = patchslim.load(tmp_path / MODEL_FOLDER, model=host())
    assert again.calibrated == json.loads(json.dumps(result.model.calibrated))
    assert (again.trained is None) == (how.mode == "free")
    shown = noise_images()
    with torch.no_grad():
        assert torch.equal(again(shown), result.model(shown))
    assert again.counts() == result.model.counts()


# --- determinism and resuming


@pytest.mark.parametrize("method", METHODS)
def test_two_calibrations_of_the_same_things_are_equal(method):
    torch.manual_seed(1)
    one = fit(method=method)
    torch.manual_seed(2)
    assert same(one, fit(method=method))


class Cut:
    """Raises KeyboardInterrupt at one line of progress, or at the first after so many."""

    def __init__(self, at):
        self.left = at

    def __call__(self, line):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


@ONE_BY_DEFAULT
def test_a_run_interrupted_at_any_line_and_resumed_ends_the_same(method, tmp_path):
    how = {"of": tiny_host(), "method": method, "config": make_config(step=8, epochs=1)}
    lines = []
    whole = fit(**how, progress=lines.append)
    assert len(lines) > 6
    for at in range(len(lines)):
        out = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            fit(**how, out=out, progress=Cut(at))
        assert not (out / MODEL_FOLDER).exists()
        assert same(fit(**how, out=out, resume=True), whole)


@pytest.mark.slow
def test_a_calibration_to_a_budget_interrupted_many_times_ends_the_same(tmp_path):
    lines = []
    whole = fit(macs=0.7, progress=lines.append)
    cuts = 0
    while True:
        try:
            result = fit(macs=0.7, out=tmp_path, resume=True, progress=Cut(25))
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts >= len(lines) // 25
    assert same(result, whole)


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_with_sigkill_can_be_resumed(method, tmp_path):
    how = {"method": method, "config": make_config(epochs=10)}
    kill_when(lambda: fit(**how, out=tmp_path), (tmp_path / CHECKPOINT_FILE).exists)
    assert not (tmp_path / MODEL_FOLDER).exists()
    assert same(fit(**how, out=tmp_path, resume=True), fit(**how))


def test_resuming_a_finished_run_writes_the_same_again(tmp_path):
    once = fit(out=tmp_path)
    before = (tmp_path / MODEL_FOLDER / "model.safetensors").read_bytes()
    assert same(fit(out=tmp_path, resume=True), once)
    assert (tmp_path / MODEL_FOLDER / "model.safetensors").read_bytes() == before


def test_resuming_without_a_checkpoint_begins_a_new_run(tmp_path):
    assert same(fit(out=tmp_path, resume=True), fit())


OTHERS = {
    "search": ({"config": make_config(lr=1e-4)}, "lr=0.001, now 0.0001"),
    "budget": ({"macs": 0.5, "tolerance": None}, "macs=None, now 0.5"),
    "tolerance": ({"tolerance": 0.1}, "tolerance=0.05, now 0.1"),
    "images": ({"data": images(seed=1)}, "its images is 12 with digest"),
    "method": ({"method": "patch_slimming_dynamic"}, "its method is patch_slimming, and now"),
    "model": ({"of": host(init_values=2.0)}, "the model answers otherwise"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Makes the folder of a calibration that was interrupted."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(KeyboardInterrupt):
        fit(out=folder, progress=Cut(10))
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_calibration_is_refused(name, begun):
    changes, words = OTHERS[name]
    before = (begun / CHECKPOINT_FILE).read_bytes()
    with pytest.raises(BadFile, match="is of another run") as raised:
        fit(out=begun, resume=True, **changes)
    assert words in str(raised.value)
    assert (begun / CHECKPOINT_FILE).read_bytes() == before


def test_a_truncated_checkpoint_is_refused(begun, tmp_path):
    whole = (begun / CHECKPOINT_FILE).read_bytes()
    (tmp_path / CHECKPOINT_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFile, match="truncated"):
        fit(out=tmp_path, resume=True)


def test_a_checkpoint_of_training_is_refused(tmp_path):
    write(tmp_path / CHECKPOINT_FILE, {"step": 3})
    with pytest.raises(BadFile, match="not a checkpoint of `calibrate`"):
        fit(out=tmp_path, resume=True)


def test_a_full_disk_is_one_clear_error_and_leaves_the_last_checkpoint(small_disk):
    out = small_disk / "out"
    with pytest.raises(KeyboardInterrupt):
        fit(out=out, progress=Cut(10))
    before = (out / CHECKPOINT_FILE).read_bytes()
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb") as file:
        file.write(bytes(2**21))
    with pytest.raises(PatchslimError, match=r"the disk is full|No space left"):
        fit(out=out, resume=True)
    assert (out / CHECKPOINT_FILE).read_bytes() == before
    Path(ballast).unlink()
    assert same(fit(out=out, resume=True), fit())


@pytest.mark.parametrize("how", [make_config(), free()], ids=["fast", "free"])
def test_a_host_in_training_mode_gives_a_model_in_evaluation_mode(how):
    given = host().train()
    made = fit(of=given, config=how).model
    assert {module.training for module in given.modules()} == {True}
    assert {module.training for module in made.modules()} == {False}


def test_a_record_that_cannot_be_written_says_how_to_resume(tmp_path):
    (tmp_path / RECORD_FILE).mkdir(parents=True)  # something is in its place
    with pytest.raises(BadFile, match=r"calibration\.json.*--resume"):
        calibrate(
            tiny_host(),
            [(noise_images(6), None)],
            tolerance=0.1,
            config=PatchSlimmingConfig(mode="free"),
            out=tmp_path,
        )
