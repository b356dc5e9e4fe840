"""Learned methods beside fine-tuned ones, after as many steps on the same images.

    OMP_NUM_THREADS=1 python benchmarks/train_learned.py --runs runs/learned

Trains each method on the embedded example at one budget, which includes what a method's own layers
cost: the untouched model is the teacher, and labels are not used. Measures all of them on scenes
with other digits, beside their untrained selves and random. The same command resumes a run that was
stopped. Writes benchmarks/results/learned.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor
from train_deit_tiny import OWN_LR, print_now, slimmed

from patchslim.errors import DeepCut, Untrained
from patchslim.example import digits
from patchslim.measurement.measure import measure
from patchslim.methods._learned import is_trainable
from patchslim.model.model import SlimModel
from patchslim.training.config import TrainConfig
from patchslim.training.train import train

RESULT = Path(__file__).parent / "results" / "learned.json"
METHODS = "tome,topk,similarity,dynamicvit,spvit,dtem,patchmerger,tokenlearner,sinkhorn,sit"


def batches(split: digits.Split, count: int) -> list[tuple[Tensor, Tensor]]:
    """Draws scenes in batches of 50."""
    scenes = digits.scenes(split, count)
    images, labels = digits.normalise(scenes.images), torch.from_numpy(scenes.labels)
    return list(zip(images.split(50), labels.split(50), strict=True))


def make_config(plain: SlimModel, steps: int, lr: float, seed: int) -> TrainConfig:
    """Makes a config: one rate for every method's host, and one for layers that a method adds."""
    given: dict[str, object] = {
        "steps": steps,
        "batch": 32,
        "lr": lr,
        "mixup": 0.8,
        "labels": 0.0,
        "distil_weight": 1.0,
        "checkpoint": 20,
        "seed": seed,
        "workers": 0,
    }
    if is_trainable(plain.method):
        given |= {"lr": OWN_LR, "host_lr": lr / OWN_LR}
    return TrainConfig.of(plain.method.training_defaults, given)


def main() -> None:
    """Trains and measures, and writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/learned"))
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budget", type=float, default=0.4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-4, help="of the host")
    parser.add_argument("--scenes", type=int, default=300, help="to measure on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for remark in (DeepCut, Untrained, UserWarning):
        warnings.simplefilter("ignore", remark)
    host, images = digits.host(), batches("train", 32 * options.steps)
    models: dict[str, SlimModel] = {}
    courses = {}
    for method in options.methods.split(","):
        plain = slimmed(host, method, options.budget)
        config = make_config(plain, options.steps, options.lr, options.seed)
        print(method, flush=True)
        out = options.runs / method
        trained = train(plain, images, config, out=out, resume=True, progress=print_now)
        models |= {method: plain, f"{method} trained": trained.model}
        courses[method] = {
            "course": config.to_json(),
            "images": 32 * options.steps,
            "steps": trained.step,
        }
    report = measure(models, batches("test", options.scenes), dense=host, batch=1, repeats=0)
    print(report.table())
    text = json.dumps({"report": report.to_json(), "courses": courses}, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
