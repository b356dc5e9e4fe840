"""`patchslim calibrate` for a threshold: what it prints, what it writes, and measuring the result.

The example's own run is slow, so details are checked on a tiny model.
"""

import json
import shlex

import pytest
import torch
import transformers

import patchslim
from child_process import needs_fork
from child_process import run_patchslim as run
from patchslim.model.load import load
from patchslim.runs.layout import MODEL_FOLDER, RECORD_FILE
from patchslim.schedules.schedule import Counts
from tiny_training import SIDE, write_images

pytestmark = needs_fork


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Makes a tiny classifier in a folder, and images in class folders."""
    at = tmp_path_factory.mktemp("desk")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        image_size=SIDE, patch_size=4, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(at / "hf")
    processor = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(at / "hf")
    write_images(at / "photos", count=4)
    return at


def read_line(text, name):
    """Reads what a line of the answer says after its name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(name).strip()


def calibrated(desk, folder, *more):
    """Runs a calibration of the tiny model on its images."""
    command = ["calibrate", desk / "hf", "--data", desk / "photos", "--images", 12, *more]
    ended = run(folder, *command, "--out", folder / "o")
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended.err
    return ended


def test_it_says_the_threshold_the_distribution_and_what_to_do_next(desk, tmp_path):
    out = tmp_path / "o"
    ended = calibrated(desk, tmp_path, "--method", "tome", "--macs", 0.7, "--cap", 0.72)
    record, model = json.loads((out / RECORD_FILE).read_text()), load(out / MODEL_FOLDER)
    assert {entry.name for entry in out.iterdir()} == {MODEL_FOLDER, RECORD_FILE}
    assert read_line(ended.out, "method") == "tome, tail exact"
    assert read_line(ended.out, "tokens left").startswith(" ".join(map(str, model.counts())))
    threshold = record["threshold"]
    assert read_line(ended.out, "threshold") == f"threshold={threshold['value']:.4g}, on 12 images"
    spent = record["spent"]
    assert read_line(ended.out, "operations") == (
        f"mean {spent['mean']:.3f}, median {spent['p50']:.3f}, p99 {spent['p99']:.3f}, "
        f"max {spent['max']:.3f}; never above {record['cap']:.3f}"
    )
    assert read_line(ended.out, "tokens  ").endswith("(entering the last block)")
    assert read_line(ended.out, "same answers").startswith(f"{record['agreement']:.1%}, KL ")
    assert read_line(ended.out, "record") == str(out / RECORD_FILE)
    assert str(out / MODEL_FOLDER) in ended.out
    assert "figure" not in ended.out
    assert spent["mean"] <= 0.7
    assert spent["max"] <= record["cap"] <= 0.72
    assert model.calibrated["spent"] == spent
    measure = read_line(ended.out, "measure it")
    assert measure == f"patchslim measure {out / MODEL_FOLDER}"  # the host is still the dense model
    data = ["--data", desk / "photos", "--repeats", 1, "--out", tmp_path / "report.json"]
    measured = run(tmp_path, *shlex.split(measure)[1:], *data)
    assert measured.code == 0, measured.err
    report = patchslim.Report.load(tmp_path / "report.json")
    (row,) = [row for row in report.rows if row.spent is not None]
    assert row.name.startswith("tome up to 0.")
    assert row.spent.show() in measured.out
    assert report.baseline(row).name == f"random/{row.name}"
    assert (row.spent.mean, row.spent.most) == pytest.approx((spent["mean"], spent["max"]))
    train = shlex.split(read_line(ended.out, "train it"))[1:]
    trained = run(tmp_path, *train, "--steps", 1, "--batch", 2, "--workers", 0)
    assert trained.code == 0, trained.err
    assert load(out / "trained" / "model").calibrated == model.calibrated


def test_json_is_everything_and_nothing_else(desk, tmp_path):
    ended = calibrated(
        desk, tmp_path, "--method", "similarity", "--set", "floor=0.4", "--agreement", 0.8, "--json"
    )
    data = json.loads(ended.out)
    assert data["record"] == json.loads((tmp_path / "o" / RECORD_FILE).read_text())
    assert (data["method"], data["settings"]["floor"]) == ("similarity", 0.4)
    assert data["settings"] == data["record"]["settings"]
    assert data["settings"]["threshold"] == data["record"]["threshold"]["value"]
    assert data["record"]["agreement"] >= 0.8
    assert data["share"] == data["record"]["cap"]
    assert data["files"].keys() == {"model", "record"}
    assert data["measure"] == f"patchslim measure {tmp_path / 'o' / MODEL_FOLDER}"


def test_a_method_without_a_threshold_records_none(desk, tmp_path):
    ended = calibrated(desk, tmp_path, "--method", "ats", "--macs", 0.6)
    assert read_line(ended.out, "threshold") == "on 12 images"
    assert load(tmp_path / "o" / MODEL_FOLDER).calibrated["threshold"] == {
        "setting": None,
        "value": None,
    }


def test_a_saved_schedule_is_the_cap(desk, tmp_path):
    Counts((65, 50, 40, 40), 65, 1).save(tmp_path / "counts.json")
    calibrated(
        desk, tmp_path, "--method", "tome", "--macs", 0.72, "--schedule", tmp_path / "counts.json"
    )
    assert load(tmp_path / "o" / MODEL_FOLDER).counts() == (65, 50, 40, 40)


def test_two_runs_write_the_same(desk, tmp_path):
    first = calibrated(desk, tmp_path, "--method", "tome", "--macs", 0.7)
    before = (tmp_path / "o" / RECORD_FILE).read_bytes()
    again = calibrated(desk, tmp_path, "--method", "tome", "--macs", 0.7)
    assert again.out == first.out
    assert (tmp_path / "o" / RECORD_FILE).read_bytes() == before


@pytest.mark.slow
def test_the_example_is_calibrated_and_measured(tmp_path):
    out = tmp_path / "o"
    command = ["calibrate", "digits", "--method", "similarity", "--macs", 0.6, "--cap", 0.75]
    ended = run(tmp_path, *command, "--images", 64, "--out", out)
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    record = json.loads((out / RECORD_FILE).read_text())
    assert 0.59 <= record["spent"]["mean"] <= 0.6
    assert record["spent"]["max"] <= record["cap"] <= 0.75
    assert (
        read_line(ended.out, "measure it")
        == f"patchslim measure {out / MODEL_FOLDER} --data digits"
    )
    command = ["measure", out / MODEL_FOLDER, "--data", "digits", "--limit", 50, "--repeats", 1]
    measured = run(tmp_path, *command, "--json")
    assert measured.code == 0, measured.err
    report = patchslim.Report.from_json(json.loads(measured.out))
    row = report.rows[1]
    assert 0.55 <= row.spent.mean <= 0.65
    assert row.spent.mean < row.spent.p99 <= row.spent.most <= row.spent.cap <= 0.75
    assert row.agreement.value >= 0.9
    shown = run(tmp_path, *command)
    assert row.spent.show() in shown.out
    assert row.name == f"similarity up to {row.spent.cap:.2f}"
