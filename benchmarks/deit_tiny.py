"""Accuracy of training-free reduction on real weights: DeiT-Ti on 500 real images.

    python benchmarks/deit_tiny.py --shared ../shared

Writes benchmarks/results/deit_tiny.json, from which the tables in README and docs are made. The
images are probably training images of the model: read differences from dense, not accuracy.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import timm
import torch

import patchslim
from patchslim.data.images import Images
from patchslim.errors import DeepCut, ShortSchedule
from patchslim.hosts._preprocessing import find_preprocessing
from patchslim.measurement.measure import measure
from patchslim.methods.evit import EViT
from patchslim.methods.random import Random
from patchslim.model.model import SlimModel
from patchslim.schedules.schedule import Constant, Rate

RESULT = Path(__file__).parent / "results" / "deit_tiny.json"
SEEDS = 5


def models(host: torch.nn.Module) -> dict[str, SlimModel]:
    """Makes the model of every setting; random once a seed, since its draw holds for all images."""
    settings: dict[str, SlimModel] = {}
    for r in (5, 8, 10, 13, 16):
        settings[f"tome r={r}"] = patchslim.slim(host, "tome", Constant(r))
    for rate in (0.9, 0.7, 0.5):
        rule = Rate(rate, (3, 6, 9))
        settings[f"evit {rate} fused"] = patchslim.slim(host, "evit", rule)
        settings[f"evit {rate} not fused"] = patchslim.slim(host, EViT(fuse=False), rule)
        settings[f"topk {rate}"] = patchslim.slim(host, "topk", rule)
        for seed in range(SEEDS):
            settings[f"random {rate} seed {seed}"] = patchslim.slim(host, Random(seed=seed), rule)
    for share in (0.75, 0.65):
        for name in ("tome", "evit", "topk"):
            exact = patchslim.slim(host, name, macs=share)
            settings[f"{name} macs={share}, exact tail"] = exact
    return settings


def main() -> None:
    """Measures all settings in one pass over the images and writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--limit", type=int, help="fewer images, for a try")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeepCut)
    warnings.simplefilter("ignore", ShortSchedule)
    data = options.shared / "data"
    host = timm.create_model("deit_tiny_patch16_224").eval()
    timm.models.load_checkpoint(host, str(data / "deit_tiny_patch16_224.safetensors"))
    adapter = patchslim.find_adapter(host)
    images = Images.for_host(
        host,
        data / "imagenet-sample-500.zip",
        prepared=find_preprocessing(host, adapter),
        classes=data / "imagenet-classes.txt",
        limit=options.limit,
        batch=50,
    )
    report = measure(
        models(host),
        images,
        batch=1,
        repeats=0,
        baseline=False,
        progress=lambda line: print(line, end="\r", flush=True),
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report.save(options.out)
    print(report.table())


if __name__ == "__main__":
    main()
