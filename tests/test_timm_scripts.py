"""timm's own scripts, unchanged: they validate, time and train slimmed models by their names.

The scripts are no part of what is installed, nor of this project. They are taken from a checkout of
timm's repository, if the environment variable TIMM_SCRIPTS names its folder, and else fetched from
GitHub at the tag of the installed version.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from timm.models import load_checkpoint

import patchslim
from patchslim.example import digits

SOURCE = Path(__file__).resolve().parents[1] / "src"
ADDRESS = "https://raw.githubusercontent.com/huggingface/pytorch-image-models"
SCRIPTS = ("validate.py", "benchmark.py", "train.py")
IMAGES = 24
# As in docs/libraries.md: a file that registers models, and runs a script after that.
RUNNER = """
import runpy, sys
import patchslim, timm
from timm.models import register_model
from patchslim.example import digits

@register_model
def digits_saved(pretrained=False, **settings):
    return patchslim.load("slimmed")

@register_model
def vit_made(pretrained=False, **settings):
    host = timm.create_model("test_vit", pretrained=pretrained, img_size=96, **settings).eval()
    return patchslim.slim(host, "evit", macs=0.7)

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a folder of scripts, images of two splits, and a file that registers slimmed models."""
    folder = tmp_path_factory.mktemp("scripts")
    for name in SCRIPTS:
        (folder / name).write_bytes(read_script(name))
    (folder / "models.py").write_text(RUNNER)
    for split, its_folder in (("train", "train"), ("test", "validation")):
        scenes = digits.scenes(split, IMAGES)
        for index, (pixels, label) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
            file = folder / "images" / its_folder / str(label) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return folder


def read_script(name: str) -> bytes:
    """Reads a script of timm's; skips the test where it cannot be had."""
    checkout = os.environ.get("TIMM_SCRIPTS")
    if checkout is not None:
        return (Path(checkout) / name).read_bytes()
    address = f"{ADDRESS}/v{timm.__version__}/{name}"
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            script: bytes = answer.read()
    except OSError as error:
        pytest.skip(
            f"timm does not install its scripts, and {address} cannot be read ({error}). Set "
            "TIMM_SCRIPTS to a folder with validate.py, benchmark.py and train.py, such as a "
            "checkout of timm's repository."
        )
    return script


def run_script(place: Path, script: str, *options: str) -> Any:
    """Runs a script of timm's in a process of its own; returns the result that it prints."""
    command = [sys.executable, "models.py", script, *options, "--device", "cpu"]
    done = subprocess.run(
        command,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("--result\n")[2])


def top1(slimmed: Any, place: Path) -> float:
    """Measures the top-1 accuracy in per cent by `patchslim.measure`, on the same images."""
    images = patchslim.Images.for_host(slimmed, place / "images" / "validation")
    report = patchslim.measure(slimmed, images, repeats=0, baseline=False)
    (row,) = (each for each in report.rows if each.method != "dense")
    return 100 * float(row.accuracy.value)


@pytest.fixture(scope="module")
def saved(place: Path) -> Any:
    """Saves the embedded example, slimmed so far that it errs."""
    with pytest.warns(patchslim.errors.DeepCut):
        slimmed = patchslim.slim(digits.host(), "topk", macs=0.32)
    slimmed.save(place / "slimmed")
    return slimmed


def test_validate_finds_the_accuracy_that_is_measured(place: Path, saved: Any) -> None:
    options = ("images", "--split", "validation", "--model", "digits_saved", "-b", "8")
    found = run_script(place, "validate.py", *options)
    assert found["img_size"] == digits.SIDE
    assert 0 < found["top1"] < 100
    assert found["top1"] == pytest.approx(top1(saved, place), abs=0.01)


def test_benchmark_writes_a_row_for_inference_and_training(place: Path, saved: Any) -> None:
    options = ("--model", "digits_saved", "-b", "2", "--bench", "both")
    short = ("--num-bench-iter", "5", "--num-warm-iter", "1", "--results-file", "row.csv")
    found = run_script(place, "benchmark.py", *options, *short)
    (row,) = csv.DictReader((place / "row.csv").read_text().splitlines())
    assert row["model"] == found["model"] == "digits_saved"
    assert float(row["infer_samples_per_sec"]) > 0
    assert float(row["train_samples_per_sec"]) > 0
    parameters = sum(each.numel() for each in saved.parameters())
    assert found["param_count"] == pytest.approx(parameters / 1e6, abs=0.01)


def test_train_trains_and_what_it_saves_is_validated_loaded_and_saved(place: Path) -> None:
    usual = ("images", "--model", "vit_made", "--num-classes", "10", "--img-size", "96", "-b", "8")
    options = ("--val-split", "validation", "--epochs", "2", "--warmup-epochs", "0", "-j", "0")
    learning = ("--opt", "adamw", "--lr", "1e-3", "--layer-decay", "0.75", "--drop-path", "0.1")
    extras = ("--model-ema", "--grad-checkpointing", "--crop-pct", "1.0")
    kept = ("--output", "out", "--experiment", "run")
    (epoch, *_) = run_script(place, "train.py", *usual, *options, *learning, *extras, *kept)
    best = place / "out" / "run" / "model_best.pth.tar"
    again = ("--split", "validation", "--checkpoint", str(best), "--use-ema", "--crop-pct", "1.0")
    validated = run_script(place, "validate.py", *usual, *again)
    assert validated["top1"] == pytest.approx(epoch["validation"]["top1"], abs=0.01)

    host = timm.create_model("test_vit", img_size=96, num_classes=10).eval()
    host.pretrained_cfg["input_size"], host.pretrained_cfg["crop_pct"] = (3, 96, 96), 1.0
    slimmed = patchslim.slim(host, "evit", macs=0.7)
    before = host.head.weight.clone()
    load_checkpoint(slimmed, str(best), use_ema=True)
    assert not host.head.weight.equal(before)
    assert top1(slimmed, place) == pytest.approx(validated["top1"], abs=0.01)
    slimmed.save(place / "trained")
    assert patchslim.load(place / "trained").host.head.weight.equal(host.head.weight)
