"""The demo's model on every runtime that is installed, dense and slimmed, timed in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from patchslim.deployment.artefact import open_artefact
from patchslim.deployment.export import export
from patchslim.deployment.registry import find_target
from patchslim.errors import BadFile, MissingExtra, OldVersion
from patchslim.measurement.latency import latency
from patchslim.model.model import SlimModel
from patchslim.runs.progress import Progress

# What the demo shows beside eager PyTorch: targets that run on any CPU, and need no compiler.
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
EAGER = "eager PyTorch"
ROUNDS, WARMUP = 15, 2


@dataclass(frozen=True)
class RuntimeRow:
    """One model on one runtime.

    Attributes:
        runtime: its name.
        model: which model.
        ms: milliseconds an image, the median over the rounds.
        speedup: over the first model in eager PyTorch.
        difference: the largest of an answer to the slimmed model's, as a share of the largest.
    """

    runtime: str
    model: str
    ms: float
    speedup: float
    difference: float | None


def compare_runtimes(
    models: Mapping[str, SlimModel], images: Tensor, say: Progress
) -> tuple[list[RuntimeRow], list[str]]:
    """Exports the models, checks them, and times all on one thread; also what is missing."""
    calls: dict[tuple[str, str], Callable[[Tensor], Any]] = {
        (EAGER, name): model for name, model in models.items()
    }
    differences: dict[tuple[str, str], float] = {}
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for target, runtime in RUNTIMES.items():
            try:
                find_target(target).check_installed()
            except (MissingExtra, OldVersion) as error:
                missing.append(f"{runtime} is not shown: {error}")
                say(missing[-1])
                continue
            for name, model in models.items():
                say(f"exporting: {name} for {runtime}")
                path = Path(folder) / f"{name}-{target}{find_target(target).suffix}"
                found = export(model, path, target, images=images, batch=len(images)).check
                if found is not None:
                    differences[runtime, name] = found.largest_difference
                calls[runtime, name] = _open(path)
        say(f"timing on {len({runtime for runtime, _ in calls})} runtimes")
        seconds = latency(
            {"\n".join(key): run for key, run in calls.items()}, images, ROUNDS, WARMUP
        )
    times = {key: 1e3 * median(seconds["\n".join(key)]) / len(images) for key in calls}
    first = next(iter(times.values()))
    rows = [RuntimeRow(*key, ms, first / ms, differences.get(key)) for key, ms in times.items()]
    return rows, missing


def write_table(rows: list[RuntimeRow]) -> str:
    """The rows as text."""
    lines = [f"{'runtime':15} {'model':16} {'ms an image':>11} {'speed-up':>9} {'off by':>8}"]
    for row in rows:
        off = "-" if row.difference is None else f"{row.difference:.0e}"
        lines.append(f"{row.runtime:15} {row.model:16} {row.ms:11.2f} {row.speedup:8.2f}x {off:>8}")
    return "\n".join(lines)


def write_note(rows: list[RuntimeRow]) -> str:
    """The rows as one sentence, for the page."""
    told = "; ".join(
        f"{row.runtime}, {row.model}: {row.ms:.2f} ms ({row.speedup:.2f}x)" for row in rows
    )
    return (
        f"On one thread an image takes, over {ROUNDS} rounds in turns: {told}. Exported models "
        "keep the same tokens and answer the same; that was checked before."
    )


def _open(path: Path) -> Callable[[Tensor], Any]:
    """The exported model on one thread."""
    artefact = open_artefact(path, threads=1)
    if artefact is None:
        raise BadFile(f"{path} was written and is gone. Another process may have moved it.")
    return artefact
