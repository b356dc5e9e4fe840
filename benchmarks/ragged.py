"""What different numbers for each image gain: packed, padded, and fixed at the same cost.

    python benchmarks/ragged.py --shared ../shared --repeats 9

Real images, batches of 8 and 32, all models interleaved in one run, eager, two threads. Of each
adaptive method: packed behind one another, and padded and masked, as most public code runs it; and
the fixed form at the mean cost of the very images that are timed. DeiT-Ti has its real weights, on
which its threshold is found for 0.65 of the operations; DeiT-S has random ones, which decide
nothing about time, and a threshold at which images differ. Conversion is speed-up times the mean
share of operations. `similarity` also decides in five blocks instead of eight, which is faster and
keeps a little less of the answer: said for all 500 images. Writes its rows to
benchmarks/results/ragged_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from train_deit_tiny import dense, load_test_images, print_now

import patchslim
from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.data.images import Images
from patchslim.errors import DeepCut, ImpossibleBudget
from patchslim.measurement.latency import latency
from patchslim.measurement.measure import measure
from patchslim.methods import Method
from patchslim.methods.ats import ATS
from patchslim.methods.similarity import Similarity
from patchslim.methods.tome import ToMe
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles
from patchslim.schedules.schedule import Rate, Schedule

RESULT = Path(__file__).parent / "results" / "ragged_cpu.json"
BUDGET = 0.65
BATCHES = (8, 32)
METHODS: dict[str, tuple[Method, Schedule | None]] = {
    "similarity": (Similarity(threshold=1e-4), None),
    "similarity in 5 blocks": (Similarity(threshold=1e-4), Rate(1.0, at=(3, 4, 5, 7, 9))),
    "tome": (ToMe(threshold=0.9), None),
    "ats": (ATS(), None),
}
FIXED = ("similarity", "tome")  # which have a form of the same number in every image
WARMUP = 1


def main() -> None:
    """Times all models at all batches and writes the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for remark in (DeepCut, UserWarning):
        warnings.simplefilter("ignore", remark)
    torch.set_num_threads(2)
    tiny = dense(options.shared / "data")
    torch.manual_seed(0)
    hosts = {"DeiT-Ti": tiny, "DeiT-S": timm.create_model("deit_small_patch16_224").eval()}
    images = torch.cat([batch for batch, _ in load_test_images(tiny, options.shared / "data")])
    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for title, host in hosts.items():
        models = adaptive(host, images[::8])
        if host is tiny:
            answers = answered(models, tiny, load_test_images(tiny, options.shared / "data"))
        for batch in BATCHES:
            print_now(f"{title}, batch {batch}")
            some = images[:: len(images) // batch][:batch].contiguous()
            rows += timed(title, host, models, some, options.repeats)
    provenance = Provenance.now(
        tiny, batch=max(BATCHES), image_size=(224, 224), images=len(images), seed=0
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "birth": asdict(provenance),
        "repeats": options.repeats,
        "rows": rows,
        "answers": answers,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['host']:8} {row['batch']:3} {row['name']:20} {row['share']:.3f} of operations, "
            f"speed-up {row['speedup']['median']:.2f}, conversion {row['conversion']:.2f}"
        )


def adaptive(host: nn.Module, images: Tensor) -> dict[str, SlimModel]:
    """Slims by the adaptive methods to the budget on average, as near as they come to it."""
    made: dict[str, SlimModel] = {}
    for name, (method, schedule) in METHODS.items():
        goal: dict[str, Any] = {"macs": BUDGET, "schedule": schedule}
        search = PatchSlimmingConfig(images=len(images))
        try:
            made[name] = calibrate(
                host, [(images, None)], method, **goal, config=search, progress=print_now
            ).model
        except ImpossibleBudget as error:
            print_now(f"{name} is missing: {error}")
    return made


def answered(models: dict[str, SlimModel], host: nn.Module, images: Images) -> list[dict[str, Any]]:
    """Measures what the thresholds cost and change on all images."""
    report = measure(models, images, dense=host, batch=1, repeats=0, progress=print_now)
    print(report.table())
    return [
        {"name": row.name, "share": row.spent.mean, "kl": row.kl.value}
        for row in report.rows
        if row.name in models and row.spent and row.kl
    ]


def timed(
    title: str, host: nn.Module, models: dict[str, SlimModel], images: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """Makes one row for each form of each method, interleaved with the dense model."""
    calls: dict[str, nn.Module] = {"dense": host}
    shares = {"dense": 1.0}
    for name, model in models.items():
        whole = model.dense_macs().total
        share = sum(cost.total for cost in model.macs_of(images)) / len(images) / whole
        padded = SlimModel(
            host,
            plan_schedule(host, model.plan.adapter, model.method, model.schedule, model.plan.tail),
        )
        padded.packs = False
        padded.eval()
        forms: dict[str, nn.Module] = {f"{name}, packed": model, f"{name}, padded": padded}
        if name in FIXED:
            forms[f"{name}, fixed"] = patchslim.slim(host, name, macs=share)
        calls |= forms
        shares |= dict.fromkeys(forms, share)
    seconds = latency(calls, images, repeats, WARMUP, progress=print_now)
    rows = []
    for name, each in seconds.items():
        speedup = Quartiles.of([one / two for one, two in zip(seconds["dense"], each, strict=True)])
        row = {"host": title, "batch": len(images), "name": name, "share": shares[name]}
        milliseconds = Quartiles.of([1000 * second / len(images) for second in each])
        row |= {"ms": asdict(milliseconds), "speedup": asdict(speedup)}
        rows.append(row | {"conversion": speedup.median * shares[name]})
    return rows


if __name__ == "__main__":
    main()
