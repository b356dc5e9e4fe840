"""Speed on a GPU as a ratio inside one run: eager, as CUDA graphs, and compiled.

    python benchmarks/speed_gpu.py
    python benchmarks/speed_gpu.py --models deit_small_patch16_224 --batches 64 --forms compiled

Every model is at 0.6 of the operations, with random weights and positions, which do not matter for
speed, in bfloat16 with PyTorch's fused attention. Models of one host, batch and form are timed in
turn. Conversion is measured speed-up times the share of operations: 1 means that time falls as much
as operations do. Writes benchmarks/results/speed_gpu.json; what is there already is kept, and not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import patchslim
from patchslim.measurement.latency import latency
from patchslim.methods._ranking import format_order
from patchslim.report.provenance import Provenance

RESULT = Path(__file__).parent / "results" / "speed_gpu.json"
MODELS = (
    "deit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_384",
    "vit_huge_patch14_224",
)
BUDGET = 0.6
WARMUP = 3
METHODS = ("patch_slimming", "evit", "topk", "tome", "similarity")
Call = Callable[[Tensor], object]


def make_models(name: str, methods: list[str]) -> dict[str, Any]:
    """Makes the dense host on the GPU in bfloat16, and slims it by the methods."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        host = timm.create_model(name).eval().to(torch.bfloat16)
    grid = patchslim.find_adapter(host).shape(host).grid
    order = format_order(grid, torch.randperm(grid[0] * grid[1]).tolist())
    models: dict[str, Any] = {"dense": host}
    for method in ["identity", *methods]:
        settings: dict[str, Any] = {} if method == "identity" else {"macs": BUDGET}
        if method == "patch_slimming":
            settings["order"] = order
        models[method] = patchslim.slim(host, method, **settings)
    return models


def record_graph(model: nn.Module, images: Tensor) -> Call:
    """Records a pass as a CUDA graph; a call replays it on the images of the recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(WARMUP):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():
        model(images)
    return lambda _: graph.replay()


def compile_model(model: nn.Module, images: Tensor) -> Call:
    """Compiles a model for images of this size."""
    torch.compiler.reset()
    compiled: Call = torch.compile(model, dynamic=False)
    with torch.inference_mode():
        compiled(images)
    return compiled


FORMS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "eager": lambda model, _: model,
    "graph": record_graph,
    "compiled": compile_model,
}


def time_form(
    models: dict[str, Any], images: Tensor, form: str, repeats: int
) -> list[dict[str, Any]]:
    """Times all models in one form, and says how much faster each is than dense in that form."""
    rows = []
    dense = models["identity"].dense_macs().total
    calls = {name: FORMS[form](model, images) for name, model in models.items()}
    seconds = latency(calls, images, repeats, WARMUP)
    for name, taken in seconds.items():
        ratios = [one / other for one, other in zip(seconds["dense"], taken, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        share = 1.0 if name == "dense" else models[name].macs().total / dense
        rows.append(
            {
                "name": name,
                "macs_share": share,
                "seconds": statistics.median(taken),
                "speedup": {"low": low, "median": middle, "high": high},
                "conversion": middle * share,
            }
        )
    return rows


def main() -> None:
    """Measures each host at each batch in each form, and writes the rows after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8,64,256")
    parser.add_argument("--forms", default="eager,graph")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for name in options.models.split(","):
        models = make_models(name, options.methods.split(","))
        size = models["dense"].default_cfg["input_size"]
        for batch, form in itertools.product(
            map(int, options.batches.split(",")), options.forms.split(",")
        ):
            key = {"model": name, "batch": batch, "form": form}
            if any(all(row[each] == value for each, value in key.items()) for row in rows):
                continue
            images = torch.randn(batch, *size, device="cuda", dtype=torch.bfloat16)
            found = time_form(models, images, form, options.repeats)
            born = Provenance.now(
                models["dense"], batch=batch, image_size=size[1:], images=0, seed=0
            )
            more = {"repeats": options.repeats, "birth": asdict(born)}
            rows += [{**key, **row, **more} for row in found]
            for row in found:
                print(
                    f"{name} {batch:4} {form:9} {row['name']:15} {1e3 * row['seconds']:9.2f} ms "
                    f"{row['speedup']['median']:5.2f}x conversion {row['conversion']:.2f}",
                    flush=True,
                )
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
