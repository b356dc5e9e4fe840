"""What `bench` promises: a sweep that is killed goes on, and several processes find the same.

    python benchmarks/sweep.py [--scenes 64] [--kills 6,14]

A sweep of 38 cells of the embedded example runs as a command, which is killed (SIGKILL) as soon as
so many cells are there, begun again, killed again, and begun again. Its rows are compared with
those of a sweep that nobody stopped, and the files of its cells must not have been written twice.
Then accuracy alone is scored by one process and by two of Ray, with one thread each: the numbers
must be equal, and the ratio of the times is told. Writes benchmarks/results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from patchslim.example import digits
from patchslim.report.provenance import Provenance
from patchslim.report.report import Report
from patchslim.report.row import Row
from patchslim.sweep.bench import bench

RESULT = Path(__file__).parent / "results" / "sweep.json"
METHODS = "topk,evit,tome,pitome,diffrate,similarity"
BUDGETS = "0.8,0.65,0.5"
BATCHES = "1,8"
TIMED = ("latency", "throughput", "speedup", "conversion", "memory")


def command(out: Path, scenes: int, *more: str) -> list[str]:
    """Returns the command line of the sweep."""
    words = ["bench", "digits", "--methods", METHODS, "--budgets", BUDGETS, "--batches", BATCHES]
    words += ["--limit", str(scenes), "--threads", "1", "--rounds", "2", "--out", str(out), *more]
    return [sys.executable, "-m", "patchslim", *words]


def count_cells(out: Path) -> int:
    """Counts the cells that are there."""
    return len([*(out / "cells").glob("*.json")])


def kill_at(out: Path, scenes: int, cells: int) -> dict[str, int]:
    """Runs the sweep until so many cells are there, and kills it; says when each was written."""
    process = subprocess.Popen(
        command(out, scenes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while count_cells(out) < cells and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return written(out)


def written(out: Path) -> dict[str, int]:
    """Returns when each cell was written."""
    return {file.name: file.stat().st_mtime_ns for file in (out / "cells").glob("*.json")}


def comparable(row: Row) -> dict[str, Any]:
    """Returns the row without what a clock or the allocator says."""
    return {name: value for name, value in asdict(row).items() if name not in TIMED}


def try_kills(folder: Path, scenes: int, kills: list[int]) -> dict[str, Any]:
    """Kills a sweep at these numbers of cells, and compares it with a whole one."""
    subprocess.run(command(folder / "whole", scenes), check=True, stdout=subprocess.DEVNULL)
    before = [kill_at(folder / "killed", scenes, cells) for cells in kills]
    subprocess.run(command(folder / "killed", scenes), check=True, stdout=subprocess.DEVNULL)
    after = written(folder / "killed")
    rewritten = {name for each in before for name in each if after[name] != each[name]}
    rows = [Report.load(folder / name / "report.json").rows for name in ("whole", "killed")]
    return {
        "cells": len(after),
        "there when it was killed": [len(each) for each in before],
        "cells written twice": len(rewritten),
        "rows": len(rows[0]),
        "rows that differ": sum(comparable(a) != comparable(b) for a, b in zip(*rows, strict=True)),
    }


def try_workers(folder: Path, scenes: int) -> dict[str, Any]:
    """Scores by one process and by two of Ray."""
    made = digits.scenes("test", scenes)
    pixels, labels = digits.normalise(made.images), torch.from_numpy(made.labels)
    images = list(zip(pixels.split(32), labels.split(32), strict=True))
    shares = [float(each) for each in BUDGETS.split(",")]
    seconds, rows = {}, {}
    for workers in (None, 2):
        begun = time.perf_counter()
        rows[workers] = bench(
            {"digits": digits.host()},
            images,
            METHODS.split(","),
            out=folder / f"workers {workers}",
            budgets=shares,
            rounds=0,
            threads=1,
            workers=workers,
        ).rows
        seconds[workers] = time.perf_counter() - begun
    differ = sum(comparable(a) != comparable(b) for a, b in zip(rows[None], rows[2], strict=True))
    return {
        "models": len(rows[None]),
        "seconds by one process": seconds[None],
        "seconds by two, with their start": seconds[2],
        "times as fast": seconds[None] / seconds[2],
        "rows that differ": differ,
    }


def main() -> None:
    """Prints and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--kills", default="6,14")
    args = parser.parse_args()
    kills = [int(each) for each in args.kills.split(",")]
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        found = {
            "killed": try_kills(Path(name), args.scenes, kills),
            "workers": try_workers(Path(name), 4 * args.scenes),
        }
    host = digits.host()
    origin = Provenance.now(host, batch=8, image_size=(96, 96), images=args.scenes, seed=0)
    RESULT.write_text(json.dumps({**found, "measured": asdict(origin)}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
