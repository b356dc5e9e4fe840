"""Plans at shares of a model's dense time: what was predicted beside what was measured.

    python benchmarks/plan.py --shared ../shared                       # eager, batch 1 and 8
    python benchmarks/plan.py --shared ../shared --runtime openvino --precision bfloat16
    python benchmarks/plan.py --shared ../shared --later                # the tables of an hour ago
    python benchmarks/plan.py --shared ../shared --host deit_small_patch16_224 --method similarity

Let nothing else run. Targets are shares of the dense time, which is measured first. Half of the
images choose, the other half judges. Beside each plan stands the method's own rule at the same
predicted time. Tables of latencies come from the cache, so that a later run judges tables of
an earlier hour. A row that is there already is replaced, in benchmarks/results/plan.json.
The images are probably training images of DeiT-Ti: read differences from dense, not accuracy. Other
hosts have random weights: only their times mean anything.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from real_model import DEIT_TINY, load_deit_tiny
from torch import nn
from train_deit_tiny import print_now

import patchslim
from patchslim.data.images import Images
from patchslim.errors import PatchslimError
from patchslim.report.provenance import Provenance

RESULT = Path(__file__).parent / "results" / "plan.json"
KEY = ("host", "runtime", "precision", "batch", "asked", "method_asked", "later")


def main() -> None:
    """Plans every cell, and writes each row before the next cell begins."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--host", default=DEIT_TINY)
    parser.add_argument("--runtime", default="eager")
    parser.add_argument("--precision")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--targets", default="0.8,0.65,0.5")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--limit", type=int, default=500, help="images")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the blocks of a method")
    parser.add_argument("--fresh", action="store_true", help="time blocks anew")
    parser.add_argument("--later", action="store_true", help="says so in the rows")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    host = make_host(options)
    sample = options.shared / "data" / "imagenet-sample-500.zip"
    read = list(Images.for_host(host, sample, limit=options.limit, batch=16))
    for batch in map(int, options.batches.split(",")):
        dense_ms = time_dense(host, read, batch, options)
        for share in map(float, options.targets.split(",")):
            row = run_cell(host, read, batch, share, dense_ms, options)
            save_row(options.out, row)
            print_now(describe(row))


def make_host(options: argparse.Namespace) -> nn.Module:
    """Makes the host; PyTorch runs it in the precision that it has."""
    torch.manual_seed(0)
    if options.host == DEIT_TINY:
        host: nn.Module = load_deit_tiny(options.shared)
    else:
        host = timm.create_model(options.host).eval()
    if options.runtime == "eager" and options.precision:
        host = host.to(getattr(torch, options.precision))
    return host


def time_dense(host: nn.Module, images: Any, batch: int, options: argparse.Namespace) -> float:
    """Returns milliseconds of the dense model: a plan with time to spare measures them."""
    spare = {"latency_ms": 1e9, "batch": batch, "seconds": options.seconds}
    few = [images[0]]
    on = {"runtime": options.runtime, "precision": options.precision, "fresh": options.fresh}
    return patchslim.plan(host, few, "topk", **spare, **on).dense_ms


def run_cell(
    host: nn.Module,
    images: Any,
    batch: int,
    share: float,
    dense_ms: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Plans for a share of the dense time, and returns the row."""
    began = time.perf_counter()
    cell = {
        "host": options.host,
        "later": options.later,
        "runtime": options.runtime,
        "precision": options.precision or "float32",
        "batch": batch,
        "asked": share,
        "method_asked": options.method,
        "target_ms": share * dense_ms,
    }
    try:
        planned = patchslim.plan(
            host,
            images,
            options.method,
            latency_ms=share * dense_ms,
            batch=batch,
            runtime=options.runtime,
            precision=options.precision,
            seconds=options.seconds,
        )
        cell |= planned.to_json()
    except PatchslimError as error:
        cell |= {"refused": str(error)}
    size = (images[0][0].shape[2], images[0][0].shape[3])
    born = Provenance.now(host, batch=batch, image_size=size, images=options.limit // 2, seed=0)
    return {**cell, "search_seconds": time.perf_counter() - began, "birth": asdict(born)}


def save_row(out: Path, row: dict[str, Any]) -> None:
    """Adds a row to the results, or replaces it."""
    rows = json.loads(out.read_text()) if out.exists() else []
    rows = [each for each in rows if any(each[name] != row[name] for name in KEY)]
    out.write_text(json.dumps([*rows, row], indent=1) + "\n")


def describe(row: dict[str, Any]) -> str:
    """Writes a row as one line of text."""
    cell = "{host} {runtime} {precision} batch {batch}: asked {asked:.2f}".format(**row)
    if "refused" in row:
        return f"{cell}: refused: {row['refused'][:150]}"
    predicted = "-" if row["predicted"] is None else f"{row['predicted']:.3f}"
    took = "{latency_ms:.2f} of {target_ms:.2f} ms, {search_seconds:.0f} s to find".format(**row)
    return (
        f"{cell}, {row['method']}, predicted {predicted}, "
        f"measured {row['measured']['median']:.3f}, KL {row['kl']['value']:.4f}, {took}"
    )


if __name__ == "__main__":
    main()
