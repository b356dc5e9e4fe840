"""`measure`: what slimming costs in answers and what it wins in time, beside dense and `random`.

It does not know where the images come from, nor how a report is shown.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.data.source import Source
from patchslim.errors import BadData, UnknownName, UnsupportedModel, WrongInput
from patchslim.hosts._answers import evaluating
from patchslim.hosts._preprocessing import Preparation
from patchslim.measurement.latency import latency
from patchslim.measurement.memory import peak_memory
from patchslim.measurement.score import Batch, Run, Say, Score, score, usable
from patchslim.methods._method import Place, Reducer
from patchslim.methods._registry import reducer_name
from patchslim.methods.random import Random
from patchslim.model.model import SlimModel
from patchslim.report.provenance import Birth
from patchslim.report.report import Report
from patchslim.report.row import Row, Spent, Spread
from patchslim.schedules.schedule import Counts

SAMPLE = 64  # images by which the mean counts of adaptive models are told
WARMUP = 2  # rounds before timing counts: the first calls allocate and choose kernels
Size = tuple[int, int]


@dataclass(frozen=True)
class Taken:
    """What was taken of every call by name, before it is put in rows.

    Of adaptive models: `spent`, what each scored image cost, `timed`, each of those timed, and
    `left`, the mean rows of a sample after each block.
    """

    scores: Mapping[str, Score]
    spent: Mapping[str, list[int]]
    timed: Mapping[str, list[int]]
    left: Mapping[str, tuple[int, ...]]
    seconds: Mapping[str, list[float]]
    memory: Mapping[str, int]
    batch: int


def measure(  # noqa: PLR0913 (what is measured, beside what, and how)
    model: SlimModel | Mapping[str, SlimModel],
    images: Iterable[Batch] | None = None,
    *,
    dense: nn.Module | None = None,
    batch: int = 8,
    repeats: int = 20,
    seed: int = 0,
    baseline: bool = True,
    progress: Say | None = None,
) -> Report:
    """Accuracy, calibration, agreement, MACs, time and memory of models beside their dense host.

    Args:
        model: a slimmed model, or several of one host by name.
        images: batches of float images (B, 3, H, W) with their labels (B,) or None; read once.
            Without images there are only costs, taken on noise. If it says how they are
            `prepared`, as `Images` does, so does the report.
        dense: what they are compared with, where that is not their host: for trained models, the
            host as it was before.
        batch: how many images are timed at a time, and whose memory is taken.
        repeats: rounds of timing; 0 for none.
        seed: of the random baseline and of the noise.
        baseline: whether `random` runs at the very counts of each model.
        progress: is called with one line of text at a time.
    """
    if batch < 1 or repeats < 0:
        raise WrongInput(f"batch={batch}, repeats={repeats}: at least 1 image and 0 rounds.")
    say = progress or (lambda _: None)
    models = _named(model, dense)
    some = next(iter(models.values()))
    adaptive = any(each.reducer.adaptive for each in models.values())
    wide = _spread(images) if adaptive else None  # before it is opened: it is read once more
    sample, batches = _opened(images, some, seed)
    wide = sample if wide is None else wide
    with contextlib.ExitStack() as stack:
        for each in models.values():
            stack.enter_context(evaluating(each))
        stack.enter_context(torch.inference_mode())
        some(_fit(sample[:1], some.host))  # refuses a wrong size before counts are asked for it
        size = (sample.shape[2], sample.shape[3])
        if baseline:
            models = _with_random(models, wide, seed)
        if dense is not None:
            stack.enter_context(evaluating(dense))
        calls: dict[str, nn.Module] = {"dense": dense or some.host, **models}
        spent: dict[str, list[int]] = {name: [] for name in models}
        runs = {name: _run(some, call, spent.get(name)) for name, call in calls.items()}
        scores = score(runs, batches, total=_expected(images), say=say) if batches else {}
        timed = _fit(_tiled(sample, batch), some.host)
        costs = {name: _costs(each, timed) for name, each in models.items()}
        left = {name: _mean_counts(each, wide) for name, each in models.items()}
        seconds = latency(calls, timed, repeats, WARMUP, progress=say) if repeats else {}
        memory = _memory(calls, timed, say)
    taken = Taken(scores, spent, costs, left, seconds, memory, batch)
    rows = [_row("dense", some, size, taken, dense=True)]
    rows += [_row(name, each, size, taken) for name, each in models.items()]
    seen = scores["dense"].images if scores else 0
    birth = Birth.now(some.host, batch=batch, image_size=size, images=seen, seed=seed)
    said = getattr(images, "prepared", None)
    prepared = said if isinstance(said, Preparation) else None
    return Report(tuple(rows), birth, _title(some.host), prepared)


def _memory(calls: Mapping[str, nn.Module], images: Tensor, say: Say) -> dict[str, int]:
    """Peak bytes of one forward pass of each call."""
    peaks: dict[str, int] = {}
    for number, (name, call) in enumerate(calls.items()):
        say(f"memory: model {number + 1}/{len(calls)}")
        peaks[name] = peak_memory(partial(call, images))
    return peaks


def _named(
    model: SlimModel | Mapping[str, SlimModel], dense: nn.Module | None
) -> dict[str, SlimModel]:
    """The models by name, which must be slimmed forms of one host, or of one architecture."""
    if isinstance(model, nn.Module):
        model = {_label(model): model} if isinstance(model, SlimModel) else {"it": model}
    models = dict(model)
    if not models:
        raise UnsupportedModel("There is no model to measure: give at least one.")
    for name, each in models.items():
        if not isinstance(each, SlimModel):
            kind = type(each).__name__
            raise UnsupportedModel(f"measure() takes slimmed models; {name!r} is a {kind}.")
        first = next(iter(models.values()))
        if dense is None and each.host is not first.host:
            raise UnsupportedModel(
                f"{name!r} has another host than the models before it. Models are measured beside "
                "one dense model: slim the same object, say which one it is (dense=), or measure "
                "twice."
            )
        if dense is not None and each.shape() != each.adapter.shape(dense):
            raise UnsupportedModel(
                f"{name!r} is of another architecture than dense=, a {type(dense).__name__}. Give "
                "the model that it was before it was trained."
            )
    if "dense" in models:
        raise UnknownName("'dense' is the untouched host; give the slimmed model another name.")
    return models


def _label(model: SlimModel) -> str:
    """The method and its share of the host's operations, or the most that it may spend."""
    share = f"{model.macs().total / model.dense_macs().total:.2f}"
    return f"{_method(model.reducer)} {'up to ' if model.reducer.adaptive else ''}{share}"


def _method(reducer: Reducer) -> str:
    """The method's name, or a third party's class."""
    return reducer_name(reducer) or type(reducer).__name__


def _opened(
    images: Iterable[Batch] | None, some: SlimModel, seed: int
) -> tuple[Tensor, Iterable[Batch] | None]:
    """A sample of the images to time with, and all batches; noise where there are none."""
    if images is None:
        shape = (1, *some.adapter.image_shape(some.host))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)), None
    if isinstance(images, Tensor):
        raise WrongInput(
            "Got one tensor of images; give batches: [(images, labels)], or [(images, None)]."
        )
    batches = iter(images)
    first = next(batches, None)
    if first is None:
        raise BadData("There are no images to measure on: the iterable of batches is empty.")
    return usable(first, 0)[0], itertools.chain([first], batches)


def _expected(images: Iterable[Batch] | None) -> int | None:
    """How many images there will be, where a list or a loader tells it."""
    if isinstance(images, Sequence):
        return sum(len(batch[0]) for batch in images if isinstance(batch, Sequence) and batch)
    data = getattr(images, "dataset", None)
    return len(data) if isinstance(data, Sized) else None


def _with_random(
    models: Mapping[str, SlimModel], sample: Tensor, seed: int
) -> dict[str, SlimModel]:
    """The models, each followed by `random` at the same counts where that is not there yet.

    A model that leaves images different numbers is followed by `random` at the mean of its counts
    on a sample of the images.
    """
    size = (sample.shape[2], sample.shape[3])
    there = {_counts(each, size) for each in models.values() if isinstance(each.reducer, Random)}
    every: dict[str, SlimModel] = {}
    for name, model in models.items():
        every[name] = model
        counts = _mean_counts(model, sample)
        mark = (counts, model.tail, model.reducer.place)
        if mark in there and not model.reducer.adaptive:
            continue
        there.add(mark)
        shape = model.shape(size)
        rule = Counts(counts, shape.entering, shape.prefix)
        lots = Random(seed=seed)
        lots.place = model.reducer.place  # the same rows everywhere, and so the same cost
        every[f"random/{name}"] = SlimModel(model.host, model.adapter, lots, rule, model.tail)
    return every


def _counts(model: SlimModel, size: Size) -> tuple[tuple[int, ...], str, Place]:
    """What makes two methods cost the same: counts, place, and how the last block is run."""
    return model.counts(size), model.tail, model.reducer.place


def _mean_counts(model: SlimModel, images: Tensor) -> tuple[int, ...]:
    """The rows that images keep after each block; on average, where that is their own affair."""
    if not model.reducer.adaptive:
        return model.counts((images.shape[2], images.shape[3]))
    left = model.counted(_fit(images, model.host))
    whole = [round(sum(rows) / len(rows)) for rows in zip(*left, strict=True)]
    return tuple(max(rows, model.shape().prefix + 1) for rows in whole)


def _spread(images: Iterable[Batch] | None) -> Tensor | None:
    """Images from all over, by which mean counts are told; None where they are read only once."""
    if isinstance(images, Source):
        return torch.cat([batch for batch, _ in images.some(SAMPLE)])
    if isinstance(images, Sequence) and len(images) > 1:
        share = max(1, SAMPLE // len(images))
        some = [usable(batch, number)[0][:share] for number, batch in enumerate(images)]
        if len({each.shape[1:] for each in some}) == 1:
            return torch.cat(some)
    return None


def _costs(model: SlimModel, images: Tensor) -> list[int]:
    """What each image costs."""
    if not model.reducer.adaptive:
        return [model.macs((images.shape[2], images.shape[3])).total]
    return [each.total for each in model.macs_of(images)]


def _run(some: SlimModel, call: nn.Module, spent: list[int] | None) -> Run:
    """The call from images, wherever they lie, to logits; what adaptive models spend is noted."""

    def run(images: Tensor) -> Tensor:
        images = _fit(images, some.host)
        if not isinstance(call, SlimModel) or spent is None or not call.reducer.adaptive:
            return some.adapter.logits(call(images))
        output, costs = call.answer(images)
        spent.extend(each.total for each in costs)
        return some.adapter.logits(output)

    return run


def _fit(images: Tensor, host: nn.Module) -> Tensor:
    """The images on the host's device and, where they are floats, of its type."""
    parameter = next(host.parameters())
    dtype = parameter.dtype if images.is_floating_point() else images.dtype
    return images.to(parameter.device, dtype)


def _tiled(sample: Tensor, batch: int) -> Tensor:
    """`batch` images, the sample repeated where it has fewer."""
    return sample.repeat(-(-batch // len(sample)), 1, 1, 1)[:batch]


def _row(name: str, model: SlimModel, size: Size, taken: Taken, *, dense: bool = False) -> Row:
    """The row of one model, or of its dense host."""
    cost, whole = model.macs(size), model.dense_macs(size)
    macs, spent = (whole.total if dense else cost.total), None
    if not dense and model.reducer.adaptive:
        shares = [each / whole.total for each in taken.spent[name] or taken.timed[name]]
        spent = Spent.of(shares, cost.total / whole.total)
        macs = round(spent.mean * whole.total)
    share = macs / whole.total
    scored, seconds = taken.scores.get(name), taken.seconds.get(name)
    latency = speedup = conversion = throughput = None
    if seconds:
        throughput = Spread.of([taken.batch / each for each in seconds])
        latency = Spread.of([1000 * each / taken.batch for each in seconds])
        ratios = [one / each for one, each in zip(taken.seconds["dense"], seconds, strict=True)]
        speedup = Spread.of(ratios)
        timed = [whole.total] if dense else taken.timed[name]
        conversion = speedup.median * sum(timed) / len(timed) / whole.total
    return Row(
        name=name,
        method="dense" if dense else _method(model.reducer),
        tokens=whole.rows if dense else taken.left[name],
        macs=macs,
        macs_share=share,
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
        memory=taken.memory[name],
    )


def _title(host: Any) -> str:
    """What the host is called."""
    settings = getattr(host, "pretrained_cfg", None) or {}
    config = getattr(host, "config", None)
    known = [settings[part] for part in ("architecture", "tag") if settings.get(part)]
    name = ".".join(known) or getattr(config, "name_or_path", "")
    return f"{name or type(host).__name__}: slimmed, beside dense and random"
