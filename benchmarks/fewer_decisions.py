"""What `similarity` loses by deciding in fewer blocks, and the time that it gains, on DeiT-Ti.

    python benchmarks/fewer_decisions.py --shared ../shared

The default decides in every block from a quarter of the depth. Beside it stand every second of
these blocks, three of them, and other methods, none of them trained. All are scored on 500 images
and timed in turns. Writes benchmarks/results/fewer_decisions.json. The images are probably training
images of the model: read differences from dense, not accuracy.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from train_deit_tiny import dense, load_test_images, print_now

import patchslim
from patchslim.errors import DeepCut
from patchslim.measurement.measure import measure
from patchslim.model.model import SlimModel

RESULT = Path(__file__).parent / "results" / "fewer_decisions.json"
BUDGETS = (0.75, 0.65, 0.55)
PLACES = {"every block from 3": None, "3, 5, 7, 9": (3, 5, 7, 9), "3, 6, 9": (3, 6, 9)}
OTHERS = ("tome", "ppt", "topk")


def slim_all(host: nn.Module, budget: float) -> dict[str, SlimModel]:
    """Slims the host to the budget, deciding in several places."""
    models = {}
    for name, at in PLACES.items():
        places: Any = {} if at is None else {"at": at}
        models[f"similarity, {name}"] = patchslim.slim(host, "similarity", macs=budget, **places)
    return models | {name: patchslim.slim(host, name, macs=budget) for name in OTHERS}


def main() -> None:
    """Measures every budget and writes the reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeepCut)
    torch.set_num_threads(options.threads)
    host = dense(options.shared / "data")
    images = load_test_images(host, options.shared / "data")
    reports = {}
    for budget in BUDGETS:
        models = slim_all(host, budget)
        report = measure(
            models, images, dense=host, batch=8, repeats=options.repeats, progress=print_now
        )
        print(report.table())
        reports[f"{budget:g}"] = report.to_json()
        text = json.dumps(reports, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
