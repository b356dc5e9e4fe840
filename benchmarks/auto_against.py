"""`auto` beside every single method at its defaults, at shares of the dense model's measured time.

    python benchmarks/auto_against.py --shared ../shared --threads 1
    python benchmarks/auto_against.py --shared ../shared --threads 1 --runtime openvino \
        --precision bfloat16 --shares 0.8,0.65,0.5

Each method that needs no training follows its own rule, at as many operations as take the share of
the dense time here: all are timed at six budgets (three on a runtime, where each is converted), and
what lies between is taken to go straight.
Then all are timed again, in turns, and judged. `auto` plans for the same shares. Half of the images
choose, and all are judged on the other half. Let nothing else run. A share that `auto` has planned
for is not planned again. Writes benchmarks/results/auto.json. The images are probably training
images of DeiT-Ti: read differences from dense, not accuracy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_model import load_deit_tiny
from torch import Tensor, nn
from train_deit_tiny import print_now

import patchslim
from patchslim.data.images import Images
from patchslim.errors import PatchslimError
from patchslim.measurement.latency import latency
from patchslim.measurement.sample import fill_batch
from patchslim.methods._registry import make_method, method_label
from patchslim.model.model import SlimModel
from patchslim.model.slim import untouched_model
from patchslim.planning.judging import Jury, read_halves
from patchslim.planning.method_search import plannable_methods
from patchslim.planning.runtimes import Call, Runtime, open_runtime
from patchslim.report.provenance import Provenance
from patchslim.report.row import Quartiles

RESULT = Path(__file__).parent / "results" / "auto.json"
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the operations, at which methods are timed first
CELL = ("runtime", "precision", "batch")


def main() -> None:
    """Measures the single methods, plans for each share, and writes the rows after each step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runtime", default="eager")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shares", default="0.9,0.8,0.7,0.6,0.5", help="of the dense time")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--limit", type=int, default=500, help="images")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    torch.set_num_threads(options.threads)
    host = load_deit_tiny(options.shared)
    sample = options.shared / "data" / "imagenet-sample-500.zip"
    images = list(Images.for_host(host, sample, limit=options.limit, batch=16))
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    cell = {name: getattr(options, name) for name in CELL}
    known = [row for row in rows if {name: row[name] for name in CELL} == cell]
    born = Provenance.now(
        host, batch=options.batch, image_size=(224, 224), images=options.limit // 2, seed=0
    )
    shares = [*map(float, options.shares.split(","))]

    def write(more: list[dict[str, Any]]) -> None:
        rows.extend({**cell, **row, "birth": asdict(born)} for row in more)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")

    if not any(row["name"] != "auto" for row in known):
        with open_runtime(
            options.runtime, options.precision, options.threads, options.batch, host
        ) as device:
            write(measure_singles(host, images, shares, device, options))
    for share in shares:
        if not any(row["name"] == "auto" and row["share"] == share for row in known):
            write([plan_auto(host, images, share, cell, options)])
            print_now(f"auto at {share}: {rows[-1]['method']}, KL {rows[-1]['kl']['value']:.4f}")


def measure_singles(
    host: nn.Module,
    images: Any,
    shares: list[float],
    device: Runtime,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Returns a row for each method at each share that it reaches."""
    untouched = untouched_model(host, None)
    chosen, reported = read_halves(images, untouched)
    batch = fill_batch(chosen, options.batch)
    methods = {method_label(each): each for each in plannable_methods(untouched)}
    methods["random"] = make_method("random", {})
    tried: dict[tuple[str, float], SlimModel] = {}
    for name, method in methods.items():
        for budget in BUDGETS[:: device.stride]:
            with contextlib.suppress(PatchslimError):
                tried[name, budget] = patchslim.slim(host, method, macs=budget)
    first = time_all(untouched, tried, batch, device, options.rounds)
    wanted: dict[tuple[str, float], SlimModel] = {}
    for name, method in methods.items():
        budgets = sorted(budget for of, budget in first if of == name)
        taken = [first[name, budget].median for budget in budgets]
        for share in shares:
            if not taken or taken[0] > share:
                continue  # not with the least operations that were tried
            budget = float(np.interp(share, [*taken, 1.0], [*budgets, 1.0]))
            wanted[name, share] = patchslim.slim(host, method, macs=budget)
    again = time_all(untouched, wanted, batch, device, options.rounds)
    jury, rows = Jury(untouched, reported), []
    for (name, share), model in wanted.items():
        print_now(f"judging {name} at {share}")
        verdict = jury.judge(model)
        rows.append(
            {
                "name": name,
                "share": share,
                "macs": model.macs().total / untouched.plan.dense_cost.total,
                "measured": asdict(again[name, share]),
                "kl": asdict(verdict.kl),
                "agreement": asdict(verdict.agreement),
            }
        )
    return rows


def time_all(
    untouched: SlimModel,
    models: Mapping[Any, SlimModel],
    batch: Tensor,
    device: Runtime,
    rounds: int,
) -> dict[Any, Quartiles]:
    """Times models in turns with the dense one: shares of its time.

    A model that the runtime cannot hold is left out.
    """
    calls: dict[Any, Call] = {"dense": device.dense(untouched)}
    for key, model in models.items():
        print_now(f"making {key}")
        with contextlib.suppress(PatchslimError):
            calls[key] = device.whole(model)
    taken = latency(calls, batch, rounds, 1, progress=print_now)
    dense = taken.pop("dense")
    return {
        key: Quartiles.of([each / by for each, by in zip(seconds, dense, strict=True)])
        for key, seconds in taken.items()
    }


def plan_auto(
    host: nn.Module, images: Any, share: float, cell: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Plans for a share of the dense time, and returns the row."""
    batch = fill_batch(torch.cat([each[0] for each in images[:2]]), options.batch)
    with open_runtime(
        options.runtime, options.precision, options.threads, options.batch, host
    ) as device:
        dense = device.dense(untouched_model(host, None))
        seconds = sorted(latency({"dense": dense}, batch, 9, 2)["dense"])[4]
    began = time.perf_counter()
    target = 1000 * share * seconds
    settings = {**cell, "threads": options.threads}
    planned = patchslim.plan(host, images, latency_ms=target, **settings)
    return {
        "name": "auto",
        "share": share,
        "macs": planned.model.macs().total / planned.model.plan.dense_cost.total,
        "search_seconds": time.perf_counter() - began,
        **planned.to_json(),
    }


if __name__ == "__main__":
    main()
