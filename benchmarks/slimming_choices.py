"""What the settings of Patch Slimming are worth on DeiT-Ti, and on which images it errs.

    python benchmarks/slimming_choices.py --shared ../shared --budget 0.55

Each row is one calibration at the same budget: by score alone or with even coverage, how the error
is normalised, at what rate blocks are tuned, and positions of all images or of each. Two rows let a
dropped patch leave its content with the nearest kept one, in the grid or by its key. Measured as
KL from the dense model on 500 images. Writes benchmarks/results/slimming_choices.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from train_deit_tiny import dense, load_test_images, load_training_images, print_now

from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.errors import DeepCut, Untrained
from patchslim.measurement.score import kl_divergence
from patchslim.methods import Signals
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.report.provenance import Provenance
from patchslim.schedules.schedule import Schedule
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.tokens import Tokens

RESULT = Path(__file__).parent / "results" / "slimming_choices.json"
IMAGES = 128
WORST = 0.1  # the share of images whose KL is reported apart
FREE = {"mode": "free", "images": IMAGES}
FAST = {"mode": "fast", "images": IMAGES}
DEFAULT = "default: cover 4, relative error, slack 8"
SCORE = FREE | {"cover": 0.0}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "as published: score alone, absolute error, slack 1": (
        "patch_slimming",
        SCORE | {"error": "absolute", "slack": 1.0},
    ),
    "score alone": ("patch_slimming", SCORE),
    DEFAULT: ("patch_slimming", FREE),
    "cover 16": ("patch_slimming", FREE | {"cover": 16.0}),
    "dynamic, score alone": ("patch_slimming_dynamic", SCORE),
    "dynamic (default)": ("patch_slimming_dynamic", FREE),
    "blocks tuned at 1e-5": ("patch_slimming", FAST),
    "blocks tuned at 1e-4": ("patch_slimming", FAST | {"lr": 1e-4}),
}
SAME = ("cover 16", "dynamic (default)", "blocks tuned at 1e-5", "blocks tuned at 1e-4")


class Leaving(PatchSlimming):
    """Patch Slimming in which a dropped patch is averaged into the nearest kept one."""

    def __init__(self, *, order: str = "", by: str = "grid") -> None:
        super().__init__(order=order)
        self.by = by

    # It joins what the method before it drops: another reduction than that one says it returns.
    def choose(  # type: ignore[override]
        self, tokens: Tokens, signals: Signals, keep: int
    ) -> Reduction:
        """Keeps the same rows; the others join the nearest of them."""
        batch, rows = tokens.x.shape[0], torch.arange(tokens.patches)
        order = rows if tokens.position is not None else self.get_buffer("cells")
        kept, gone = order[:keep].expand(batch, -1), order[keep:].expand(batch, -1)
        if self.by == "grid":
            width = tokens.grid[1]
            cells = torch.stack([tokens.cells() // width, tokens.cells() % width], dim=2).float()
            near = -torch.cdist(_rows(cells, gone), _rows(cells, kept))
        else:
            keys = functional.normalize(signals.keys(), dim=2)
            near = _rows(keys, gone) @ _rows(keys, kept).transpose(1, 2)
        return Merge(kept, gone, near.argmax(dim=2))


def _rows(values: Tensor, rows: Tensor) -> Tensor:
    return values.gather(1, rows[:, :, None].expand(-1, -1, values.shape[2]))


def main() -> None:
    """Calibrates by each choice, measures, and writes the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--budget", type=float, default=0.55)
    options = parser.parse_args()
    for remark in (DeepCut, Untrained, UserWarning):
        warnings.simplefilter("ignore", remark)
    host = dense(options.shared / "data")
    images = load_training_images(host, options.shared / "data")
    batches = [batch for batch, _ in load_test_images(host, options.shared / "data")]
    with torch.inference_mode():
        wanted = [host(batch) for batch in batches]
    trial = Trial(batches, wanted)
    schedule: Schedule | None = None
    for name, (method, settings) in CHOICES.items():
        goal: dict[str, Any] = {"macs": options.budget}
        if name in SAME:
            goal = {"schedule": schedule}
        result = calibrate(
            host, images, method, config=PatchSlimmingConfig(**settings), **goal, progress=print_now
        )
        layers = {each["block"]: each for each in result.record["layers"]}
        errors = {block: each["error"] / each["scale"] for block, each in layers.items()}
        trial.add(name, result.model, {"errors": errors, "gates": result.record["gates"]})
        if name == DEFAULT:
            schedule = result.model.schedule
            for by in ("grid", "key"):
                leaving = Leaving(order=result.record["order"], by=by)
                adapter = result.model.plan.adapter
                model = SlimModel(
                    host, plan_schedule(host, adapter, leaving, schedule, "exact")
                ).eval()
                trial.add(f"content left with the nearest kept patch, by {by}", model, {})
    provenance = Provenance.now(
        host, batch=50, image_size=(224, 224), images=sum(map(len, batches)), seed=0
    )
    data = {"birth": asdict(provenance), "rows": trial.rows, "worst_images": trial.worst()}
    RESULT.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


class Trial:
    """Models measured on the same images, and how far each image's answer is off."""

    def __init__(self, batches: list[Tensor], wanted: list[Tensor]) -> None:
        self.batches, self.wanted = batches, wanted
        self.rows: list[dict[str, Any]] = []
        self.apart: dict[str, Tensor] = {}

    @torch.inference_mode()
    def add(self, name: str, model: SlimModel, more: dict[str, Any]) -> None:
        """Measures a model and adds its row."""
        got = [model(batch) for batch in self.batches]
        pairs = list(zip(self.wanted, got, strict=True))
        kl = torch.cat([kl_divergence(a, b) for a, b in pairs])
        same = torch.cat([a.argmax(1) == b.argmax(1) for a, b in pairs])
        worst = kl.sort(descending=True).values[: int(WORST * len(kl))]
        row = {
            "name": name,
            "macs_share": model.macs().total / model.dense_macs().total,
            "tokens": list(model.counts()),
            "kl": float(kl.mean()),
            "kl_error": float(kl.std() / len(kl) ** 0.5),
            "agreement": float(same.double().mean()),
            "worst_share": float(worst.sum() / kl.sum()),
            **more,
        }
        self.apart[name] = kl
        self.rows.append(row)
        print_now(json.dumps({key: row[key] for key in ("name", "kl", "agreement", "worst_share")}))

    def worst(self) -> dict[str, float]:
        """Measures KL on the images that the static form has most trouble with, and on others."""
        static, dynamic = self.apart[DEFAULT], self.apart["dynamic (default)"]
        order = static.argsort(descending=True)
        worst, others = order.split([int(WORST * len(order)), len(order) - int(WORST * len(order))])
        return {
            "share of images": WORST,
            "static": float(static[worst].mean()),
            "dynamic": float(dynamic[worst].mean()),
            "static, others": float(static[others].mean()),
            "dynamic, others": float(dynamic[others].mean()),
        }


if __name__ == "__main__":
    main()
