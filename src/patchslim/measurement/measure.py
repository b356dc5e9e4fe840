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
from patchslim.hosts._answers import eval_mode
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.measurement.latency import latency
from patchslim.measurement.memory import peak_memory
from patchslim.measurement.score import Batch, Forward, Progress, Score, check_batch, score
from patchslim.methods._method import Method, Place
from patchslim.methods._registry import method_name
from patchslim.methods.random import Random
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.report.provenance import Provenance
from patchslim.report.report import Report
from patchslim.report.row import CostDistribution, Quartiles, Row
from patchslim.schedules.schedule import Counts

SAMPLE_SIZE = 64  # images by which the mean counts of adaptive models are told
WARMUP = 2  # rounds before timing counts: the first calls allocate and choose kernels
Size = tuple[int, int]


@dataclass(frozen=True)
class Measurements:
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
    progress: Progress | None = None,
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
    models = _check_models(model, dense)
    some = next(iter(models.values()))
    adaptive = any(each.method.adaptive for each in models.values())
    wide = _draw_sample(images) if adaptive else None  # before it is opened: it is read once more
    sample, batches = _open_images(images, some, seed)
    wide = sample if wide is None else wide
    with contextlib.ExitStack() as stack:
        for each in models.values():
            stack.enter_context(eval_mode(each))
        stack.enter_context(torch.inference_mode())
        some(_to_host(sample[:1], some.host))  # refuses a wrong size before counts are asked for it
        size = (sample.shape[2], sample.shape[3])
        if baseline:
            models = _add_random(models, wide, seed)
        if dense is not None:
            stack.enter_context(eval_mode(dense))
        calls: dict[str, nn.Module] = {"dense": dense or some.host, **models}
        spent: dict[str, list[int]] = {name: [] for name in models}
        runs = {name: _make_forward(some, call, spent.get(name)) for name, call in calls.items()}
        scores = score(runs, batches, total=_count_images(images), say=say) if batches else {}
        timed = _to_host(_fill_batch(sample, batch), some.host)
        costs = {name: _macs_per_image(each, timed) for name, each in models.items()}
        left = {name: _mean_counts(each, wide) for name, each in models.items()}
        seconds = latency(calls, timed, repeats, WARMUP, progress=say) if repeats else {}
        memory = _measure_memory(calls, timed, say)
    taken = Measurements(scores, spent, costs, left, seconds, memory, batch)
    rows = [_make_row("dense", some, size, taken, dense=True)]
    rows += [_make_row(name, each, size, taken) for name, each in models.items()]
    seen = scores["dense"].images if scores else 0
    birth = Provenance.now(some.host, batch=batch, image_size=size, images=seen, seed=seed)
    said = getattr(images, "prepared", None)
    prepared = said if isinstance(said, Preprocessing) else None
    return Report(tuple(rows), birth, _title(some.host), prepared)


def _measure_memory(
    calls: Mapping[str, nn.Module], images: Tensor, say: Progress
) -> dict[str, int]:
    """Peak bytes of one forward pass of each call."""
    peaks: dict[str, int] = {}
    for number, (name, call) in enumerate(calls.items()):
        say(f"memory: model {number + 1}/{len(calls)}")
        peaks[name] = peak_memory(partial(call, images))
    return peaks


def _check_models(
    model: SlimModel | Mapping[str, SlimModel], dense: nn.Module | None
) -> dict[str, SlimModel]:
    """The models by name, which must be slimmed forms of one host, or of one architecture."""
    if isinstance(model, nn.Module):
        model = {_model_label(model): model} if isinstance(model, SlimModel) else {"it": model}
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
        if dense is not None and each.plan.shape != each.plan.adapter.shape(dense):
            raise UnsupportedModel(
                f"{name!r} is of another architecture than dense=, a {type(dense).__name__}. Give "
                "the model that it was before it was trained."
            )
    if "dense" in models:
        raise UnknownName("'dense' is the untouched host; give the slimmed model another name.")
    return models


def _model_label(model: SlimModel) -> str:
    """The method and its share of the host's operations, or the most that it may spend."""
    share = f"{model.macs().total / model.dense_macs().total:.2f}"
    return f"{_method_label(model.method)} {'up to ' if model.method.adaptive else ''}{share}"


def _method_label(method: Method) -> str:
    """The method's name, or a third party's class."""
    return method_name(method) or type(method).__name__


def _open_images(
    images: Iterable[Batch] | None, some: SlimModel, seed: int
) -> tuple[Tensor, Iterable[Batch] | None]:
    """A sample of the images to time with, and all batches; noise where there are none."""
    if images is None:
        shape = (1, *some.plan.adapter.image_shape(some.host))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)), None
    if isinstance(images, Tensor):
        raise WrongInput(
            "Got one tensor of images; give batches: [(images, labels)], or [(images, None)]."
        )
    batches = iter(images)
    first = next(batches, None)
    if first is None:
        raise BadData("There are no images to measure on: the iterable of batches is empty.")
    return check_batch(first, 0)[0], itertools.chain([first], batches)


def _count_images(images: Iterable[Batch] | None) -> int | None:
    """How many images there will be, where a list or a loader tells it."""
    if isinstance(images, Sequence):
        return sum(len(batch[0]) for batch in images if isinstance(batch, Sequence) and batch)
    data = getattr(images, "dataset", None)
    return len(data) if isinstance(data, Sized) else None


def _add_random(models: Mapping[str, SlimModel], sample: Tensor, seed: int) -> dict[str, SlimModel]:
    """The models, each followed by `random` at the same counts where that is not there yet.

    A model that leaves images different numbers is followed by `random` at the mean of its counts
    on a sample of the images.
    """
    size = (sample.shape[2], sample.shape[3])
    there = {_cost_key(each, size) for each in models.values() if isinstance(each.method, Random)}
    every: dict[str, SlimModel] = {}
    for name, model in models.items():
        every[name] = model
        counts = _mean_counts(model, sample)
        mark = (counts, model.plan.tail, model.method.place)
        if mark in there and not model.method.adaptive:
            continue
        there.add(mark)
        shape = model.plan.for_size(model.host, size).shape
        rule = Counts(counts, shape.entering, shape.prefix)
        lots = Random(seed=seed)
        lots.place = model.method.place  # the same rows everywhere, and so the same cost
        every[f"random/{name}"] = SlimModel(
            model.host, plan_schedule(model.host, model.plan.adapter, lots, rule, model.plan.tail)
        )
    return every


def _cost_key(model: SlimModel, size: Size) -> tuple[tuple[int, ...], str, Place]:
    """What makes two methods cost the same: counts, place, and how the last block is run."""
    return model.counts(size), model.plan.tail, model.method.place


def _mean_counts(model: SlimModel, images: Tensor) -> tuple[int, ...]:
    """The rows that images keep after each block; on average, where that is their own affair."""
    if not model.method.adaptive:
        return model.counts((images.shape[2], images.shape[3]))
    left = model.start_pass().count_rows(_to_host(images, model.host))
    whole = [round(sum(rows) / len(rows)) for rows in zip(*left, strict=True)]
    return tuple(max(rows, model.plan.shape.prefix + 1) for rows in whole)


def _draw_sample(images: Iterable[Batch] | None) -> Tensor | None:
    """Images from all over, by which mean counts are told; None where they are read only once."""
    if isinstance(images, Source):
        return torch.cat([batch for batch, _ in images.sample_batches(SAMPLE_SIZE)])
    if isinstance(images, Sequence) and len(images) > 1:
        share = max(1, SAMPLE_SIZE // len(images))
        some = [check_batch(batch, number)[0][:share] for number, batch in enumerate(images)]
        if len({each.shape[1:] for each in some}) == 1:
            return torch.cat(some)
    return None


def _macs_per_image(model: SlimModel, images: Tensor) -> list[int]:
    """What each image costs."""
    if not model.method.adaptive:
        return [model.macs((images.shape[2], images.shape[3])).total]
    return [each.total for each in model.macs_of(images)]


def _make_forward(some: SlimModel, call: nn.Module, spent: list[int] | None) -> Forward:
    """The call from images, wherever they lie, to logits; what adaptive models spend is noted."""

    def run(images: Tensor) -> Tensor:
        images = _to_host(images, some.host)
        if not isinstance(call, SlimModel) or spent is None or not call.method.adaptive:
            return some.plan.adapter.logits(call(images))
        output, costs = call.forward_with_costs(images)
        spent.extend(each.total for each in costs)
        return some.plan.adapter.logits(output)

    return run


def _to_host(images: Tensor, host: nn.Module) -> Tensor:
    """The images on the host's device and, where they are floats, of its type."""
    parameter = next(host.parameters())
    dtype = parameter.dtype if images.is_floating_point() else images.dtype
    return images.to(parameter.device, dtype)


def _fill_batch(sample: Tensor, batch: int) -> Tensor:
    """`batch` images, the sample repeated where it has fewer."""
    return sample.repeat(-(-batch // len(sample)), 1, 1, 1)[:batch]


def _make_row(
    name: str, model: SlimModel, size: Size, taken: Measurements, *, dense: bool = False
) -> Row:
    """The row of one model, or of its dense host."""
    cost, whole = model.macs(size), model.dense_macs(size)
    macs, spent = (whole.total if dense else cost.total), None
    if not dense and model.method.adaptive:
        shares = [each / whole.total for each in taken.spent[name] or taken.timed[name]]
        spent = CostDistribution.of(shares, cost.total / whole.total)
        macs = round(spent.mean * whole.total)
    share = macs / whole.total
    scored, seconds = taken.scores.get(name), taken.seconds.get(name)
    latency = speedup = conversion = throughput = None
    if seconds:
        throughput = Quartiles.of([taken.batch / each for each in seconds])
        latency = Quartiles.of([1000 * each / taken.batch for each in seconds])
        ratios = [one / each for one, each in zip(taken.seconds["dense"], seconds, strict=True)]
        speedup = Quartiles.of(ratios)
        timed = [whole.total] if dense else taken.timed[name]
        conversion = speedup.median * sum(timed) / len(timed) / whole.total
    return Row(
        name=name,
        method="dense" if dense else _method_label(model.method),
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
