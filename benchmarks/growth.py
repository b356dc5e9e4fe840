"""How a method's own work grows with the image: hosts of DeiT-S shape, 224 to 1024 px.

    python benchmarks/growth.py

For each method: time and peak memory of its own work (scoring, matching, moving; summed over the
blocks where it acts) as a share of the dense forward pass, and the peak memory of the whole slimmed
forward pass beside the dense one's. Writes benchmarks/results/growth.json.
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

import timm
import torch

import patchslim
from patchslim.measurement.latency import latency
from patchslim.measurement.memory import peak_memory
from patchslim.methods import Signals
from patchslim.model.forward_pass import ForwardPass
from patchslim.model.model import SlimModel
from patchslim.model.step import BlockStep
from patchslim.report.provenance import Provenance
from patchslim.tokens.tokens import Tokens

RESULT = Path(__file__).parent / "results" / "growth.json"
SIZES = (224, 384, 512, 1024)
METHODS = ("tome", "evit", "topk", "random")
SHARE = 0.65


class Watched(SlimModel):
    """SlimModel that times its own decisions and moves, and keeps one to measure its memory."""

    spent: float
    largest: tuple[BlockStep, Tokens, Signals] | None

    def start_pass(self) -> ForwardPass:
        """Makes a forward pass that notes what its decisions cost."""
        return WatchedPass(**vars(super().start_pass()), watched=self)

    def own_memory(self) -> int:
        """Measures peak bytes of the first decision and move, which are over the most tokens."""
        if self.largest is None:
            return 0
        step, tokens, signals = self.largest

        def work() -> Tokens:
            keep = step.left - tokens.prefix
            return self.method.choose(tokens, signals, keep).apply(tokens)

        return peak_memory(work)


@dataclass(frozen=True, kw_only=True)
class WatchedPass(ForwardPass):
    """Forward pass of a watched model."""

    watched: Watched

    def _attend_and_reduce(self, step: BlockStep, place: Any, tokens: Tokens) -> Tokens:
        if place is None:
            return super()._attend_and_reduce(step, None, tokens)
        attended = self._attend(step, place, tokens)
        mixed = self.adapter.mix(self.host, step.index, attended.queries, attended.values)
        tokens, signals = attended.queries.with_x(mixed), attended.signals
        if signals is None:
            return tokens
        begun = time.perf_counter()
        reduced = self._choose(step, tokens, signals).apply(tokens)
        self.watched.spent += time.perf_counter() - begun
        if self.watched.largest is None:
            self.watched.largest = (step, tokens, signals)
        return reduced


def watch(model: SlimModel) -> Watched:
    """Makes the same model, watched."""
    watched = Watched(
        model.host,
        model.plan,
    )
    watched.spent, watched.largest = 0.0, None
    return watched


def grow(size: int, repeats: int) -> tuple[list[dict[str, Any]], Provenance]:
    """Makes one row a method for a host of this image size."""
    host = timm.create_model("deit_small_patch16_224", img_size=size, num_classes=1000).eval()
    images = torch.randn(1, 3, size, size)
    rows = []
    slimmed = {name: patchslim.slim(host, name, macs=SHARE) for name in METHODS}
    seconds = latency({"dense": host, **slimmed}, images, repeats, 1)
    with torch.inference_mode():
        dense_memory = peak_memory(lambda: host(images))
        for name, model in slimmed.items():
            watched = watch(model)
            own = []
            for _ in range(repeats + 1):
                watched.spent = 0.0
                watched(images)
                own.append(watched.spent)
            ratios = [a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)]
            dense_time = statistics.median(seconds["dense"])
            rows.append(
                {
                    "size": size,
                    "tokens": model.plan.shape.entering,
                    "method": name,
                    "macs_share": model.macs().total / model.dense_macs().total,
                    "own_time_share": statistics.median(own[1:]) / dense_time,
                    "own_memory_share": watched.own_memory() / dense_memory,
                    "memory_share": peak_memory(partial(model, images)) / dense_memory,
                    "dense_memory": dense_memory,
                    "dense_seconds": dense_time,
                    "speedup": statistics.median(ratios),
                }
            )
    provenance = Provenance.now(host, batch=1, image_size=(size, size), images=0, seed=0)
    return rows, provenance


def main() -> None:
    """Measures all sizes and writes the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    provenances = []
    for size in map(int, options.sizes.split(",")):
        measured, provenance = grow(size, repeats=15 if size < 500 else 3)
        rows += measured
        provenances.append(asdict(provenance))
        for row in measured:
            print(json.dumps(row), flush=True)
    options.out.parent.mkdir(exist_ok=True)
    result = {"share": SHARE, "rows": rows, "births": provenances}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
