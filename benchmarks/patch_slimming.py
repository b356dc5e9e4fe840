"""Patch Slimming on DeiT-Ti at one budget, calibrated, tuned and fine-tuned, beside four methods.

    python benchmarks/patch_slimming.py --shared ../shared --budget 0.55 --epochs 0.5

Positions are chosen, blocks tuned and models fine-tuned on the 20,000 images of Tiny-ImageNet in
`--shared`, enlarged and as mosaics, without labels; all is measured on 500 other images, in one run
with the dense model, `random` at each method's counts, and ToMe, EViT, Top-K, DynamicViT untrained
and fine-tuned on the same images for as many steps. The same command resumes what was stopped.
Adds the budget to benchmarks/results/patch_slimming.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from train_deit_tiny import (
    dense,
    load_test_images,
    load_training_images,
    make_config,
    print_now,
    slimmed,
)

from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.data.images import Images
from patchslim.errors import DeepCut, Untrained
from patchslim.measurement.measure import measure
from patchslim.methods._learned import is_trainable
from patchslim.model.model import SlimModel
from patchslim.schedules.schedule import Schedule
from patchslim.training.train import train

RESULT = Path(__file__).parent / "results" / "patch_slimming.json"
OTHERS = "tome,evit,topk"
IMAGES = 256  # to calibrate on
TUNED = "patch_slimming fast,patch_slimming_dynamic"


def main() -> None:
    """Calibrates, trains and measures, and adds to the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--runs", type=Path, default=Path("runs/patch-slimming"))
    parser.add_argument("--others", default=OTHERS)
    parser.add_argument("--tuned", default=TUNED, help="calibrated models to fine-tune")
    parser.add_argument("--budget", type=float, default=0.55)
    parser.add_argument("--epochs", type=float, default=0.5, help="of fine-tuning; 0 for none")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for remark in (DeepCut, Untrained, UserWarning):
        warnings.simplefilter("ignore", remark)
    host = dense(options.shared / "data")
    images = load_training_images(host, options.shared / "data")
    runs = options.runs / f"{options.budget:g}"
    models: dict[str, SlimModel] = {}
    for method in filter(None, options.others.split(",")):
        plain = slimmed(host, method, options.budget)
        if not is_trainable(plain.method):
            models[method] = plain
        if options.epochs:
            models[f"{method} trained"] = tuned(plain, host, images, options.epochs, runs / method)
    records: dict[str, Any] = {}
    for name, method, search in (
        ("patch_slimming free", "patch_slimming", PatchSlimmingConfig(mode="free", images=IMAGES)),
        ("patch_slimming fast", "patch_slimming", PatchSlimmingConfig(mode="fast", images=IMAGES)),
        (
            "patch_slimming_dynamic",
            "patch_slimming_dynamic",
            PatchSlimmingConfig(mode="free", images=IMAGES),
        ),
    ):
        print_now(name)
        first = records.get("patch_slimming free")
        goal: dict[str, Any] = {"macs": options.budget}
        if first is not None:  # the same counts for all of them
            goal = {"schedule": Schedule.from_json(first["schedule"])}
        result = calibrate(
            host,
            images,
            method,
            **goal,
            config=search,
            out=runs / "calibrated" / name.replace(" ", "-"),
            resume=True,
            progress=print_now,
        )
        models[name], records[name] = result.model, result.record
    for name in options.tuned.split(",") if options.epochs else ():
        out = runs / f"{name.replace(' ', '-')}-trained"
        models[f"{name} trained"] = tuned(models[name], host, images, options.epochs, out)
    test_images = load_test_images(host, options.shared / "data")
    report = measure(models, test_images, dense=host, batch=1, repeats=0)
    print_now(report.table())
    whole = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    whole[f"{options.budget:g}"] = {
        "report": report.to_json(),
        "calibrations": records,
        "epochs": options.epochs,
        "images": images.count,
    }
    options.out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def tuned(plain: SlimModel, host: nn.Module, images: Images, epochs: float, out: Path) -> SlimModel:
    """Fine-tunes the model to answer as the dense one does."""
    print_now(f"fine-tuning {out.name}")
    config = make_config(plain, epochs=epochs, batch=32, lr=5e-5, tokens=1.0)
    done = train(plain, images, config, out=out, teacher=host, resume=True, progress=print_now)
    return done.model


if __name__ == "__main__":
    main()
