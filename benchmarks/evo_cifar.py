"""Evo-ViT from scratch on CIFAR-10, beside its dense twin: the same recipe, steps and seeds.

    python benchmarks/evo_cifar.py --shared ../shared --runs runs/evo --hosts flat --epochs 4
    python benchmarks/evo_cifar.py --shared ../shared --runs runs/evo --hosts fine --epochs 3
    python benchmarks/evo_cifar.py --shared ../shared --runs runs/evo --hosts levit --epochs 1.5

Two small flat models, of 64 patches and of 256 smaller ones, and a small LeViT-like one, all with a
class token and a head that reads the mean of the patches. Selection is per block for two thirds of
the steps and per stage then; an auxiliary head reads the class token while training, in the twin as
well. The same command resumes a run that was stopped. Then accuracy is measured
on the 10,000 test images, and inference at two batches and steps of training are timed, dense and
slow-fast interleaved in one run. Adds each host to benchmarks/results/evo_cifar.json.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import nn
from train_deit_tiny import print_now

import patchslim
from patchslim.data.images import Images
from patchslim.errors import DeepCut, Untrained
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.measurement.measure import measure
from patchslim.measurement.score import Batch
from patchslim.model.load import load
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles
from patchslim.runs.layout import MODEL_FOLDER, REPORT_FILE
from patchslim.training.config import TrainConfig
from patchslim.training.distributed import Processes
from patchslim.training.loader import TrainingLoader
from patchslim.training.train import train
from patchslim.training.trainer import Trainer

RESULT = Path(__file__).parent / "results" / "evo_cifar.json"
PREPARED = Preprocessing(
    image_size=(32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    crop_pct=1.0,
)
# Batches of inference, the first also that of training, and the images whose answers are compared.
BATCHES = ((128, 10_000), (32, 500))
WARMUP = 2


def flat(patch_size: int, embed_dim: int, num_heads: int) -> nn.Module:
    """Makes a plain vision transformer that pools its patches, and has a class token besides."""
    host: nn.Module = timm.models.VisionTransformer(
        img_size=32,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=6,
        num_heads=num_heads,
        num_classes=10,
        global_pool="avg",
    )
    return host


def levit() -> nn.Module:
    """Makes a LeViT-like pyramid of 256, 64 and 16 patches, with a class token."""
    from patchslim.architectures.evo_levit import EvoLevit

    stem = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
    )
    return EvoLevit(
        img_size=32,
        num_classes=10,
        embed_dim=(32, 64, 96),
        key_dim=16,
        depth=(3, 3, 3),
        num_heads=(2, 4, 6),
        stem_backbone=stem,
        stem_stride=2,
    )


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "flat": partial(flat, patch_size=4, embed_dim=96, num_heads=3),
    "fine": partial(flat, patch_size=2, embed_dim=48, num_heads=2),
    "levit": levit,
}
# LeViT's authors mix old and new attention evenly from the first block on, and learn the mixing.
METHOD: dict[str, dict[str, Any]] = {
    "flat": {"keep_rate": 0.5},
    "fine": {"keep_rate": 0.6},
    "levit": {"keep_rate": 0.5, "early": 0.5, "learned": True},
}


def slimmed(kind: str, seed: int, *, evo: bool) -> SlimModel:
    """Slims a new host, the same for both twins."""
    torch.manual_seed(seed)
    host = HOSTS[kind]()
    if not evo:
        return patchslim.slim(host, "identity")
    return patchslim.slim(host, "evo", **METHOD[kind])


def make_config(seed: int, epochs: float, *, evo: bool) -> TrainConfig:
    """Makes the recipe of both twins; selection per block means nothing to the dense one."""
    return TrainConfig(
        epochs=epochs,
        batch=128,
        lr=1e-3,
        warmup=0.1,
        distil="none",
        layered=2 / 3 if evo else 0.0,
        auxiliary=0.5,
        workers=1,
        checkpoint=50,
        seed=seed,
    )


def learned(kind: str, seed: int, options: argparse.Namespace) -> dict[str, SlimModel]:
    """Trains both twins."""
    data = options.shared / "data"
    models = {}
    for name in ("dense", "evo"):
        plain = slimmed(kind, seed, evo=name == "evo")
        images = Images.for_host(plain, data / "cifar10-train.zip", prepared=PREPARED)
        config = make_config(seed, options.epochs, evo=name == "evo")
        out = options.runs / f"{kind}-{name}-{seed}"
        if (out / REPORT_FILE).exists():  # the run has ended
            models[name] = done = load(out / MODEL_FOLDER, model=plain.host)
            same = (done.trained or {}).get("course") == config.to_json()
            if not same or done.schedule != plain.schedule:
                raise SystemExit(f"{out} was trained otherwise; name another folder by --runs.")
            continue
        print(out.name, flush=True)
        models[name] = train(plain, images, config, out=out, resume=True, progress=print_now).model
    return models


def steps(kind: str, repeats: int) -> list[dict[str, Any]]:
    """Times a training step in both phases, and computes what an epoch takes."""
    batches: list[Batch] = [(torch.randn(128, 3, 32, 32), torch.arange(128) % 10)]
    cases = {"dense": (False, 0.0), "evo, per block": (True, 1.0), "evo, per stage": (True, 0.0)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with TemporaryDirectory() as folder, Processes.connect() as processes:
        runs = {}
        for name, (evo, layered) in cases.items():
            config = TrainConfig(
                steps=1000, batch=128, distil="none", auxiliary=0.5, layered=layered, workers=0
            )
            loader = TrainingLoader(batches, config)
            runs[name] = Trainer(
                slimmed(kind, 0, evo=evo), None, loader, config, processes, Path(folder)
            )
        micro = next(iter(loader.steps()))
        names = list(runs)
        for number in range(-WARMUP, repeats):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                begun = time.perf_counter()
                runs[name].step(max(number, 0), micro)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - begun)
    rows = []
    for name, taken in seconds.items():
        ratios = [d / s for d, s in zip(seconds["dense"], taken, strict=True)]
        spread = Quartiles.of(taken)
        rows.append(
            {
                "name": name,
                "seconds": vars(spread),
                "seconds_an_epoch": spread.median * 50_000 / 128,
                "speedup": vars(Quartiles.of(ratios)),
            }
        )
    return rows


def main() -> None:
    """Trains, measures, times, and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--runs", type=Path, default=Path("runs/evo"))
    parser.add_argument("--hosts", default="flat,levit")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--train-only", action="store_true", help="measure in a later call")
    options = parser.parse_args()
    for remark in (DeepCut, Untrained):
        warnings.simplefilter("ignore", remark)
    test = options.shared / "data" / "cifar10-test.zip"
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for kind in options.hosts.split(","):
        reports = []
        for seed in range(options.seeds):
            models = learned(kind, seed, options)
            if options.train_only:
                continue
            host = models["dense"].host
            images = Images.for_host(host, test, prepared=PREPARED, batch=250)
            both = [
                measure(
                    {"evo": models["evo"]},
                    list(images.sample_batches(count)),
                    dense=host,
                    batch=batch,
                    repeats=options.repeats,
                    progress=print_now,
                )
                for batch, count in BATCHES
            ]
            print(both[0].table(), both[1].table(), sep="\n", flush=True)
            reports.append([report.to_json() for report in both])
        if options.train_only:
            continue
        provenance = Provenance.now(HOSTS[kind](), batch=128, image_size=(32, 32), images=0, seed=0)
        results[kind] = {
            "course": make_config(0, options.epochs, evo=True).to_json(),
            "reports": reports,
            "training": steps(kind, options.repeats),
            "birth": asdict(provenance),
        }
    if results:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
