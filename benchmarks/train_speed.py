"""Whether training itself gets faster: seconds a step, slimmed and dense interleaved in one run.

    python benchmarks/train_speed.py                # DeiT-Ti, batch 16, this machine's cores

A step is forward, backward and optimiser, on labels alone; with a teacher, its forward pass comes
on top for dense and slimmed alike. Conversion is the measured speed-up times the share of
operations: 1 means that a step falls as much as the operations do. Weights are random: they do not
matter for speed. Writes benchmarks/results/train_speed_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch

import patchslim
from patchslim.errors import Untrained
from patchslim.measurement.score import Batch
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles
from patchslim.training.config import TrainConfig
from patchslim.training.distributed import Processes
from patchslim.training.loader import MicroBatch, TrainingLoader
from patchslim.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
WARMUP = 2


def main() -> None:
    """Times the steps and writes one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--budget", type=float, default=0.65)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    warnings.simplefilter("ignore", Untrained)
    torch.manual_seed(0)
    host = timm.create_model(options.model, num_classes=100)
    batches: list[Batch] = [
        (torch.randn(options.batch, 3, 224, 224), torch.arange(options.batch) % 100)
    ]
    models = {
        "dense": patchslim.slim(host, "identity"),
        **{
            name: patchslim.slim(host, name, macs=options.budget)
            for name in ("tome", "evit", "topk", "dynamicvit")
        },
    }
    config = TrainConfig(
        steps=1000, batch=options.batch, distil="none", precision=options.precision, ema=0.0
    )
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with TemporaryDirectory() as folder, Processes.connect() as processes:
        loader = TrainingLoader(batches, config)
        micro = next(iter(loader.steps()))
        runs = {
            name: Trainer(model, None, loader, config, processes, Path(folder))
            for name, model in models.items()
        }
        names = list(runs)
        for number in range(-WARMUP, options.repeats):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                taken = _timed(runs[name], max(number, 0), micro)
                if number >= 0:
                    seconds[name].append(taken)
            print(f"round {number + 1}/{options.repeats}", end="\r", flush=True)
    rows = []
    for name, model in models.items():
        ratios = [d / s for d, s in zip(seconds["dense"], seconds[name], strict=True)]
        share = model.macs().total / model.dense_macs().total
        speedup = Quartiles.of(ratios)
        rows.append(
            {
                "name": name,
                "macs_share": share,
                "seconds": vars(Quartiles.of(seconds[name])),
                "speedup": vars(speedup),
                "conversion": speedup.median * share,
            }
        )
        print(f"{name:<12} {share:.3f} of the MACs, {speedup.median:.2f}x as fast")
    provenance = Provenance.now(host, batch=options.batch, image_size=(224, 224), images=0, seed=0)
    out = RESULTS / f"train_speed_{processes.device.type}.json"
    data = {"model": options.model, "precision": options.precision, "repeats": options.repeats}
    data |= {"rows": rows, "birth": asdict(provenance)}
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _timed(run: Trainer, number: int, micro: list[MicroBatch]) -> float:
    """Times one step."""
    begun = time.perf_counter()
    run.step(number, micro)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
