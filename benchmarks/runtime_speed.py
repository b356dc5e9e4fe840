"""What reductions gain on a runtime: exported models at 0.6 of the operations beside the dense one.

    python benchmarks/runtime_speed.py --shared ../shared --make    # exports what is not there yet
    python benchmarks/runtime_speed.py                              # times it; let nothing else run

Speed depends on shapes alone, so a host without weights in --shared has random ones. Conversion is
the speed-up over the dense model on the same runtime, times the share of operations. For int8,
`precision.py --folder runs/runtime_speed` exports the models for any number of images. Adds a row
for each host, target, precision, batch and method to benchmarks/results/runtime_speed.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from real_model import DEIT_TINY, load_deit_tiny, read_images

import patchslim
from patchslim.benchmarking.result import Benchmark, BenchmarkRow, Ratio
from patchslim.deployment.registry import find_target
from patchslim.errors import DeepCut, PatchslimError, Untrained
from patchslim.report.provenance import Provenance

RESULT = Path(__file__).parent / "results" / "runtime_speed.json"
BUDGET = 0.6
METHODS = "identity random patch_slimming topk evit evo tome similarity".split()


def main() -> None:
    """Exports the models, or times them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--folder", type=Path, default=Path("runs/runtime_speed"))
    parser.add_argument("--make", action="store_true", help="export, and time nothing")
    parser.add_argument("--host", default=DEIT_TINY)
    parser.add_argument("--target", choices=("onnx", "openvino"), default="openvino")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="fixed in the artefacts")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--eager", action="store_true", help="time the dense host in PyTorch, too")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    for warning in (DeepCut, Untrained):
        warnings.simplefilter("ignore", warning)
    kind = f"{options.host}-{options.target}-{options.precision}-{options.batch}"
    suffix = find_target(options.target).suffix
    paths = {name: options.folder / kind / f"{name}{suffix}" for name in options.only}
    if options.make:
        make(options, {name: path for name, path in paths.items() if not path.exists()})
        return
    there = {name: path for name, path in paths.items() if path.exists()}
    if "identity" not in there:
        sys.exit(f"{paths.get('identity', 'identity')} is not there: run with --make first.")
    files = [*there.values()]
    if options.eager:
        files.append(save_dense(options))
    found = patchslim.benchmark(files, batch=options.batch, rounds=options.rounds, threads=2)
    print(found.table())
    save(options, found)


def make(options: argparse.Namespace, paths: dict[str, Path]) -> None:
    """Exports the host, whole and slimmed to the budget by each method."""
    torch.manual_seed(0)
    if options.host == DEIT_TINY:
        host = load_deit_tiny(options.shared)
    else:
        host = timm.create_model(options.host).eval()
    images = read_images(host, options.shared, 16)
    for name, path in paths.items():
        budget: dict[str, Any] = {"keep": 1.0} if name == "identity" else {"macs": BUDGET}
        model = patchslim.slim(host, name, **budget)
        try:
            written = patchslim.export(
                model,
                path,
                to=options.target,
                precision=options.precision,
                batch=options.batch,
                images=images,
            )
        except PatchslimError as error:
            print(f"{name}: refused: {error}", flush=True)
        else:
            print(f"{name}: {written.check}", flush=True)


def save_dense(options: argparse.Namespace) -> Path:
    """Saves the host whole, as PyTorch runs it; with random weights, since only time counts."""
    path: Path = options.folder / f"{options.host}-eager"
    if not path.exists():
        host = timm.create_model(options.host).eval()
        patchslim.slim(host, "identity", keep=1.0).save(path)
    return path


def save(options: argparse.Namespace, found: Benchmark) -> None:
    """Puts the rows in the place of earlier ones of the same cell on the same processor."""
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text()) if RESULT.exists() else []
    key = {name: getattr(options, name) for name in ("host", "target", "precision", "batch")}
    host = timm.create_model(options.host)
    _, *size = host.default_cfg["input_size"]
    provenance = asdict(
        Provenance.now(
            host, batch=options.batch, image_size=(size[0], size[1]), images=options.batch, seed=0
        )
    )
    here = {**key, "processor": provenance["processor"]}
    rows = [
        row for row in rows if {**row, "processor": row["birth"]["processor"]} != {**row, **here}
    ]
    eager = [
        row for row in found.rows if row.runtime == "eager" and row.batch == options.batch
    ]  # which takes one image, too
    for row in found.rows:
        if row.runtime == "eager":
            continue
        fused = None if row.nodes is None else [row.nodes.fused, row.nodes.attention]
        rows.append(
            {
                **key,
                "method": row.method,
                "macs": row.macs / row.dense_macs,
                "step_ms": asdict(row.step),
                "speedup": None if row.speedup is None else asdict(row.speedup),
                "conversion": None if row.conversion is None else asdict(row.conversion),
                "attention_fused": fused,
                "over_eager": asdict(over(row, eager[0])) if eager else None,
                "rounds": options.rounds,
                "birth": provenance,
            }
        )
    RESULT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def over(row: BenchmarkRow, eager: BenchmarkRow) -> Ratio:
    """How many times as fast as the dense host in PyTorch, round by round."""
    pairs = zip(eager.seconds, row.seconds, strict=True)
    return Ratio.of([theirs / ours for theirs, ours in pairs], 0)


if __name__ == "__main__":
    main()
