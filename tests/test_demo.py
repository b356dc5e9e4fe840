"""The demo in a very short form; the whole of it where slow tests run."""

import re
import time

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from patchslim.calibration.calibrate import must_be_calibrated
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.cli import demo as module
from patchslim.cli import demo_runtimes
from patchslim.cli.demo import slim_all, write_demo_report
from patchslim.cli.demo_runtimes import compare_runtimes
from patchslim.cli.main import main
from patchslim.example import digits
from patchslim.methods._method import needs_no_budget
from patchslim.methods._registry import find_method
from patchslim.model.slim import slim
from patchslim.report.report import Report
from patchslim.testing.trial import Trial

# One method of each kind; `make demo` takes all, and the laws try each by itself.
NAMES = (
    "duplicates dynamicvit evit identity patch_slimming patch_slimming_dynamic random similarity "
    "tome topk"
).split()
CALIBRATE = {name for name in NAMES if must_be_calibrated(find_method(name)())}
LEARN = {
    name for name in {*NAMES} - CALIBRATE if [*Trial(find_method(name)(), 16).method.parameters()]
}
SHOWN = {*NAMES} - {"identity"} - LEARN
FREE = {name for name in SHOWN if needs_no_budget(find_method(name))}  # of any budget


@pytest.fixture(autouse=True)
def some_methods(monkeypatch):
    monkeypatch.setattr(module, "method_names", lambda: tuple(NAMES))


@pytest.fixture
def few(monkeypatch):
    """Calibrates on two scenes only, and exports nothing: neither matters here."""
    monkeypatch.setattr(demo_runtimes, "RUNTIMES", {})
    monkeypatch.setattr(module, "SEARCH", PatchSlimmingConfig(mode="free", images=2, probe=2))


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return digits.untrained_host(depth=3).eval()


def test_demo_writes_what_it_returns(host, few, tmp_path):
    out, lines = tmp_path / "new" / "folder", []
    made = write_demo_report(
        host, digits.scenes("test", 4), out, budgets=(0.7,), repeats=1, progress=lines.append
    )
    report = made.report
    assert [row.runtime for row in made.runtimes] == ["eager PyTorch", "eager PyTorch"]
    assert sorted(each.name for each in out.iterdir()) == ["report.html", "report.json"]
    assert Report.load(out / "report.json") == report
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 2 * len(SHOWN)
    methods = {row.method for row in report.rows}
    assert methods == {"dense", *SHOWN}
    assert all(text.count(f"{name} is missing: it learns") == 1 for name in LEARN)
    assert report.provenance.images == 4
    assert all(report.baseline(row) for row in report.rows if row.method not in ("dense", "random"))
    assert "On one thread an image takes" in text
    assert lines[0].startswith("slimming: ")
    assert any("4/4 images" in line for line in lines)


def test_a_runtime_that_is_missing_is_one_line(host, monkeypatch):
    models = {"dense": slim(host, "identity", keep=1.0)}
    monkeypatch.setattr("patchslim.versions.installed_version", lambda name: None)
    images = digits.normalise(digits.scenes("test", 1).images)
    rows, missing = compare_runtimes(models, images, lambda _: None)
    assert [row.runtime for row in rows] == ["eager PyTorch"]
    assert [line.partition(":")[0] for line in missing] == [
        "ONNX Runtime is not shown", "OpenVINO is not shown",
    ]  # fmt: skip
    assert "pip install 'patchslim[onnx]'" in missing[0]


def test_budgets_out_of_reach_are_reported(host, few):
    lines = []
    models, skipped = slim_all(host, (0.7, 0.001), lines.append)
    assert {name.partition(" ")[0] for name in models} == SHOWN
    assert all(name.endswith(" 0.7") for name in {*models} - FREE)
    assert set(skipped) <= set(lines)
    assert sum("Nearest possible" in line for line in skipped) == len(SHOWN - CALIBRATE - FREE)
    for name in CALIBRATE:
        assert any(line.startswith(f"{name} 0.001 is missing: macs=0.001") for line in skipped)


def test_what_can_be_calibrated_is_calibrated_and_no_weight_is_changed(host, few):
    before = {name: weight.clone() for name, weight in host.state_dict().items()}
    models, skipped = slim_all(host, (0.6,), lambda _: None)
    fixed, dynamic = models["patch_slimming 0.6"], models["patch_slimming_dynamic 0.6"]
    assert fixed.calibrated
    assert dynamic.calibrated
    assert fixed.counts() == dynamic.counts()  # so that one random stands beside both
    assert fixed.host is dynamic.host is host
    assert all(torch.equal(weight, before[name]) for name, weight in host.state_dict().items())
    assert not any("patch_slimming" in line for line in skipped)


@pytest.mark.parametrize("budgets", [(0.7, 0.001)])
def test_a_method_that_was_never_trained_is_no_result(host, few, budgets):
    """It is reported once, whatever the number of budgets; its warning is not shown."""
    models, skipped = slim_all(host, budgets, lambda _: None)
    reason = "it learns what to keep, and has to be trained first (patchslim train)."
    assert "dynamicvit" in LEARN
    for name in LEARN:
        assert skipped.count(f"{name} is missing: {reason}") == 1
        assert not any(model.startswith(name) for model in models)


def test_methods_that_need_a_class_token_are_reported_as_missing():
    host = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False,
        global_pool="avg",
    )  # fmt: skip
    models, skipped = slim_all(host, (0.8,), lambda _: None)
    assert "tome 0.8" in models
    assert any(line.startswith("topk 0.8 is missing") for line in skipped)
    assert any(line.startswith("patch_slimming 0.8 is missing: The head") for line in skipped)


@pytest.mark.slow
def test_whole_demo_reads_digits_and_beats_random(tmp_path, capsys):
    begun = time.monotonic()
    assert main(["demo", "--out", str(tmp_path), "--scenes", "200"]) == 0
    shown = capsys.readouterr().out
    runtimes = [line for line in shown.splitlines() if re.search(r"\dx +(-|\de-\d+)$", line)]
    assert [re.split(r" {2,}", line)[0] for line in runtimes[::2]] == [
        "eager PyTorch", "ONNX Runtime", "OpenVINO",
    ]  # fmt: skip
    assert all(float(line.split()[-1]) < 1e-4 for line in runtimes[2:])
    assert time.monotonic() - begun < 300
    assert (tmp_path / "report.html").is_file()
    report = Report.load(tmp_path / "report.json")
    assert report.table() in shown
    assert report.dense.accuracy.value > 0.94
    rows = {row.name: row for row in report.rows}
    for name in ("tome 0.5", *(f"{method} 0.5" for method in CALIBRATE)):
        assert report.gain(rows[name]) > 0.02, name
