"""Makes the rows of a report from what `measure` measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchslim.measurement.models import method_label
from patchslim.measurement.score import Score
from patchslim.model.model import SlimModel
from patchslim.report.row import CostDistribution, Quartiles, Row


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured, by the name of the model.

    Attributes:
        scores: accuracy and agreement; empty without images.
        spent: MACs of each scored image, for adaptive models.
        timed: MACs of each timed image; a single number if the method is not adaptive.
        tokens: tokens left after each block, for adaptive models the mean over a sample.
        seconds: time of a batch in each round; empty without timing.
        memory: peak bytes of one forward pass.
        batch: how many images were timed at a time.
    """

    scores: Mapping[str, Score]
    spent: Mapping[str, list[int]]
    timed: Mapping[str, list[int]]
    tokens: Mapping[str, tuple[int, ...]]
    seconds: Mapping[str, list[float]]
    memory: Mapping[str, int]
    batch: int


def make_row(
    name: str,
    model: SlimModel,
    size: tuple[int, int],
    measured: Measurements,
    *,
    dense: bool = False,
) -> Row:
    """Makes the row of one model at an image size; with `dense`, the row of its untouched host."""
    cost, dense_cost = model.macs(size), model.dense_macs(size)
    macs, spent = (dense_cost.total if dense else cost.total), None
    if not dense and model.method.adaptive:
        # Without scored images the timed ones have to do.
        macs_of_images = measured.spent[name] or measured.timed[name]
        shares = [macs_of_image / dense_cost.total for macs_of_image in macs_of_images]
        spent = CostDistribution.of(shares, cost.total / dense_cost.total)
        macs = round(spent.mean * dense_cost.total)
    scored, seconds = measured.scores.get(name), measured.seconds.get(name)
    latency = speedup = conversion = throughput = None
    if seconds:
        throughput = Quartiles.of([measured.batch / second for second in seconds])
        latency = Quartiles.of([1000 * second / measured.batch for second in seconds])
        pairs = zip(measured.seconds["dense"], seconds, strict=True)
        speedup = Quartiles.of([dense_second / second for dense_second, second in pairs])
        timed = [dense_cost.total] if dense else measured.timed[name]
        conversion = speedup.median * sum(timed) / len(timed) / dense_cost.total
    return Row(
        name=name,
        method="dense" if dense else method_label(model.method),
        tokens=dense_cost.rows if dense else measured.tokens[name],
        macs=macs,
        macs_share=macs / dense_cost.total,
        spent=spent,
        choosing=0 if dense else cost.choosing,
        parameters=sum(p.numel() for p in (model.host if dense else model).parameters()),
        accuracy=scored.accuracy if scored else None,
        change=scored.change if scored else None,
        top5=scored.top5 if scored else None,
        ece=scored.ece if scored else None,
        agreement=scored.agreement if scored else None,
        kl=scored.kl if scored else None,
        latency=latency,
        throughput=throughput,
        speedup=speedup,
        conversion=conversion,
        memory=measured.memory[name],
    )


def report_title(host: Any) -> str:
    """Names the host as its library does, or by its class."""
    settings = getattr(host, "pretrained_cfg", None) or {}
    config = getattr(host, "config", None)
    known = [settings[part] for part in ("architecture", "tag") if settings.get(part)]
    name = ".".join(known) or getattr(config, "name_or_path", "")
    return f"{name or type(host).__name__}: slimmed, beside dense and random"
