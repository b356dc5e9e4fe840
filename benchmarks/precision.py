"""What lower precisions change: DeiT-Ti with real weights, dense and at 0.6 of the operations.

    python benchmarks/precision.py --shared ../shared

Every other image, up to --given, goes to `export`, which finds ranges and recipes with them. All
figures are of the images that are left. For each method, target and precision: KL to the dense
model in float32, beside what the slimmed model has there without rounding; KL and agreement with
the slimmed model in float32; what `export` itself said; bytes, seconds. Puts each row in the place
of an earlier one of the same method and cell in benchmarks/results/precision.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from real_model import DEIT_TINY, load_deit_tiny, read_images
from torch import Tensor, nn

import patchslim
from patchslim.deployment.registry import find_target, target_names
from patchslim.deployment.target import INT8
from patchslim.errors import DeepCut, PatchslimError, ShortSchedule, Untrained
from patchslim.measurement.score import kl_divergence
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Provenance
from patchslim.versions import installed_version

RESULT = Path(__file__).parent / "results" / "precision.json"
BUDGET = 0.6
BATCH = 8  # fixed in the artefacts, which `runtime_speed.py` times
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
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--given", type=int, default=200, help="of them, those that export gets")
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS)
    parser.add_argument("--folder", type=Path, help="where the artefacts stay, to be timed")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    for kind in (DeepCut, ShortSchedule, Untrained):
        warnings.simplefilter("ignore", kind)
    host = load_deit_tiny(options.shared)
    images = read_images(host, options.shared, options.images)
    given = images[::2][: options.given]
    scored = torch.cat([images[1::2], images[::2][options.given :]])
    scored = scored[: len(scored) // BATCH * BATCH]
    dense = answer(host, scored)
    folder = options.folder or Path(tempfile.mkdtemp())
    for method in options.only:
        model = slim(host, method)
        own = answer(model, scored)
        for cell in options.cells:
            target, precision = cell.split()
            name = f"{method}{find_target(target).suffix}"
            path = folder / f"{DEIT_TINY}-{target}-{precision}-{BATCH}" / name
            row = {
                "method": method,
                "cell": cell,
                "budget": BUDGET,
                "given": len(given),
                "float32_to_dense": mean_kl(dense, own),
                **try_export(model, path, cell, given, (scored, dense, own)),
            }
            print(say(row), flush=True)
            provenance = Provenance.of(
                torch.device("cpu"),
                "float32",
                batch=8,
                image_size=(224, 224),
                images=len(scored),
                seed=0,
                versions=find_versions(target),
            )
            save(options.out, {**row, "birth": asdict(provenance)})
    if options.folder is None:
        shutil.rmtree(folder)


def find_versions(target: str) -> dict[str, str]:
    """Versions of what writes and runs a target."""
    names = find_target(target).distributions(INT8)
    return {name: installed_version(name) or "unknown" for name in names}


def save(path: Path, row: dict[str, Any]) -> None:
    """Puts a row in the place of the earlier one of its method and cell."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    rows = [each for each in rows if (each["method"], each["cell"]) != (row["method"], row["cell"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*rows, row], indent=1) + "\n", encoding="utf-8")


def slim(host: nn.Module, method: str) -> SlimModel:
    """The host slimmed to the budget; dense for the method that keeps everything."""
    if method == "identity":
        return patchslim.slim(host, "identity", keep=1.0)
    return patchslim.slim(host, method, macs=BUDGET)


def try_export(
    model: SlimModel, path: Path, cell: str, given: Tensor, scored: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Any]:
    """What a lower precision changed, or why it was refused.

    `scored` are images, the dense model's answers to them, and this model's own.
    """
    target, precision = cell.split()
    images, dense, own = scored
    begin = time.perf_counter()
    try:
        written = patchslim.export(
            model, path, to=target, precision=precision, batch=BATCH, images=given
        )
    except PatchslimError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - begin
    answers = answer(written, images)
    return {
        "to_dense": mean_kl(dense, answers),
        "to_own": mean_kl(own, answers),
        "agreement": (answers.argmax(1) == own.argmax(1)).double().mean().item(),
        "drift": written.card["checked"]["drift"],
        "seconds": round(seconds, 1),
        "bytes": written.size,
    }


def answer(model: Any, images: Tensor) -> Tensor:
    """The class scores of a model or an artefact."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH)])


def mean_kl(dense: Tensor, other: Tensor) -> float:
    """The mean KL divergence from the dense answers."""
    return float(kl_divergence(dense, other).mean())


def say(row: dict[str, Any]) -> str:
    """A row as one line."""
    begin = f"{row['method']:15} {row['cell']:18}"
    if "refused" in row:
        return f"{begin} refused: {row['refused'][:120]}"
    drift = row["drift"]
    return (
        f"{begin} KL to dense {row['to_dense']:.4f} ({row['float32_to_dense']:.4f} in float32), to "
        f"its own float32 {row['to_own']:.4f}, same first answer {row['agreement']:.1%}, kept "
        f"{drift['kept']:.1%}, {row['bytes'] / 1e6:.1f} MB, {row['seconds']:.0f} s "
        f"{drift['recipe']}"
    )


if __name__ == "__main__":
    main()
