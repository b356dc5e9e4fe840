"""What the loop itself costs: `identity` against the untouched host, here and in another checkout.

    python benchmarks/overhead.py [--beside OTHER/src] [--model deit_tiny_patch16_224]

Each checkout runs in a process of its own and answers on request, one after another, so that a busy
machine slows all alike. Printed are the medians, over the rounds, of slimmed time over dense time,
and of slimmed time here over slimmed time there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1] / "src"
WORKER = """
import sys, time, timm, torch, patchslim
torch.manual_seed(0)
host = timm.create_model(sys.argv[1]).eval()
slimmed = patchslim.slim(host, sys.argv[2], **eval(sys.argv[3]))

def seconds(model, images):
    begun = time.perf_counter()
    model(images)
    return time.perf_counter() - begun

with torch.inference_mode():
    for line in sys.stdin:
        images = torch.randn(int(line), *host.pretrained_cfg["input_size"])
        dense, slim = zip(*[(seconds(host, images), seconds(slimmed, images)) for _ in range(6)])
        print(min(dense), min(slim), flush=True)
"""


class Worker:
    """Process with a dense and a slimmed model, of the sources of one checkout."""

    def __init__(self, source: Path, model: str, method: str, budget: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, model, method, budget],
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time_batch(self, batch: int) -> tuple[float, float]:
        """Finds the fastest of six dense and of six slimmed passes over one batch, in seconds."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        dense, slim = map(float, self.process.stdout.readline().split())
        return dense, slim


def main() -> None:
    """Prints one line for each batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--beside", type=Path, metavar="SRC")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--method", default="identity")
    parser.add_argument("--budget", default="{}", help="a dictionary for slim, such as {'r': 8}")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    sources = [HERE, *([args.beside.resolve()] if args.beside else [])]
    workers = [Worker(source, args.model, args.method, args.budget) for source in sources]
    for batch in map(int, args.batches.split(",")):
        for worker in workers:  # a round to warm up
            worker.time_batch(batch)
        rounds = [[worker.time_batch(batch) for worker in workers] for _ in range(args.rounds)]
        line = f"{args.model} {args.method} batch {batch}, {args.rounds} rounds:"
        for place, source in enumerate(sources):
            ratios = [each[place][1] / each[place][0] for each in rounds]
            low, middle, high = statistics.quantiles(ratios, n=4)
            name = "here" if source == HERE else "there"
            line += f"  {name} slimmed/dense {middle:.3f} [{low:.3f} {high:.3f}]"
        if len(workers) == 2:
            middle = statistics.median(each[0][1] / each[1][1] for each in rounds)
            line += f"  here/there {middle:.3f}"
        print(line, flush=True)
    for worker in workers:
        worker.process.kill()


if __name__ == "__main__":
    main()
