"""Finds the latency table of a method on this device: in the cache, or by measuring it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patchslim.errors import UnsteadyTimes, warn_caller
from patchslim.methods._method import method_settings
from patchslim.model.model import SlimModel
from patchslim.model.recipe import to_plain_data
from patchslim.planning.cache import device_fingerprint, read_table, write_table
from patchslim.planning.latency_table import LatencyTable
from patchslim.planning.measuring import measure_table
from patchslim.planning.runtimes import Runtime
from patchslim.runs.progress import Progress

STEADY = 0.25  # quartiles of a time may be so far apart, as a share of it


def find_table(
    model: SlimModel,
    runtime: Runtime,
    images: Tensor,
    show: Progress,
    *,
    seconds: float,
    fresh: bool,
) -> LatencyTable:
    """Returns the table of a model's method; one that is not in the cache is measured and kept.

    Args:
        model: the host with the method.
        runtime: what runs it.
        images: as many as run in one call.
        show: is called with one line of text at a time.
        seconds: how long measuring may take.
        fresh: whether to measure even what is in the cache.
    """
    question = _ask(model, runtime, len(images))
    place = next(model.host.parameters()).device
    device = device_fingerprint(place, runtime.target_needs())
    saved = None if fresh else read_table(question, device)
    if saved is not None:
        return LatencyTable.from_json(saved)
    table = measure_table(model, runtime, images, seconds, show)
    write_table(question, device, table.to_json())
    warn_if_unsteady(table)
    return table


def warn_if_unsteady(table: LatencyTable) -> None:
    """Warns if times differed much from round to round: something else ran."""
    if table.spread > STEADY:
        warn_caller(
            f"Times of blocks differ by {table.spread:.0%} from round to round: something else ran "
            "on this machine. The plan may be wrong by as much. Let nothing else run, and measure "
            "again (fresh=True, --fresh).",
            UnsteadyTimes,
        )


def _ask(model: SlimModel, runtime: Runtime, batch: int) -> dict[str, Any]:
    """Returns what a table is measured for, as plain data."""
    plan, first = model.plan, next(model.host.parameters())
    plain: dict[str, Any] = to_plain_data(
        {
            "host": f"{type(model.host).__module__}.{type(model.host).__qualname__}",
            "shape": repr(plan.shape),
            "method": f"{type(plan.method).__module__}.{type(plan.method).__qualname__}",
            "settings": method_settings(plan.method),
            "tail": plan.tail,
            "batch": batch,
            "runtime": runtime.name,
            "precision": runtime.precision,
            "threads": runtime.threads,
            "dtype": str(first.dtype),
            "device": str(first.device),
        }
    )
    return plain
