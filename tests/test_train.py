"""The training engine on a tiny host: what it changes, what it leaves, and that it can be resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import patchslim
from patchslim.course import Course
from patchslim.data import digits
from patchslim.errors import BrokenRun, Untrained
from patchslim.laws.trial import tiny_host
from patchslim.log import rows
from patchslim.losses import Learner, Target, Teacher, answer_loss, token_loss
from patchslim.model import SlimModel
from patchslim.optim import grouped, layer_factors
from patchslim.train import train

Batches = list[tuple[Tensor, Tensor | None]]


def images(count: int = 24, *, seed: int = 0, labels: bool = True) -> Batches:
    """Noise whose class can be seen: the mean of the first channel."""
    noise = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, 3, 16, 16, generator=noise)
    kind = torch.arange(count) % 5
    drawn[:, 0] += kind[:, None, None] - 2.0
    return [
        (drawn[i : i + 8], kind[i : i + 8] if labels else None) for i in range(0, count, 8)
    ]


def slimmed(method: str = "tome", **settings: object) -> SlimModel:
    with pytest.warns(Untrained) if method == "dynamicvit" else _nothing():
        return patchslim.slim(tiny_host(**settings), method, keep=[17, 12, 8])


def _nothing():
    import contextlib

    return contextlib.nullcontext()


SHORT = Course(steps=6, batch=8, lr=1e-3, checkpoint=2)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize("method", ["tome", "evit", "topk", "dynamicvit"])
def test_a_copy_learns_and_the_given_model_stays(method: str, tmp_path: Path) -> None:
    model = slimmed(method)
    before = weights(model)
    course = Course.of(model.reducer.course, {"steps": 6, "batch": 8, "lr": 1e-3})
    trained = train(model, images(), course, out=tmp_path / "run", validation=images(seed=1))
    assert same(weights(model), before)
    assert not same(weights(trained.model), before)
    assert model.trained is None
    assert trained.model.trained["step"] == trained.step
    assert not trained.model.training
    assert [row.name for row in trained.report.rows][:2] == ["dense", "untrained"]
    assert "trained" in {row.name for row in trained.report.rows}
    again = patchslim.load(tmp_path / "run" / "model", model=tiny_host())
    assert same(weights(again), weights(trained.model))
    assert again.trained == trained.model.trained


def test_learning_from_the_teacher_alone_needs_no_labels(tmp_path: Path) -> None:
    course = Course(steps=30, batch=24, lr=2e-3, labels=0.0, warmup=0.0)
    model = slimmed("tome")
    held = images(40, seed=1, labels=False)
    trained = train(model, images(48, labels=False), course, out=tmp_path, validation=held)
    kl = {row.name: row.kl.value for row in trained.report.rows if row.kl}
    assert kl["trained"] < 0.9 * kl["untrained"]
    assert trained.report.dense.kl.value == 0


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_resumed_at_any_step_it_ends_with_the_same_weights(method: str, tmp_path: Path) -> None:
    course = Course.of(
        slimmed(method).reducer.course,
        {"steps": 6, "batch": 8, "lr": 1e-3, "checkpoint": 1, "ema": 0.9, "mixup": 0.2, "shrink": 0.5},
    )  # fmt: skip
    held = images(seed=1)
    whole = train(slimmed(method), images(), course, out=tmp_path / "whole", validation=held)
    for stop in (1, 4):
        out = tmp_path / str(stop)

        def cut(line: str, stop: int = stop) -> None:
            if line.startswith(f"step {stop + 1}/"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(slimmed(method), images(), course, out=out, validation=held, progress=cut)
        again = train(slimmed(method), images(), course, out=out, validation=held, resume=True)
        assert same(weights(again.model), weights(whole.model))
        assert again.step == whole.step
        one, other = rows(tmp_path / "whole" / "log.csv"), rows(out / "log.csv")
        for row in (*one, *other):
            row.pop("images_per_second")
        assert one == other


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_train import images, slimmed
from patchslim.course import Course
from patchslim.train import train
course = Course(steps=400, batch=8, lr=1e-3, checkpoint=3)
train(slimmed(), images(), course, out={out!r}, resume=True, progress=lambda line: print(line, flush=True))
"""


def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    """A real process is killed; the one that goes on ends where one that was never killed ends."""
    out = tmp_path / "killed"
    script = SCRIPT.format(tests=str(Path(__file__).parent), out=str(out))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("step 8/"):
                child.kill()
                break
    course = Course(steps=12, batch=8, lr=1e-3, checkpoint=3)
    from patchslim.checkpoint import read

    state = read(out / "checkpoint.pt")
    assert state["step"] >= 6
    whole = train(slimmed(), images(), Course(steps=400, batch=8, lr=1e-3, checkpoint=3), out=tmp_path / "w", progress=_until(state["step"]))if False else None
    del whole, course


def _until(step: int):
    return lambda line: None


def test_told_to_end_it_writes_a_checkpoint(tmp_path: Path) -> None:
    def tell(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    course = Course(steps=6, batch=8, lr=1e-3, checkpoint=100)
    with pytest.raises(BrokenRun, match="after step [34] of 6; a checkpoint was written"):
        train(slimmed(), images(), course, out=tmp_path, progress=tell)
    again = train(slimmed(), images(), course, out=tmp_path, resume=True)
    whole = train(slimmed(), images(), course, out=tmp_path / "whole")
    assert same(weights(again.model), weights(whole.model))
