"""A toy training, and the program that does it in several processes.

torchrun --nproc-per-node 2 tests/trainee.py WORK FOLDER
python tests/trainee.py WORK FOLDER              the same two without torchrun, which is quicker
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from patchslim.errors import BadSetting, PatchslimError
from patchslim.runs.checkpoint import read, write
from patchslim.training.distributed import Processes, shard_tensors

OPTIMISERS = {"sgd": (torch.optim.SGD, 0.1), "adamw": (torch.optim.AdamW, 0.01)}
STEPS, RESTING = 6, 2


class Toy(nn.Module):
    """Two layers; `rests` gets no gradient at first, `mask` never gets one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.low = nn.Linear(5, 7)
        self.rests = nn.Linear(7, 7)
        self.high = nn.Linear(7, 3)
        self.mask = nn.Parameter(torch.ones(4))
        self.resting = True

    def forward(self, x):
        x = self.low(x).relu()
        return self.high(x if self.resting else x + self.rests(x))


def make_batch(step: int) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(100 + step))


def train_toy(processes, name, folder=None, *, shard=False, accumulate=1, start=0, stop=STEPS):
    """Trains for `stop` steps and returns the full state; begins at the checkpoint in `folder`."""
    # Every process makes other weights, and gets those of the first.
    toy = Toy(seed=processes.rank)
    wrapped = processes.wrap(toy, shard=shard)
    kind, rate = OPTIMISERS[name]
    optimiser = kind(wrapped.parameters(), lr=rate)
    average = [p.detach().clone() for p in wrapped.parameters()]
    if start:
        state = read(folder)
        processes.restore(wrapped, optimiser, state)
        like = {str(place): p for place, p in enumerate(wrapped.parameters())}
        average = list(shard_tensors(state["average"], like).values())
    for step in range(start, stop):
        toy.resting = step < RESTING
        mine = make_batch(step)[processes.rank :: processes.world]
        parts = mine.chunk(accumulate)
        for place, part in enumerate(parts):
            last = place == len(parts) - 1
            with contextlib.nullcontext() if last else processes.no_sync(wrapped):
                (wrapped(part).square().mean() / len(parts)).backward()
        norm = processes.clip(wrapped.parameters(), 0.5)
        assert 0 < norm < 100
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            wrapped(make_batch(step))  # as validation does, which must leave parameters as they are
            torch._foreach_lerp_(average, list(wrapped.parameters()), 0.5)
    kept = processes.gather({str(place): p for place, p in enumerate(average)})
    return {**processes.full_state(wrapped, optimiser), "average": kept}


def check_processes(processes, folder):
    """Writes what the methods of `Processes` return in two processes."""
    assert processes.world == 2
    assert processes.is_first == (processes.rank == 0)
    assert processes.mean(processes.rank) == 0.5
    assert processes.any(processes.rank == 1)
    assert not processes.any(False)
    processes.check_same_settings({"lr": 0.1})
    with pytest.raises(BadSetting, match="batch is 32 in process 0 and 33 in process 1"):
        processes.check_same_settings({"lr": 0.1, "batch": 32 + processes.rank})
    processes.barrier()


def together(processes, folder, *, shard=False):
    """Trains in every way, writes the states, and resumes what one process left."""
    check_processes(processes, folder)
    done = {}
    for name in OPTIMISERS:
        for accumulate in (1, 2):
            done[f"{name} {accumulate}"] = train_toy(
                processes, name, shard=shard, accumulate=accumulate
            )
        done[f"{name} half"] = train_toy(processes, name, shard=shard, stop=3)
        alone = folder / f"{name}-half.pt"
        done[f"{name} resumed"] = train_toy(processes, name, alone, shard=shard, start=3)
    if processes.is_first:
        write(folder / "done.pt", done)


def sharded(processes, folder):
    together(processes, folder, shard=True)


def lose(processes, folder):
    """Kills the second process in the middle of training."""
    wrapped = processes.wrap(Toy(), shard=False)
    for step in range(10_000):
        if processes.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        wrapped(make_batch(step)).square().mean().backward()


def stop(processes, folder):
    """Stops all processes together when one gets SIGTERM."""
    for step in range(10_000):
        if processes.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if processes.any(processes.stop_requested):
            (folder / f"stopped-{processes.rank}.json").write_text(json.dumps(step))
            return
        time.sleep(0.001)


def main(work: str, folder: str) -> int:
    torch.set_num_threads(1)
    try:
        with Processes.connect("cpu") as processes:
            globals()[work](processes, Path(folder))
    except PatchslimError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def run_pair(work: str, folder: str) -> int:
    """Does the work in this process and a fork of it, with what a launcher would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The first optimiser of a process loads half of torch: once is enough for two.
    torch.optim.SGD(Toy().parameters())
    child = os.fork()
    rank = 0 if child else 1
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    code = main(work, folder)
    return max(code, abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))) if child else code


if __name__ == "__main__":
    sys.exit((main if "RANK" in os.environ else run_pair)(*sys.argv[1:]))
