"""Parity of exported models: every method in every target, DeiT-Ti with real weights and images.

    python benchmarks/export.py --shared ../shared

For each, whether it was written or why not, how far its answers are off, near ties that went the
other way, seconds, bytes, and how many nodes of each kind the graph has. Methods that learn have
random layers here. Writes benchmarks/results/export.json after each, so that it can be stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import patchslim
from patchslim.data.images import Images
from patchslim.deployment.registry import find_target, target_names
from patchslim.errors import DeepCut, PatchslimError, ShortSchedule, Untrained
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Provenance

RESULT = Path(__file__).parent / "results" / "export.json"
BUDGET = 0.65
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in patchslim.method_names() if name != "identity"},
    "similarity bipartite keys": (
        "similarity",
        {"group": "bipartite", "on": "keys", "measure": "cosine"},
    ),
    "similarity nearest": ("similarity", {"group": "nearest"}),
    "similarity threshold": ("similarity", {"threshold": 1e-4}),
    "tome threshold": ("tome", {"threshold": 0.8}),
}


def main() -> None:
    """Exports every setting for every target and writes what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--limit", type=int, default=32, help="images to check with (at most 64)")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="settings, by default all")
    parser.add_argument("--targets", nargs="*", choices=target_names(), default=target_names())
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for kind in (DeepCut, ShortSchedule, Untrained):
        warnings.simplefilter("ignore", kind)
    weights = options.shared / "data" / "deit_tiny_patch16_224.safetensors"
    if not weights.is_file():
        sys.exit(f"{weights} is not there: nothing to export. Give --shared FOLDER.")
    host = timm.create_model("deit_tiny_patch16_224").eval()
    timm.models.load_checkpoint(host, str(weights))
    images = read_images(host, options.shared / "data" / "imagenet-sample-500.zip", options.limit)
    provenance = Provenance.now(host, batch=8, image_size=(224, 224), images=len(images), seed=0)
    rows: list[dict[str, Any]] = []
    for setting in options.only or SETTINGS:
        model = slim(host, setting)
        for target in options.targets:
            rows.append({"setting": setting, "target": target, **try_export(model, target, images)})
            print(say(rows[-1]), flush=True)
            told = {"budget": BUDGET, "rows": rows, "provenance": asdict(provenance)}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def read_images(host: nn.Module, path: Path, limit: int) -> Tensor:
    """Real images, evenly spread over the sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = Images.for_host(host, path, limit=limit, batch=limit)
        return next(iter(source))[0]


def slim(host: nn.Module, setting: str) -> SlimModel:
    """The host slimmed; layers of a method are random, so that it decides clearly."""
    name, settings = SETTINGS[setting]
    model = patchslim.slim(host, name, macs=BUDGET, **settings)
    torch.manual_seed(0)
    for parameter in model.method.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def try_export(model: SlimModel, target: str, images: Tensor) -> dict[str, Any]:
    """What became of an export."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{find_target(target).suffix}"
        begin = time.perf_counter()
        try:
            written = patchslim.export(model, path, to=target, images=images)
        except PatchslimError as error:
            return {"refused": str(error)}
        return {
            **written.card["checked"],
            "largest_difference": written.check.largest_difference if written.check else None,
            "seconds": round(time.perf_counter() - begin, 1),
            "bytes": written.size,
            "delegated": written.card.get("delegated"),
            "nodes": dict(count_nodes(path, target).most_common()),
        }


def count_nodes(path: Path, target: str) -> Counter[str]:
    """How many nodes of each kind the runtime gets; for OpenVINO, how many it runs.

    For ExecuTorch, those that it runs one by one; in machine code there are none.
    """
    if target == "aoti":
        return Counter()
    if target == "executorch":
        return Counter(patchslim.load(path).card["delegated"]["left"])
    if target == "onnx":
        import onnx

        return Counter(node.op_type for node in onnx.load(path).graph.node)
    if target == "openvino":
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path / "model.xml", "CPU", settings)
        ops = compiled.get_runtime_model().get_ops()
        return Counter(str(op.get_rt_info()["layerType"].value) for op in ops)
    with path.open("rb") as file:
        nodes = torch.export.load(file).graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")


def say(row: dict[str, Any]) -> str:
    """A row as one line."""
    begin = f"{row['setting']:26} {row['target']:9}"
    if "refused" in row:
        return f"{begin} refused: {row['refused'][:120]}"
    return (
        f"{begin} off by {row['largest_difference']:.1e} on {row['images']} images, near ties "
        f"{row['near_ties'] or 'none'}, {sum(row['nodes'].values())} nodes, {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
