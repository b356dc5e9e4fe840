"""What lower precisions change: DeiT-Ti with real weights, dense and at 0.6 of the operations.

    python benchmarks/precision.py --shared ../shared

For each method, target and precision: KL to the same model in float32, KL to the dense model in
float32 (and what the slimmed model has without rounding), kept patches in common, the share of
images with the same kept sets, bytes, seconds. For int8 half of the images find ranges, and all
figures are of the other half. Writes benchmarks/results/precision.json after each row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from real_model import load_deit_tiny, read_images
from torch import Tensor, nn

import patchslim
from patchslim.deployment.registry import find_target, target_names
from patchslim.errors import DeepCut, PatchslimError, ShortSchedule, Untrained
from patchslim.measurement.score import kl_divergence
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Provenance

RESULT = Path(__file__).parent / "results" / "precision.json"
BUDGET = 0.6
METHODS = "identity evit topk tome similarity patch_slimming".split()
CELLS = [
    f"{name} {precision}"
    for name in target_names()
    for precision in find_target(name).precisions
    if precision != "float32"
]


def main() -> None:
    """Exports every method in every lower precision and writes what it changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--limit", type=int, default=200, help="images, half of them to judge")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for kind in (DeepCut, ShortSchedule, Untrained):
        warnings.simplefilter("ignore", kind)
    host = load_deit_tiny(options.shared)
    images = read_images(host, options.shared, options.limit)
    judged = images[1::2]
    dense = answer(host, judged)
    provenance = Provenance.now(host, batch=8, image_size=(224, 224), images=len(judged), seed=0)
    rows: list[dict[str, Any]] = []
    for cell in options.cells:
        for method in options.only:
            model = slim(host, method)
            begin = {
                "method": method,
                "cell": cell,
                "float32_to_dense": mean_kl(dense, answer(model, judged)),
            }
            rows.append({**begin, **try_export(model, cell, images, judged, dense)})
            print(say(rows[-1]), flush=True)
            told = {"budget": BUDGET, "rows": rows, "provenance": asdict(provenance)}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def slim(host: nn.Module, method: str) -> SlimModel:
    """The host slimmed to the budget; dense for the method that keeps everything."""
    if method == "identity":
        return patchslim.slim(host, "identity", keep=1.0)
    return patchslim.slim(host, method, macs=BUDGET)


def try_export(
    model: SlimModel, cell: str, images: Tensor, judged: Tensor, dense: Tensor
) -> dict[str, Any]:
    """What a lower precision changed, or why it was refused."""
    target, precision = cell.split()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{find_target(target).suffix}"
        begin = time.perf_counter()
        given = images if precision == "int8" else judged
        try:
            written = patchslim.export(model, path, to=target, precision=precision, images=given)
        except PatchslimError as error:
            return {"refused": str(error)}
        files = [path] if path.is_file() else [*path.iterdir()]
        return {
            **written.card["checked"]["drift"],
            "to_dense": mean_kl(dense, answer(written, judged)),
            "seconds": round(time.perf_counter() - begin, 1),
            "bytes": sum(file.stat().st_size for file in files),
        }


def answer(model: Any, images: Tensor) -> Tensor:
    """The class scores of a model or an artefact."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(8)])


def mean_kl(dense: Tensor, other: Tensor) -> float:
    """The mean KL divergence from the dense answers."""
    return float(kl_divergence(dense, other).mean())


def say(row: dict[str, Any]) -> str:
    """A row as one line."""
    begin = f"{row['method']:15} {row['cell']:18}"
    if "refused" in row:
        return f"{begin} refused: {row['refused'][:120]}"
    return (
        f"{begin} KL to own float32 {row['kl']:.4f}, to dense {row['to_dense']:.4f} "
        f"({row['float32_to_dense']:.4f} in float32), kept {row['kept']:.1%}, same sets "
        f"{row['same_tokens']:.1%}, {row['bytes'] / 1e6:.1f} MB, {row['seconds']:.0f} s "
        f"{row['recipe']}"
    )


if __name__ == "__main__":
    main()
