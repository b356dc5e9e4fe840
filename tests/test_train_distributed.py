"""`patchslim train` in two real processes, as torchrun starts them, compared with one process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import patchslim
from patchslim.example import digits
from patchslim.runs.checkpoint import read
from patchslim.runs.log import read_log

pytestmark = pytest.mark.slow
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
TRAIN = (
    "train digits --macs 0.6 --batch 8 --limit 32 --lr 1e-4 --labels 0 --checkpoint 1 --wise 0.5"
).split()


def begun(folder: Path, *more: str, processes: int = 2) -> subprocess.Popen[str]:
    """Starts a training that writes into `folder`."""
    launcher = TORCHRUN if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "patchslim", *TRAIN, "--out", str(folder), *more]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def trained(folder: Path, *more: str, processes: int = 2) -> tuple[str, dict[str, torch.Tensor]]:
    """Returns what a training printed, and the weights it ended with."""
    with begun(folder, *more, processes=processes) as run:
        said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    return said, load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("shard", [[], ["--shard"]])
@pytest.mark.parametrize("method", ["evit", "tome"])
def test_two_processes_end_where_one_ends(method: str, shard: list[str], tmp_path: Path) -> None:
    how = ["--steps", "3", "--method", method]
    _, alone = trained(tmp_path / "one", *how, processes=1)
    said, together = trained(tmp_path / "two", *how, *shard)
    assert said.count("measure it") == 1
    one, two = read_log(tmp_path / "one" / "log.csv"), read_log(tmp_path / "two" / "log.csv")
    for name in ("loss", "gradient"):
        assert two[-1][name] == pytest.approx(one[-1][name], rel=2e-3)
    begun_with = patchslim.slim(digits.host(), method, macs=0.6).state_dict()
    moved = [(tensor - begun_with[name]).abs().mean() for name, tensor in alone.items()]
    apart = [(tensor - together[name]).abs().mean() for name, tensor in alone.items()]
    assert sum(moved) > 0
    assert sum(apart) < 0.05 * sum(moved)


def test_a_killed_worker_ends_the_run_with_a_message_and_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with begun(out, "--steps", "400", "--method", "evit") as run:
        until = time.monotonic() + 120
        while not (out / "checkpoint.pt").exists():
            assert time.monotonic() < until, "no checkpoint came"
            time.sleep(0.2)
        subprocess.run(["pkill", "-9", "-P", str(run.pid), "-n"], check=True)
        said, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "another of its 2 processes ended" in said
    step = read(out / "checkpoint.pt")["step"]
    assert step >= 1
    how = ["--steps", "400", "--method", "evit", "--resume"]
    with begun(out, *how, processes=1) as again:
        for line in again.stdout:
            if line.startswith("step "):
                assert int(line.split()[1].partition("/")[0]) > step
                break
        again.kill()
