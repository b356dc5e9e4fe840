"""The examples run, print something, and are short. The quick ones run in this process too."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 40
LONGER = {"own_adapter": 80}  # a host, and an adapter of less than 60 lines

# What each of them prints on every machine.
SAYS = {
    "benchmark": ["dense", "conv.", "identity batch 1: ", "topk batch 2: "],
    "calibrate": ["patch_slimming_dynamic ", "patch_slimming ", "vs random", "pyramid.svg"],
    "documents": ["letter: ", "form  : 100 of 784 patches, 17% of the operations", "(2, 1000)"],
    "embedded_example": ["tome 0.6", "vs random", "speed-up"],
    "fine_tune": ["dense", "random/untrained", "trained           accuracy", "KL"],
    "export": [
        "on 7 images, with the same tokens",
        "tokens after each block: [197",
        "same answer: True",
    ],
    "feature_maps": ["tokens after each block: 233 209", "(1, 384, 16, 16)"],
    "own_adapter": ["tokens after each block: 52 39 27 14", "(2, 10)"],
    "own_method": ["197 197 99 99", "[0, 2, 4, 6, 8, 10, 12]"],
    "per_image": ["at most: 80%", "right: 6 of 6", "the same alone: True", "masked: True"],
    "save_and_load": ["model.safetensors", "'method': 'evit'", "same answer: True"],
    "slim_huggingface": ["145 103 103 74 54 54", "LABEL_", "ImageClassifierOutput"],
    "slow_fast": [
        "tokens after each block: 145 145 74 74 74 74",
        "after every block: {(12, 12)}",
        "Evo-LeViT: 197 197 50 26 26 26 17 10 10 10 10",
    ],
    "slim_timm": ["tokens after each block: 185", "0.752 GMACs of 1.254 GMACs"],
}
QUICK = (
    "documents own_adapter own_method per_image save_and_load slim_huggingface slim_timm".split()
)
SHORT = {"fine_tune": ["20"], "slow_fast": ["2"]}  # arguments for a short form


def example(name: str) -> Path:
    return ROOT / "examples" / f"{name}.py"


def check(name: str, printed: str) -> None:
    missing = [words for words in SAYS[name] if words not in printed]
    assert not missing, printed


def test_every_example_is_tested_and_short():
    assert [file.stem for file in EXAMPLES] == sorted(SAYS)
    for file in EXAMPLES:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGER.get(
            file.stem, MOST_LINES
        )


@pytest.fixture
def as_before():
    """Restores the log level: an example may silence transformers; other tests may not be."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)


@pytest.mark.parametrize("name", QUICK)
def test_it_runs_in_this_process(name, tmp_path, monkeypatch, capsys, as_before):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *SHORT.get(name, [])])
    runpy.run_path(str(example(name)), run_name="__main__")
    check(name, capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_it_runs_by_itself(name, tmp_path):
    short = SHORT.get(name, [])
    command = [sys.executable, "-W", "error", str(example(name)), *short]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(name, done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fine_tuning_brings_the_answers_nearer_to_the_teachers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fine_tune"])
    runpy.run_path(str(example("fine_tune")), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    kl = {line.split()[0]: float(line.partition("KL ")[2].split()[0]) for line in printed}
    assert kl["trained"] < 0.6 * kl["untrained"]


@pytest.mark.slow
def test_calibrating_beats_random_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    """At half of the operations, with no weight changed, most digits are still read."""
    monkeypatch.setattr(sys, "argv", ["calibrate", "64", str(tmp_path / "out")])
    runpy.run_path(str(example("calibrate")), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    columns = re.split(r" {2,}", printed[2])
    lines = printed[4 : printed.index("", 4)]  # below the title, the header, a rule
    rows = [dict(zip(columns, re.split(r" {2,}", line), strict=True)) for line in lines]
    accuracy = {row["model"]: float(row["accuracy %"].split()[0]) for row in rows}
    gain = {row["model"]: row["vs random"] for row in rows}
    assert float(gain["patch_slimming"]) > 10
    assert accuracy["patch_slimming_dynamic"] > accuracy["patch_slimming"]
    written = sorted(each.name for each in (tmp_path / "out").iterdir())
    assert written == ["calibration.json", "checkpoint.pt", "model", "pyramid.svg"]
