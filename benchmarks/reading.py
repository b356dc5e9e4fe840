"""What checking images costs: `measure` on clean pictures, here and in another checkout.

    python benchmarks/reading.py --beside OTHER/src [--images 500] [--rounds 7]

Each checkout runs in a process of its own and answers on request, one after another. A round is one
call of `measure` on the same JPEG files without timing of the models. Printed are the medians, over
the rounds, of processor seconds here over there, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1] / "src"
WORKER = """
import sys, time, timm, torch, patchslim
torch.set_num_threads(1)
torch.manual_seed(0)
slimmed = patchslim.slim(timm.create_model("test_vit").eval(), "tome", r=4)
for line in sys.stdin:
    begun = time.process_time()
    images = patchslim.Images.for_host(slimmed, line.strip(), batch=8)
    patchslim.measure(slimmed, images, repeats=0)
    print(time.process_time() - begun, flush=True)
"""


def write_pictures(folder: Path, count: int) -> None:
    """Writes smooth JPEG pictures of 500 x 375 pixels in two class folders."""
    drawn = np.random.default_rng(0)
    for number in range(count):
        small = drawn.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
        kind = folder / str(number % 2)
        kind.mkdir(parents=True, exist_ok=True)
        picture.save(kind / f"{number:04}.jpg", quality=90)


def start_worker(source: Path) -> subprocess.Popen[str]:
    """Starts a process that measures a folder for each line it gets."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def time_worker(worker: subprocess.Popen[str], folder: Path) -> float:
    """Asks a worker for one round; its processor seconds."""
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("the worker has no pipes")
    worker.stdin.write(f"{folder}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--beside", type=Path, metavar="SRC", required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), args.images)
        here, there = start_worker(HERE), start_worker(args.beside.resolve())
        rounds = []
        for number in range(args.rounds + 1):
            order = (here, there) if number % 2 else (there, here)
            seconds = {worker: time_worker(worker, Path(folder)) for worker in order}
            rounds.append((seconds[here], seconds[there]))
        ratios = [mine / theirs for mine, theirs in rounds[1:]]  # the first one warms up
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"measure on {args.images} pictures, {args.rounds} rounds: "
            f"here {statistics.median(r[0] for r in rounds[1:]):.2f} s, "
            f"here/there {middle:.3f} [{low:.3f} {high:.3f}]"
        )
        for worker in (here, there):
            worker.kill()


if __name__ == "__main__":
    main()
