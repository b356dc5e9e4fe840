"""Two real processes learn what one learns, and when one is lost the other says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from child_process import fork_child, needs_fork
from distributed_worker import OPTIMISERS, Toy, run_pair, train_toy
from patchslim.errors import BadFile, TrainingStopped
from patchslim.runs.checkpoint import read, write
from patchslim.training.distributed import Processes

TRAINEE = Path(__file__).with_name("distributed_worker.py")
SOURCE = TRAINEE.parents[1] / "src"
PYTHON = [sys.executable]
FORKED: list[str] = []  # two forks of this process, which has imported everything
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [*PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]


@pytest.fixture
def alone():
    with Processes.connect("cpu") as processes:
        yield processes


def launched(launcher, work, folder):
    """Runs the worker to its end."""
    if launcher == FORKED:
        code = os.waitstatus_to_exitcode(
            os.waitpid(fork_child(lambda: run_pair(work, str(folder))), 0)[1]
        )
        return subprocess.CompletedProcess([], code, "", "see what the test has captured")
    launcher_sets = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher_sets}
    environment |= {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(TRAINEE), work, str(folder)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def assert_close(got, wanted):
    """Asserts that two states of training differ by rounding only."""
    for part in ("model", "average"):
        assert got[part].keys() == wanted[part].keys()
        for name, tensor in wanted[part].items():
            torch.testing.assert_close(got[part][name], tensor, rtol=0, atol=1e-6)
    got, wanted = got["optimizer"], wanted["optimizer"]
    assert got["param_groups"] == wanted["param_groups"]
    assert got["state"].keys() == wanted["state"].keys()
    for place, values in wanted["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(got["state"][place][name], value, rtol=0, atol=1e-6)


def assert_two_are_one(alone, launcher, work, folder):
    """Whole runs, and runs that switch between one process and two in the middle, are the same."""
    for name in OPTIMISERS:
        write(folder / f"{name}-half.pt", train_toy(alone, name, stop=3))
    ended = launched(launcher, work, folder)
    assert ended.returncode == 0, ended.stderr
    done = read(folder / "done.pt")
    for name in OPTIMISERS:
        one = train_toy(alone, name)
        for how in ("1", "2", "resumed"):
            assert_close(done[f"{name} {how}"], one)
        write(folder / "half.pt", done[f"{name} half"])
        assert_close(train_toy(alone, name, folder / "half.pt", start=3), one)


@needs_fork
def test_two_processes_learn_what_one_learns(alone, tmp_path):
    assert_two_are_one(alone, FORKED, "together", tmp_path)


@pytest.mark.slow
def test_torchrun_starts_processes_that_copy(alone, tmp_path):
    assert_two_are_one(alone, TORCHRUN, "together", tmp_path)


@pytest.mark.slow
def test_processes_that_share_weights_learn_what_one_learns(alone, tmp_path):
    assert_two_are_one(alone, TORCHRUN, "sharded", tmp_path)


@pytest.mark.slow
def test_accelerate_starts_processes_too(alone, tmp_path):
    pytest.importorskip("accelerate")
    assert_two_are_one(alone, ACCELERATE, "together", tmp_path)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_reason(tmp_path):
    began = time.monotonic()
    ended = launched(TORCHRUN, "lose", tmp_path)
    assert time.monotonic() - began < 60
    assert ended.returncode
    said = "Training was stopped: another of its 2 processes ended or does not answer."
    assert f"error: {said}" in ended.stderr
    # torchrun's own last words quote ours, and name the signal that ended the other.
    summary = ended.stderr[ended.stderr.index("Failures:") :]
    assert said in summary
    assert "SIGKILL" in summary


@pytest.mark.slow
@needs_fork
def test_all_processes_stop_when_one_gets_sigterm(tmp_path):
    ended = launched(PYTHON, "stop", tmp_path)
    assert ended.returncode == 0, ended.stderr
    steps = [json.loads((tmp_path / f"stopped-{rank}.json").read_text()) for rank in (0, 1)]
    assert steps == [3, 3]


def test_one_process_is_alone(alone):
    toy = Toy()
    assert (alone.rank, alone.world, alone.is_first) == (0, 1, True)
    assert alone.wrap(toy, shard=False) is alone.wrap(toy, shard=True) is toy
    assert alone.mean(2.5) == 2.5
    assert (alone.any(True), alone.any(False)) == (True, False)
    alone.barrier()
    alone.check_same_settings({"lr": 0.1})
    assert not torch.distributed.is_initialized()


def test_sigterm_is_noted_while_joined_and_only_then(alone):
    assert not alone.stop_requested
    os.kill(os.getpid(), signal.SIGTERM)
    assert alone.stop_requested


def test_signals_are_left_alone_where_they_are_somebody_elses():
    before = signal.getsignal(signal.SIGTERM)
    with Processes.connect("cpu"):
        ours = signal.getsignal(signal.SIGTERM)
        with Processes.connect("cpu"):
            assert signal.getsignal(signal.SIGTERM) is ours
    assert signal.getsignal(signal.SIGTERM) is before

    def elsewhere():
        with Processes.connect("cpu"):
            kept.append(signal.getsignal(signal.SIGTERM))

    kept = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert kept == [before]


def test_a_resumed_run_is_the_run_bit_by_bit(alone, tmp_path):
    for name in OPTIMISERS:
        write(tmp_path / "half.pt", train_toy(alone, name, stop=3))
        whole, resumed = (
            train_toy(alone, name),
            train_toy(alone, name, tmp_path / "half.pt", start=3),
        )
        for key, tensor in whole["model"].items():
            assert torch.equal(resumed["model"][key], tensor)


def test_a_saved_state_is_a_copy(alone):
    toy = Toy()
    optimiser = torch.optim.AdamW(toy.parameters())
    toy(torch.ones(2, 5)).sum().backward()
    optimiser.step()
    state = alone.full_state(toy, optimiser)
    kept = state["model"]["low.weight"].clone()
    alone.restore(toy, optimiser, state)
    optimiser.step()
    assert torch.equal(state["model"]["low.weight"], kept)
    assert state["optimizer"]["state"][1]["step"] == 1
    assert toy.low.weight.ne(kept).any()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].pop("mask"),
        lambda state: state["model"].update(extra=torch.ones(1)),
        lambda state: state["model"].update(mask=torch.ones(9)),
        lambda state: state.pop("model"),
        lambda state: state["optimizer"]["param_groups"].append({"params": [77]}),
        lambda state: state["optimizer"]["state"].update({99: {"step": torch.ones(())}}),
    ],
)
def test_the_state_of_another_model_is_refused(alone, change):
    toy = Toy()
    optimiser = torch.optim.AdamW(toy.parameters())
    state = alone.full_state(toy, optimiser)
    change(state)
    with pytest.raises(BadFile, match=r"of another model, method or optimiser \(.+train from"):
        alone.restore(toy, optimiser, state)


def test_the_norm_of_gradients_is_logged_and_limited(alone):
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    assert alone.clip([weight], 0) == 6
    assert weight.grad.norm() == 6
    assert alone.clip([weight], 1.5) == 6
    assert weight.grad.norm() == pytest.approx(1.5)


def test_half_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(TrainingStopped, match="torchrun or accelerate launch"),
        Processes.connect("cpu"),
    ):
        pass
