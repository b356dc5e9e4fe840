"""Parity of exported models: every method in every target, on real images.

    python benchmarks/export.py --shared ../shared --limit 500
    python benchmarks/export.py --shared ../shared --host eva --targets onnx openvino

DeiT-Ti has real weights; Eva, LeViT and a ViT of Hugging Face have random ones, so large that
decisions are clear. For each cell, whether it was written or why not, how far its answers are off,
near ties that went the other way, whether first answers are the same, seconds, bytes, and how many
nodes of each kind the graph has. Methods that learn have random layers here. A cell that is in
benchmarks/results/export.json with as many images is not run again, so that it can be stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from real_model import load_deit_tiny, read_images
from torch import Tensor, nn

import patchslim
from patchslim.deployment import conversion
from patchslim.deployment.registry import find_target, target_names
from patchslim.errors import DeepCut, PatchslimError, ShortSchedule, Untrained
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Provenance

RESULT = Path(__file__).parent / "results" / "export.json"
BUDGETS = {"deit": 0.65, "eva": 0.65, "levit": 0.9, "huggingface": 0.65}  # LeViT has few patches
HOSTS = (*BUDGETS,)
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
    parser.add_argument("--limit", type=int, default=32, help="images to check with")
    parser.add_argument("--host", choices=HOSTS, default=HOSTS[0])
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="settings, by default all")
    parser.add_argument("--targets", nargs="*", choices=target_names(), default=target_names())
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for kind in (DeepCut, ShortSchedule, Untrained):
        warnings.simplefilter("ignore", kind)
    conversion.MOST_IMAGES = options.limit  # a usual export looks at 64
    host = make_host(options.host, options.shared)
    images = read_images(host, options.shared, options.limit)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for setting in options.only or SETTINGS:
        for target in options.targets:
            key = {"host": options.host, "setting": setting, "target": target}
            row = {**key, "asked": len(images), "budget": BUDGETS[options.host]}
            if any(all(old[name] == value for name, value in row.items()) for old in rows):
                continue
            found = try_export(host, BUDGETS[options.host], setting, target, images)
            born = Provenance.now(
                host,
                batch=8,
                image_size=(images.shape[2], images.shape[3]),
                images=len(images),
                seed=0,
            )
            rows = [old for old in rows if any(old[name] != v for name, v in key.items())]
            rows.append({**row, **found, "birth": asdict(born)})
            print(say(rows[-1]), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            told = json.dumps({"rows": rows}, indent=1)
            options.out.write_text(told + "\n", encoding="utf-8")


def make_host(name: str, shared: Path) -> nn.Module:
    """A host with real weights, or one of another family with random ones."""
    if name == "deit":
        return load_deit_tiny(shared)
    torch.manual_seed(0)
    if name == "huggingface":
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768
        )
        host: nn.Module = ViTForImageClassification(config)
    else:
        host = timm.create_model({"eva": "eva02_tiny_patch14_224", "levit": "levit_128s"}[name])
    for parameter in host.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    for name, module in host.named_modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            # LeViT begins with zeros here, and its blocks would add nothing. Where queries and keys
            # are smaller, patches become alike; where they are larger, rounding is amplified.
            heads = name.endswith((".qkv.bn", ".kv.bn", ".q.ln.bn"))
            nn.init.constant_(module.weight, 0.6 if heads else 1.0 if "stem" in name else 0.3)
            module.momentum = None
    with torch.no_grad():
        host.train()(read_images(host, shared, 32))  # its statistics
    return host.eval()


def slim(host: nn.Module, budget: float, setting: str) -> SlimModel:
    """The host slimmed; layers of a method are random, so that it decides clearly."""
    name, settings = SETTINGS[setting]
    model = patchslim.slim(host, name, macs=budget, **settings)
    torch.manual_seed(0)
    for parameter in model.method.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def try_export(
    host: nn.Module, budget: float, setting: str, target: str, images: Tensor
) -> dict[str, Any]:
    """What became of an export."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{find_target(target).suffix}"
        try:
            model = slim(host, budget, setting)
            written = patchslim.export(model, path, to=target, images=images)
        except PatchslimError as error:
            return {"refused": str(error)}
        check = written.check
        return {
            **written.card["checked"],
            "largest_difference": None if check is None else check.largest_difference,
            "same_answers": count_same_answers(model, written, images),
            "seconds": round(time.perf_counter() - begin, 1),
            "bytes": written.size,
            "delegated": written.card.get("delegated"),
            "nodes": dict(count_nodes(path, target).most_common()),
        }


def count_same_answers(model: SlimModel, written: Any, images: Tensor) -> int:
    """On how many images the first answer is the same."""
    same = 0
    for batch in images.split(written.card["batch"] or 8):
        with torch.no_grad():
            ours = model.plan.adapter.logits(model(batch)).argmax(dim=1)
        same += int((written.logits(batch).argmax(dim=1) == ours).sum())
    return same


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
    begin = f"{row['host']} {row['setting']:26} {row['target']:9}"
    if "refused" in row:
        return f"{begin} refused: {row['refused'][:120]}"
    return (
        f"{begin} off by {row['largest_difference']:.1e} on {row['images']} images, near ties "
        f"{row['near_ties'] or 'none'}, hidden {row['hidden_ties']}, {row['same_answers']} same, "
        f"{sum(row['nodes'].values())} nodes, {row['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
