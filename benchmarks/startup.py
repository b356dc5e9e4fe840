"""How long the command line takes to answer where no model is needed: help, a version, mistakes.

    python benchmarks/startup.py [--beside OTHER/src] [--repeats 5]

Prints the median seconds of each answer (on the clock, and of processor time), one run after
another so that a busy machine slows all alike. `--beside` measures the sources of another checkout
too, such as those of an older version.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1] / "src"
ANSWERS = [
    "--help",
    "--version",
    "train --help",
    "trian digits",
    "train digits",
    "slim digits --mac 0.6",
    "slim digits --method evitt --macs 0.6",
]


def time_answer(source: Path, arguments: str) -> tuple[float, float]:
    """Measures seconds on the clock and of processor time until the command has answered."""
    command = [sys.executable, "-m", "patchslim", *shlex.split(arguments)]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    used, begun = os.times(), time.perf_counter()
    subprocess.run(command, env=environment, capture_output=True, check=False)
    ended, now = time.perf_counter(), os.times()
    spent = now.children_user + now.children_system - used.children_user - used.children_system
    return ended - begun, spent


def main() -> None:
    """Prints a table: an answer a line, two columns for each source."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--beside", type=Path, metavar="SRC")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sources = [HERE, *([args.beside.resolve()] if args.beside else [])]
    print(f"{'patchslim ...':40}" + "".join(f"{str(each)[-24:]:>26}" for each in sources))
    for answer in ANSWERS:
        runs: dict[Path, list[tuple[float, float]]] = {source: [] for source in sources}
        for _ in range(args.repeats):
            for source in sources:
                runs[source].append(time_answer(source, answer))
        cells = [
            "{:.2f} s, {:.2f} s of CPU".format(
                *(statistics.median(column) for column in zip(*each, strict=True))
            )
            for each in runs.values()
        ]
        print(f"{answer:40}" + "".join(f"{cell:>26}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
