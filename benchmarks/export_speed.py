"""What a reduction gains in a runtime: exported models beside the dense one, DeiT-Ti real weights.

    python benchmarks/export_speed.py --shared ../shared --make     # exports what is not there yet
    python benchmarks/export_speed.py --shared ../shared            # times it; let nothing else run

For each model: bytes, how much of it the runtime delegates, how far its answers are off, and its
time beside that of the dense model in the same runtime, round by round. Writes
benchmarks/results/export_speed.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
from real_model import DEIT_TINY, load_deit_tiny
from torch import nn

import patchslim
from patchslim.deployment.registry import find_target, target_names
from patchslim.errors import DeepCut
from patchslim.measurement.latency import latency
from patchslim.report.provenance import Provenance

RESULT = Path(__file__).parent / "results" / "export_speed.json"
BUDGET = 0.6
METHODS = ("dense", "topk", "similarity")


def main() -> None:
    """Exports the models or times them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--folder", type=Path, default=Path("runs/export_speed"))
    parser.add_argument("--make", action="store_true", help="export, and time nothing")
    parser.add_argument("--target", choices=target_names(), default="executorch")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    suffix = find_target(options.target).suffix
    paths = {name: options.folder / f"{name}-{options.batch}{suffix}" for name in METHODS}
    if options.make:
        host = load_deit_tiny(options.shared)
        for name, path in paths.items():
            if not path.exists():
                print(make(host, name, path, options.target, options.batch), flush=True)
        return
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
        sys.exit(f"{', '.join(missing)} not there: run with --make first.")
    rows = time_models(paths, options.batch, options.repeats)
    for row in rows:
        print(json.dumps(row))
    host = timm.create_model(DEIT_TINY)
    provenance = Provenance.now(
        host, batch=options.batch, image_size=(224, 224), images=options.batch, seed=0
    )
    told = {
        "target": options.target,
        "budget": BUDGET,
        "repeats": options.repeats,
        "rows": rows,
        "birth": asdict(provenance),
    }
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def make(host: nn.Module, name: str, path: Path, target: str, batch: int) -> str:
    """Exports the host whole, or slimmed to the budget; says what was found."""
    warnings.simplefilter("ignore", DeepCut)
    if name == "dense":
        model = patchslim.slim(host, "identity", keep=1.0)
    else:
        model = patchslim.slim(host, name, macs=BUDGET)
    written = patchslim.export(model, path, to=target, batch=batch)
    return f"{name}: {written.check}, {written.size} bytes, {written.card.get('delegated')}"


def time_models(paths: dict[str, Path], batch: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each exported model, with its time beside that of the dense one."""
    models = {name: patchslim.load(path) for name, path in paths.items()}
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    seconds = latency(models, images, repeats, warmup=10)
    rows = []
    for name, model in models.items():
        ratios = [d / own for d, own in zip(seconds["dense"], seconds[name], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        rows.append(
            {
                "model": name,
                "macs": model.card["macs"] / model.card["dense_macs"],
                "tokens": model.card["tokens"],
                "bytes": model.size,
                "delegated": model.card.get("delegated"),
                "largest_difference": model.card["checked"]["largest_difference"],
                "near_ties": model.card["checked"]["near_ties"],
                "ms": 1e3 * median(seconds[name]),
                "faster": median(ratios),
                "faster_quartiles": [low, high],
            }
        )
    return rows


if __name__ == "__main__":
    main()
