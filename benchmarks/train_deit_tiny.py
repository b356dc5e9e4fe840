"""What fine-tuning wins back: DeiT-Ti at one budget, its dense self as the teacher, no labels.

    python benchmarks/train_deit_tiny.py --shared ../shared --runs runs/deit-tiny

Trains each method on the 20,000 images of Tiny-ImageNet in `--shared`, upsampled to 224 pixels,
and measures it on 500 other images beside its untrained self and the dense model. The same command
resumes a run that was stopped. Writes benchmarks/results/trained.json. The
500 images are probably training images of the model: read differences from dense, not accuracy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

import patchslim
from patchslim.data.images import Images
from patchslim.data.source import Batch
from patchslim.errors import DeepCut, Untrained
from patchslim.measurement.measure import measure
from patchslim.methods._learned import is_trainable
from patchslim.model.model import SlimModel
from patchslim.runs.log import read_log
from patchslim.training.config import TrainConfig
from patchslim.training.train import train

RESULT = Path(__file__).parent / "results" / "trained.json"
OWN_LR = 1e-3  # of layers that a method adds, as its authors set it
HALF_CROP = 0.35  # the smallest share of a picture that is trained on with --half
METHODS = "evit,tome,topk,dynamicvit"


class Mosaics(Images):
    """Small pictures: three in ten alone, the others as mosaics of 2x2 or 3x3 that are sharper."""

    def load_image(self, place: int) -> Image.Image:
        """Loads the picture at an index, or a mosaic that begins with it."""
        side = (2, 3, 2, 3, 2, 3, 2, 1, 1, 1)[place % 10]
        first: Image.Image = super().load_image(place)
        if side == 1:
            return first
        width, height = first.size
        whole = Image.new("RGB", (width * side, height * side))
        for number in range(side * side):
            # A prime step, so that the pictures are of different classes.
            each = super().load_image((place + number * 7919) % self.count)
            at = (number % side * width, number // side * height)
            whole.paste(each.resize((width, height)), at)
        return whole


class HalfReal(Mosaics):
    """Pictures as in `Mosaics`, and between them every second one of the 500 real images."""

    real: Images

    def load_image(self, place: int) -> Image.Image:
        """Loads a real image at an odd index, and a small one or a mosaic at an even one."""
        if place % 2 == 0:
            return super().load_image(place)
        picture: Image.Image = self.real.load_image(place // 2 * 2 % self.real.count)
        return picture


def slimmed(host: nn.Module, method: str, budget: float) -> SlimModel:
    """Slims the host to the budget, which includes the cost of a method's own layers."""
    model = patchslim.slim(host, method, macs=budget)
    if is_trainable(model.method):
        own = model.macs().choosing / model.dense_macs().total
        model = patchslim.slim(host, method, macs=budget - own)
    return model


def make_config(
    plain: SlimModel,
    *,
    epochs: float,
    batch: int,
    lr: float,
    tokens: float,
    wise: float = 1.0,
    crop: float = 1.0,
) -> TrainConfig:
    """Makes a config: the dense model as teacher, no labels, one rate for every method's host."""
    own = plain.method.training_defaults
    given = {
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "labels": 0.0,
        "crop": crop,
        "distil_weight": 1.0,
        "tokens": max(tokens, own.get("tokens", 0.0)),
        "wise": wise,
        "precision": "bfloat16",
    }
    if "host_lr" in own:
        # The host learns at the same rate in every method, and the method's own layers at theirs.
        given |= {"lr": OWN_LR, "host_lr": lr / OWN_LR}
    return TrainConfig.of(own, given)


def load_training_images(host: nn.Module, data: Path) -> Images:
    """Opens Tiny-ImageNet's pictures, whole, and mosaics of them."""
    small = data / "tiny-imagenet-train-20k.zip"
    prepared = replace(Images.for_host(host, small).prepared, crop_pct=1.0)
    mosaics: Images = Mosaics.for_host(host, small, prepared=prepared)
    return mosaics


def load_half_real_images(host: nn.Module, data: Path) -> Images:
    """Opens Tiny-ImageNet's pictures, and between them every second one of the 500 images."""
    real = load_test_images(host, data)
    small = data / "tiny-imagenet-train-20k.zip"
    both: Any = HalfReal.for_host(host, small, prepared=real.prepared)
    both.real = real
    mixed: Images = both
    return mixed


def load_test_images(host: nn.Module, data: Path) -> Images:
    """Opens the 500 images, on which nothing is trained but with --half."""
    return Images.for_host(
        host, data / "imagenet-sample-500.zip", classes=data / "imagenet-classes.txt", batch=50
    )


def other_half(images: Images) -> list[Batch]:
    """Reads those of the 500 images that `HalfReal` does not train on."""
    batches = list(images)
    pixels = torch.cat([each for each, _ in batches])[1::2]
    labels = torch.cat([each for _, each in batches if each is not None])[1::2]
    return list(zip(pixels.split(50), labels.split(50), strict=True))


def dense(data: Path) -> nn.Module:
    """Loads DeiT-Ti with its ImageNet weights."""
    host: nn.Module = timm.create_model("deit_tiny_patch16_224").eval()
    timm.models.load_checkpoint(host, str(data / "deit_tiny_patch16_224.safetensors"))
    return host


def main() -> None:
    """Trains and measures, and writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--runs", type=Path, default=Path("runs/deit-tiny"))
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budget", type=float, default=0.65)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--tokens", type=float, default=0.0, help="weight of the final tokens")
    parser.add_argument("--wise", type=float, default=1.0, help="how far the host goes")
    parser.add_argument("--whole", action="store_true", help="whole pictures, and mosaics of them")
    parser.add_argument(
        "--half",
        action="store_true",
        help="also train on random crops of 250 of the 500 images, and measure on the others",
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for remark in (DeepCut, Untrained, UserWarning):
        warnings.simplefilter("ignore", remark)
    data = options.shared / "data"
    host = dense(data)
    images = Images.for_host(host, data / "tiny-imagenet-train-20k.zip")
    if options.whole:
        images = load_training_images(host, data)
    whole = load_test_images(host, data)
    test_images: Images | list[Batch] = whole
    if options.half:
        images, test_images = load_half_real_images(host, data), other_half(whole)
    models: dict[str, SlimModel] = {}
    courses = {}
    for method in options.methods.split(","):
        plain = slimmed(host, method, options.budget)
        config = make_config(
            plain,
            epochs=options.epochs,
            batch=options.batch,
            lr=options.lr,
            tokens=options.tokens,
            wise=options.wise,
            crop=HALF_CROP if options.half else 1.0,
        )
        out = options.runs / method
        print(method, flush=True)
        trained = train(plain, images, config, out=out, resume=True, progress=print_now)
        if not is_trainable(plain.method):
            models[method] = plain
        models[f"{method} trained"] = trained.model
        rates = [row["images_per_second"] for row in read_log(out / "log.csv")]
        courses[method] = {
            "course": config.to_json(),
            "images": images.count,
            "steps": trained.step,
            "images_per_second": statistics.median(rate for rate in rates if rate),
        }
    report = measure(models, test_images, dense=host, batch=1, repeats=0)
    print(report.table())
    options.out.write_text(
        json.dumps({"report": report.to_json(), "courses": courses}, indent=1) + "\n",
        encoding="utf-8",
    )


def print_now(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
