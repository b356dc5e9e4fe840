"""Every family on all variants that its library builds here: laws, costs, and an export.

    python benchmarks/families.py

Hosts are small and have random weights. For each family: on how many variants a model with nothing
removed answers as the host does, and by how much it is off in float32 at most; how far the counted
operations of host and half model are from PyTorch's own counter at most; and what became of an
export of the first variant, slimmed by `tome`, to ONNX and OpenVINO. A family that is there
already, with as many variants, is not run again. Writes benchmarks/results/families.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patchslim
from patchslim.deployment.registry import find_target
from patchslim.errors import PatchslimError
from patchslim.hosts._registry import load_adapter
from patchslim.report.provenance import Provenance
from patchslim.schedules.schedule import Constant
from patchslim.testing.adapter_laws import AdapterTrial
from patchslim.testing.counting import count_macs
from patchslim.tokens.shapes import dense_macs

RESULT = Path(__file__).parent / "results" / "families.json"
TARGETS = ("onnx", "openvino")
sys.path.append(str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    """Tries every family and writes each row before the next begins."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=patchslim.adapter_names())
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    laws = importlib.import_module("test_family_laws")
    rows = json.loads(options.out.read_text()) if options.out.exists() else {}
    for family in options.only:
        variants = laws.list_variants(family)
        if not variants or rows.get(family, {}).get("variants") == len(variants):
            continue
        row = measure_family(family, variants)
        first = next(each for each in variants if not laws.only_combines(family, each))
        row["exported"] = {target: try_export(first.build(), target) for target in TARGETS}
        height, width = load_adapter(family).describe(first.build()).image_size
        size = (int(height), int(width))
        born = Provenance.now(first.build(), batch=2, image_size=size, images=2, seed=1)
        rows[family] = {**row, "birth": asdict(born)}
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
        print(family, row, flush=True)


def measure_family(family: str, variants: Any) -> dict[str, Any]:
    """Returns how far answers and costs are off at most, over all variants of a family."""
    equal, off, costs = 0, 0.0, 0.0
    for variant in variants:
        trial = AdapterTrial(variant.build(), load_adapter(family))
        difference = measure_identity(trial)
        equal += difference <= trial.tolerance
        if next(trial.host.parameters()).dtype == torch.float32:
            off = max(off, difference)
        costs = max(costs, measure_costs(trial))
    return {"variants": len(variants), "equal": equal, "off": off, "costs_off": costs}


def measure_identity(trial: AdapterTrial) -> float:
    """Returns how far the answer is off with nothing removed, as a share of the largest."""
    wanted, worst = trial.dense_answer, 0.0
    for tail in ("full", "exact"):
        model = trial.model("identity", Constant(0), tail=tail)
        worst = max(worst, share_off(trial.answer(model, trial.images()), wanted))
    return worst


def share_off(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference, as a share of the largest number."""
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def measure_costs(trial: AdapterTrial) -> float:
    """Returns how far the costs of the host and of half of it are from PyTorch's counter."""
    images, half = trial.images(1), trial.half_model()
    dense = dense_macs(trial.adapter.shape(trial.host)).total
    pairs = [(dense, count_macs(trial.host, images)), (half.macs().total, count_macs(half, images))]
    return max(abs(ours / counted - 1) for ours, counted in pairs)


def try_export(host: Any, target: str) -> dict[str, Any]:
    """Returns how far an exported model is off, or why it was refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{find_target(target).suffix}"
        try:
            slimmed = patchslim.slim(host.to(torch.float32), "tome", keep=0.5)
            written = patchslim.export(slimmed, path, to=target)
            return dict(written.card["checked"])
        except PatchslimError as error:
            return {"refused": str(error)}


if __name__ == "__main__":
    main()
