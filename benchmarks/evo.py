"""Evo-ViT on stock weights, and how much of what it saves becomes time.

    python benchmarks/evo.py --shared ../shared

First eager speed, dense and slow-fast interleaved in one run, on DeiT-S and on Evo-LeViT-256 with
random weights, which decide nothing about time. Conversion is speed-up times the share of
operations. Then its selection on DeiT-Ti with ImageNet weights, untrained, at one budget beside
other methods on the same 500 images: with and without the representative token, per stage and per
block. Evo-ViT is meant to be trained that way; this is what it does to a model that was not.
Writes benchmarks/results/evo.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from train_deit_tiny import dense, load_test_images, print_now

import patchslim
from patchslim.architectures.evo_levit import SIZES
from patchslim.errors import DeepCut
from patchslim.measurement.measure import measure
from patchslim.methods.evo import Evo
from patchslim.methods.random import Random
from patchslim.model.model import SlimModel

RESULT = Path(__file__).parent / "results" / "evo.json"
BUDGET = 0.65
SEEDS = 3
BATCHES = (1, 8)


def stock(host: nn.Module) -> dict[str, SlimModel]:
    """Makes all models at the one budget."""
    blocks = range(4, 12)
    official = Evo(representative=False)
    models = {
        "evo": patchslim.slim(host, "evo", macs=BUDGET),
        "evo, per block": patchslim.slim(host, "evo", macs=BUDGET, at=blocks),
        "evo, no representative": patchslim.slim(host, official, macs=BUDGET),
        "evo, no representative, per block": patchslim.slim(
            host, Evo(representative=False), macs=BUDGET, at=blocks
        ),
    }
    for name in ("topk", "evit", "tome", "similarity"):
        models[name] = patchslim.slim(host, name, macs=BUDGET)
    for seed in range(SEEDS):
        models[f"random seed {seed}"] = patchslim.slim(host, Random(seed=seed), macs=BUDGET)
    return models


def timed(name: str, repeats: int) -> list[dict[str, Any]]:
    """Makes a report for each batch size."""
    torch.manual_seed(0)
    pyramid = name in SIZES
    pooling = {} if pyramid else {"global_pool": "avg"}
    host = timm.create_model(name, **pooling).eval()
    settings: dict[str, Any] = {"early": 0.5, "learned": True} if pyramid else {}
    shape = patchslim.find_adapter(host).shape(host)
    first = 2 if pyramid else 4
    blocks = [block for block in range(first, shape.depth) if block not in shape.strided]
    models = {
        "evo": patchslim.slim(host, "evo", keep_rate=0.5, **settings),
        "evo, per block": patchslim.slim(host, "evo", keep_rate=0.5, at=blocks, **settings),
    }
    if not pyramid:
        models["evo, no representative"] = patchslim.slim(
            host, "evo", keep_rate=0.5, representative=False
        )
        models["tome macs=0.65"] = patchslim.slim(host, "tome", macs=BUDGET)
        models["topk macs=0.65"] = patchslim.slim(host, "topk", macs=BUDGET)
    reports = []
    for batch in BATCHES:
        report = measure(models, batch=batch, repeats=repeats, dense=host, baseline=not pyramid)
        print(report.table(), "\n", flush=True)
        reports.append(report.to_json())
    return reports


def main() -> None:
    """Measures, times, and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", choices=("speed", "stock"), help="one part, beside the other's")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeepCut)
    warnings.simplefilter("ignore", UserWarning)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.only != "stock":
        hosts = ("deit_small_patch16_224", "evo_levit_256")
        results["speed"] = {name: timed(name, options.repeats) for name in hosts}
    if options.only != "speed":
        data = options.shared / "data"
        host = dense(data)
        images = load_test_images(host, data)
        report = measure(
            stock(host), images, batch=1, repeats=0, baseline=False, progress=print_now
        )
        print(report.table())
        results["stock"] = report.to_json()
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
