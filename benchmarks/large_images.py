"""Methods at 1024 pixels, 4,097 tokens: peak memory and own time beside the dense forward pass.

    python benchmarks/large_images.py --shared ../shared

DeiT-Ti with its ImageNet weights, positions resampled, and one picture, enlarged. Own time is that
of deciding and of moving rows, by the processor's clock around both within the forward pass, on one
thread, added up over the blocks; the dense passes it is compared with are interleaved. (The
difference to a model that keeps as many for free is less than the noise of the rest.)
The aim is a peak of memory not above the dense model's, and own time of at most a tenth of its.
Writes benchmarks/results/large_images.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_deit_tiny import dense, load_test_images, print_now

import patchslim
from patchslim.errors import BadSetting
from patchslim.measurement.memory import peak_memory
from patchslim.methods import Method, Signals
from patchslim.methods.ats import ATS
from patchslim.methods.duplicates import Duplicates
from patchslim.methods.evit import EViT
from patchslim.methods.random import Random
from patchslim.methods.similarity import Similarity
from patchslim.methods.tome import ToMe
from patchslim.model.forward_pass import ForwardPass
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.model.step import BlockStep
from patchslim.report.provenance import Provenance
from patchslim.schedules.budget import make_schedule
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.shapes import Cost
from patchslim.tokens.tokens import Tokens

RESULT = Path(__file__).parent / "results" / "large_images.json"
SIZE = 1024
SHARE = 0.65  # of the operations: what fixed counts cost, and adaptive methods at most
PICTURE = 7  # of the sample: a picture with both plain and busy parts

METHODS: dict[str, Method] = {
    "random": Random(),
    "evit": EViT(),
    "tome": ToMe(),
    "tome threshold=0.9": ToMe(threshold=0.9),
    "ats": ATS(),
    "duplicates": Duplicates(),
    "duplicates tolerance=0.2": Duplicates(tolerance=0.2),
    "similarity": Similarity(),
    "similarity threshold=2e-5": Similarity(threshold=2e-5),
    "similarity window=8": Similarity(window=8),
    "similarity preset=paper": Similarity(preset="paper"),
    "similarity group=nearest": Similarity(group="nearest"),
    "similarity group=bipartite on=keys cosine": Similarity(
        group="bipartite", on="keys", measure="cosine", weight="size", survivor="mean"
    ),
    "similarity group=leader threshold=0.9 cosine": Similarity(
        group="leader", measure="cosine", threshold=0.9
    ),
    "similarity group=components threshold=0.9 cosine": Similarity(
        group="components", measure="cosine", threshold=0.9
    ),
    "similarity group=average": Similarity(group="average"),
    "similarity group=average window=8": Similarity(group="average", window=8),
    "similarity group=components threshold=0.9 cosine window=8": Similarity(
        group="components", measure="cosine", threshold=0.9, window=8
    ),
    "similarity group=medoids window=8": Similarity(group="medoids", window=8),
    "similarity group=density": Similarity(group="density"),
    "similarity group=medoids": Similarity(group="medoids"),
    "similarity group=iterative cosine": Similarity(group="iterative", measure="cosine"),
    "similarity group=redundancy cosine": Similarity(group="redundancy", measure="cosine"),
    "similarity survivor=medoid": Similarity(survivor="medoid"),
    "similarity weight=received": Similarity(weight="received"),
}


class Clocked(SlimModel):
    """SlimModel that adds up in `spent` the seconds of its decisions and moves."""

    spent: float = 0.0

    def start_pass(self) -> ForwardPass:
        """Makes a forward pass that adds up the seconds of its decisions."""
        return ClockedPass(**vars(super().start_pass()), clocked=self)


@dataclass(frozen=True, kw_only=True)
class ClockedPass(ForwardPass):
    """Forward pass of a model with a clock."""

    clocked: Clocked

    def _choose(self, step: BlockStep, tokens: Tokens, signals: Signals) -> Reduction:
        begun = time.process_time()
        reduction = super()._choose(step, tokens, signals)
        reduction.apply(tokens)  # called once more than needed, so that it is timed too
        self.clocked.spent += time.process_time() - begun
        return reduction


def clocked(model: SlimModel) -> Clocked:
    """Makes the same model with a clock."""
    return Clocked(model.host, model.plan).eval()


def large_host(data: Path) -> nn.Module:
    """Loads DeiT-Ti for images of SIZE pixels, its positions resampled."""
    host: Any = dense(data)
    host.set_input_size(img_size=SIZE)
    grown: nn.Module = host.requires_grad_(False)
    return grown


def picture(data: Path) -> Tensor:
    """Loads one picture of the sample, enlarged (1, 3, SIZE, SIZE)."""
    batch, _ = next(iter(load_test_images(dense(data), data)))
    some = batch[PICTURE : PICTURE + 1]
    return nn.functional.interpolate(some, (SIZE, SIZE), mode="bicubic", align_corners=False)


def slimmed(host: nn.Module, names: list[str]) -> dict[str, SlimModel]:
    """Slims by each of the methods to SHARE of the operations; for adaptive ones, that is the most.

    The check that `slim` makes of the host is skipped: it takes two dense forward passes for each.
    """
    adapter = patchslim.find_adapter(host)
    shape = adapter.shape(host)
    rules = {name: make_schedule(shape, METHODS[name], macs=SHARE, tail="exact") for name in names}
    return {
        name: SlimModel(host, plan_schedule(host, adapter, METHODS[name], rule, "exact")).eval()
        for name, rule in rules.items()
    }


def seconds(
    host: nn.Module, models: dict[str, SlimModel], image: Tensor, rounds: int
) -> tuple[list[float], dict[str, list[float]], dict[str, list[float]]]:
    """Measures processor seconds of dense model, whole models and their own work, by round."""
    untouched: list[float] = []
    whole: dict[str, list[float]] = {name: [] for name in models}
    own: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds):
        untouched.append(_timed(host, image))
        for name, model in models.items():
            clock = clocked(model)
            whole[name].append(_timed(clock, image))
            own[name].append(clock.spent)
        print_now(f"round {number + 1} of {rounds}: dense {untouched[-1]:.2f} s")
    return untouched, whole, own


def _append_costs(model: SlimModel, image: Tensor, costs: list[Cost]) -> None:
    """Runs one forward pass, and appends what the image costs."""
    costs += model.macs_of(image)


def _timed(model: nn.Module, image: Tensor) -> float:
    begun = time.process_time()
    model(image)
    return time.process_time() - begun


def measured(
    host: nn.Module, models: dict[str, SlimModel], image: Tensor, rounds: int
) -> list[dict[str, Any]]:
    """Makes one row a model; for those not meant for this size, writes their error."""
    dense_memory = peak_memory(partial(host, image))
    rows: list[dict[str, Any]] = []
    running: dict[str, SlimModel] = {}
    for name, model in models.items():
        costs: list[Cost] = []
        try:
            memory = peak_memory(partial(_append_costs, model, image, costs))
        except BadSetting as error:
            rows.append({"method": name, "refused": str(error)})
        else:
            running[name] = model
            most, (cost,) = model.dense_macs().total, costs
            rows.append(
                {
                    "method": name,
                    "macs_share": cost.total / most,
                    "choosing_share": cost.choosing / most,
                    "rows": cost.rows[-2],  # that enter the last block
                    "memory_share": memory / dense_memory,
                    "dense_memory": dense_memory,
                }
            )
        print_now(json.dumps(rows[-1]))
    untouched, whole, own = seconds(host, running, image, rounds)
    unit = statistics.median(untouched)
    for row in rows:
        name = row["method"]
        if name in running:
            row["dense_seconds"] = unit
            row["own_time_share"] = statistics.median(own[name]) / unit
            row["time_share"] = statistics.median(whole[name]) / unit
    return rows


def main() -> None:
    """Measures all methods and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ;")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the processor's clock adds up threads
    data = options.shared / "data"
    host, image = large_host(data), picture(data)
    models = slimmed(host, options.methods.split(";"))
    with torch.inference_mode():
        rows = measured(host, models, image, options.rounds)
    provenance = Provenance.now(host, batch=1, image_size=(SIZE, SIZE), images=1, seed=0)
    result = {"share": SHARE, "rounds": options.rounds, "rows": rows, "birth": asdict(provenance)}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
