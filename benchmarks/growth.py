"""How a method's own work grows with the image: hosts of DeiT-S shape, 224 to 1024 px.

    python benchmarks/growth.py

For each method: time and peak memory of its own work (scoring, matching, moving; summed over the
blocks where it acts) as a share of the dense forward pass, and the peak memory of the whole slimmed
forward pass beside the dense one's. Writes benchmarks/results/growth.json; what is there already is
not measured again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import patchslim
from patchslim.errors import DeepCut, PatchslimError, ShortSchedule, Untrained
from patchslim.measurement.latency import latency
from patchslim.measurement.memory import peak_memory
from patchslim.methods import Signals
from patchslim.methods._method import method_settings
from patchslim.model.forward_pass import ForwardPass
from patchslim.model.model import SlimModel
from patchslim.model.step import BlockStep
from patchslim.report.provenance import Provenance
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.tokens import Tokens

RESULT = Path(__file__).parent / "results" / "growth.json"
SIZES = (224, 384, 512, 1024)
SHARE = 0.65
TOO_SLOW, TOO_LONG = 4, 10  # times the dense model, and seconds: not meant for images so large


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

    def _choose(self, step: BlockStep, tokens: Tokens, signals: Signals) -> Reduction:
        if self.watched.largest is None:
            self.watched.largest = (step, tokens, signals)
        begun = time.perf_counter()
        chosen = super()._choose(step, tokens, signals)
        self.watched.spent += time.perf_counter() - begun
        return chosen

    def _apply_reduction(self, tokens: Tokens, reduction: Reduction) -> Tokens:
        begun = time.perf_counter()
        reduced = super()._apply_reduction(tokens, reduction)
        self.watched.spent += time.perf_counter() - begun
        return reduced


def watch(model: SlimModel) -> Watched:
    """Makes the same model, watched."""
    watched = Watched(
        model.host,
        model.plan,
    )
    watched.spent, watched.largest = 0.0, None
    return watched


def make_host(size: int) -> nn.Module:
    """Makes a host of DeiT-S shape for images of this size."""
    torch.manual_seed(0)
    host: nn.Module = timm.create_model("deit_small_patch16_224", img_size=size)
    return host.eval()


def grow(host: nn.Module, size: int, name: str) -> dict[str, Any]:
    """Measures one method at one size, beside the dense model; or says why it cannot be."""
    images = torch.randn(1, 3, size, size)
    # A learned method has so many new tokens at most, by default enough for 224 pixels.
    fits = "slots" in method_settings(patchslim.find_method(name)())
    settings: dict[str, Any] = {"slots": (size // 16) ** 2} if fits else {}
    try:
        model = patchslim.slim(host, name, macs=SHARE, **settings)
    except PatchslimError as error:
        return {"refused": str(error)}
    # The first round warms up, and tells whether there is time for more.
    once = latency({"dense": host, name: model}, images, 1, 0)
    if once[name][0] > TOO_SLOW * once["dense"][0] and once[name][0] > TOO_LONG:
        return {"refused": f"{once[name][0] / once['dense'][0]:.0f} times the dense model's time"}
    repeats = 15 if size < 500 else 3
    seconds = latency({"dense": host, name: model}, images, repeats, 1)
    watched, own = watch(model), []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            watched.spent = 0.0
            watched(images)
            own.append(watched.spent)
        dense_memory = peak_memory(lambda: host(images))
        memory = peak_memory(partial(model, images))
        own_memory = watched.own_memory()
    ratios = [a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)]
    dense_time = statistics.median(seconds["dense"])
    return {
        "macs_share": model.macs().total / model.dense_macs().total,
        "own_time_share": statistics.median(own[1:]) / dense_time,
        "own_memory_share": own_memory / dense_memory,
        "memory_share": memory / dense_memory,
        "dense_memory": dense_memory,
        "dense_seconds": dense_time,
        "speedup": statistics.median(ratios),
    }


def main() -> None:
    """Measures all sizes and methods, and writes the rows after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for remark in (DeepCut, ShortSchedule, Untrained):
        warnings.simplefilter("ignore", remark)
    names = [name for name in patchslim.method_names() if name != "identity"]
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for size in map(int, options.sizes.split(",")):
        host = make_host(size)
        for name in names:
            if any(row["size"] == size and row["method"] == name for row in rows):
                continue
            found = grow(host, size, name)
            born = Provenance.now(host, batch=1, image_size=(size, size), images=0, seed=0)
            tokens = patchslim.find_adapter(host).shape(host).entering
            row = {"size": size, "tokens": tokens, "method": name, **found, "birth": asdict(born)}
            rows.append(row)
            print(json.dumps({key: row[key] for key in row if key != "birth"}), flush=True)
            told = json.dumps({"share": SHARE, "rows": rows}, indent=1)
            options.out.write_text(told + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
