"""The similarity family on DeiT-Ti, training-free, fixed and by threshold, beside other methods.

    python benchmarks/similarity.py --shared ../shared
    python benchmarks/similarity.py --shared ../shared --deep

Every way of grouping at five budgets on 500 real images, in one pass over them a budget. Thresholds
are found on 128 other images (Tiny-ImageNet, enlarged and as mosaics, without labels), so that what
the 500 cost on average is measured, not set. A budget that is in the results already is not run
again. Adds to benchmarks/results/similarity.json. With `--deep`, far below a half: the default,
beside other methods and beside itself begun at a quarter of the depth, to similarity_deep.json. The
images are probably training images of the model: read differences from dense, not accuracy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from train_deit_tiny import dense, load_test_images, load_training_images, print_now

import patchslim
from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.data.images import Images
from patchslim.errors import BadSetting, DeepCut, ImpossibleBudget, ShortSchedule
from patchslim.measurement.measure import measure
from patchslim.methods import Method
from patchslim.methods.ats import ATS
from patchslim.methods.random import Random
from patchslim.methods.similarity import Similarity
from patchslim.methods.tome import ToMe
from patchslim.model.model import SlimModel
from patchslim.schedules.blocks import later_blocks

RESULT = Path(__file__).parent / "results" / "similarity.json"
DEEP = RESULT.with_name("similarity_deep.json")
BUDGETS = "0.87,0.75,0.65,0.58,0.5"
CUTS = "0.45,0.4,0.35"
IMAGES = 128  # on which thresholds are found
SEEDS = 3
COSINE: dict[str, Any] = {"measure": "cosine", "on": "keys"}
FIXED: dict[str, dict[str, Any]] = {
    "similarity (default: ward)": {},
    "ward, plain mean": {"survivor": "mean"},
    "ward, of keys": {"on": "keys"},
    "ward, weighed by attention received": {"weight": "received"},
    "ward, weighed by size": {"weight": "size"},
    "ward, heaviest alone": {"survivor": "alone"},
    "nearest": {"group": "nearest", **COSINE},
    "bipartite": {"group": "bipartite", **COSINE},
    "average linkage": {"group": "average", **COSINE},
    "density peaks": {"group": "density", "on": "keys"},
    "k-medoids": {"group": "medoids", "survivor": "medoid"},
    "iterative de-duplication": {"group": "iterative", **COSINE},
    "redundancy": {"group": "redundancy", **COSINE},
}
FIRST: dict[str, dict[str, Any]] = {
    "preset paper, before block 0": {"preset": "paper"},
    "nearest, before block 0": {"group": "nearest", "measure": "cosine", "on": "embedding"},
}
THRESHOLDS: dict[str, Method] = {
    "similarity, threshold": Similarity(threshold=1e-4),
    "leaders, threshold": Similarity(group="leader", threshold=0.9, floor=0.0, **COSINE),
    "components, threshold": Similarity(group="components", threshold=0.9, floor=0.0, **COSINE),
    "average linkage, threshold": Similarity(group="average", threshold=0.9, **COSINE),
    "tome, threshold": ToMe(threshold=0.9),
    "ats": ATS(),
}


def main() -> None:
    """Measures every budget that is not there yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--budgets")
    parser.add_argument("--deep", action="store_true", help="far below a half, a few rows")
    parser.add_argument("--limit", type=int, help="fewer images, for a try")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.out = options.out or (DEEP if options.deep else RESULT)
    options.budgets = options.budgets or (CUTS if options.deep else BUDGETS)
    for remark in (DeepCut, ShortSchedule, UserWarning):
        warnings.simplefilter("ignore", remark)
    data = options.shared / "data"
    host = dense(data)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for budget in map(float, options.budgets.split(",")):
        if f"{budget:g}" in results:
            continue
        if options.deep:
            models = deep(host, budget)
        else:
            models = fixed(host, budget) | adaptive(host, load_training_images(host, data), budget)
        images = load_test_images(host, data)
        if options.limit is not None:
            images = dataclasses.replace(images, limit=options.limit)
        report = measure(models, images, batch=1, repeats=0, baseline=False, progress=print_now)
        results[f"{budget:g}"] = report.to_json()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(report.table())


def fixed(host: nn.Module, budget: float) -> dict[str, SlimModel]:
    """Slims by all methods that keep the same number of patches in every image."""
    made = {name: patchslim.slim(host, name, macs=budget) for name in ("tome", "evit", "topk")}
    for name, settings in FIXED.items():
        made[name] = patchslim.slim(host, Similarity(**settings), macs=budget)
    places = made["similarity (default: ward)"].plan.decision_blocks
    for seed in range(SEEDS):
        lots = patchslim.slim(host, Random(seed=seed), macs=budget, at=places)
        made[f"random, seed {seed}"] = lots
    for name, settings in FIRST.items():
        made[name] = patchslim.slim(host, Similarity(**settings), macs=budget, at=(0,))
    return made


def deep(host: nn.Module, budget: float) -> dict[str, SlimModel]:
    """Slims by the default method, beginning earlier, and as it would be otherwise."""
    made = {
        name: patchslim.slim(host, name, macs=budget)
        for name in ("tome", "evit", "topk", "similarity")
    }
    late = later_blocks(made["tome"].plan.shape.depth)
    made["similarity, from a quarter of the depth"] = patchslim.slim(
        host, "similarity", macs=budget, at=late
    )
    places = made["similarity"].plan.decision_blocks
    for seed in range(SEEDS):
        lots = patchslim.slim(host, Random(seed=seed), macs=budget, at=places)
        made[f"random, seed {seed}"] = lots
    return made


def adaptive(host: nn.Module, images: Images, budget: float) -> dict[str, SlimModel]:
    """Slims by all methods that let images keep different numbers, to the budget on average."""
    made: dict[str, SlimModel] = {}
    for name, method in THRESHOLDS.items():
        print_now(name)
        try:
            search = PatchSlimmingConfig(images=IMAGES)
            made[name] = calibrate(
                host, images, method, macs=budget, config=search, progress=print_now
            ).model
        except (ImpossibleBudget, BadSetting) as error:
            print_now(f"{name} is missing: {error}")
    return made


if __name__ == "__main__":
    main()
