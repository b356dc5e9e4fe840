"""Makes the rows of a report from what `measure` measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchslim.measurement.score import Score
from patchslim.methods._registry import method_label
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


@dataclass(frozen=True)
class Costs:
    """What is counted of a model, not measured.

    Attributes:
        method: the name of its method; "dense" for the untouched host.
        tokens: tokens left after each block.
        macs: multiply-adds of an image; the mean if images differ.
        timed_macs: the same of the images that were timed.
        dense_macs: multiply-adds of an image in the untouched host.
        choosing: multiply-adds that the method spends on its decisions.
        parameters: how many there are, if that is known.
        spent: how the multiply-adds differ between images, if they do.
    """

    method: str
    tokens: tuple[int, ...]
    macs: int
    timed_macs: float
    dense_macs: int
    choosing: int = 0
    parameters: int | None = None
    spent: CostDistribution | None = None


def dense_costs(model: SlimModel, size: tuple[int, int] | None) -> Costs:
    """What the untouched host of a model costs at an image size, by default its own."""
    cost = model.dense_macs(size)
    return Costs(
        "dense",
        cost.rows,
        cost.total,
        cost.total,
        cost.total,
        parameters=sum(each.numel() for each in model.host.parameters()),
    )


def slim_costs(name: str, model: SlimModel, size: tuple[int, int], measured: Measurements) -> Costs:
    """What a model costs at an image size, on the images that were measured."""
    cost, dense = model.macs(size), model.dense_macs(size).total
    macs, spent, timed = cost.total, None, measured.timed[name]
    if model.method.adaptive:
        # Without scored images the timed ones have to do.
        shares = [each / dense for each in measured.spent[name] or timed]
        spent = CostDistribution.of(shares, cost.total / dense)
        macs = round(spent.mean * dense)
    return Costs(
        method_label(model.method),
        measured.tokens[name],
        macs,
        sum(timed) / len(timed),
        dense,
        cost.choosing,
        sum(each.numel() for each in model.parameters()),
        spent,
    )


def make_row(name: str, costs: Costs, measured: Measurements) -> Row:
    """Makes the row of one model from its costs and what was measured of it, if anything."""
    scored, seconds = measured.scores.get(name), measured.seconds.get(name)
    dense_seconds = measured.seconds.get("dense")
    latency = speedup = conversion = throughput = None
    if seconds:
        throughput = Quartiles.of([measured.batch / second for second in seconds])
        latency = Quartiles.of([1000 * second / measured.batch for second in seconds])
    if seconds and dense_seconds:
        pairs = zip(dense_seconds, seconds, strict=True)
        speedup = Quartiles.of([theirs / ours for theirs, ours in pairs])
        conversion = speedup.median * costs.timed_macs / costs.dense_macs
    return Row(
        name=name,
        method=costs.method,
        tokens=costs.tokens,
        macs=costs.macs,
        macs_share=costs.macs / costs.dense_macs,
        spent=costs.spent,
        choosing=costs.choosing,
        parameters=costs.parameters,
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
        memory=measured.memory.get(name),
        lost=scored.lost if scored else None,
        won=scored.won if scored else None,
        worst=scored.worst if scored else None,
    )


def report_title(host: Any) -> str:
    """Names the host as its library does, or by its class."""
    settings = getattr(host, "pretrained_cfg", None) or {}
    config = getattr(host, "config", None)
    known = [settings[part] for part in ("architecture", "tag") if settings.get(part)]
    name = ".".join(known) or getattr(config, "name_or_path", "")
    return f"{name or type(host).__name__}: slimmed, beside dense and random"
