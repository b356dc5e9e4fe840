"""What each command of `patchslim` does: from parsed arguments to an answer, as text and as data.

Nothing is printed here; `cli.py` does that. A wrong argument is a `PatchslimError`, as it is in
Python.
"""

from __future__ import annotations

import contextlib
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.cli.next_steps import dense_name, measuring, training
from patchslim.cli.resolve import (
    asks,
    budget_of,
    course_of,
    dense_model,
    dense_of,
    images_of,
    lessons_of,
    opened,
    reducer_of,
    samples_of,
    search_of,
    slimmed_model,
    teacher_of,
)
from patchslim.cli.text import calibrated_lines, described, facts_of, method_facts
from patchslim.errors import DeepCut, UnknownName, Untrained
from patchslim.hosts._catalog import EXAMPLE, families, shape_only, timm_names
from patchslim.methods._registry import find_reducer, reducer_names
from patchslim.model.check import check_class_token
from patchslim.schedules.budget import counts_of, plan
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Schedule, Tail
from patchslim.tokens.shapes import dense_macs

if TYPE_CHECKING:
    from torch import Tensor

    from patchslim.cli.terminal import Terminal


@dataclass(frozen=True)
class Answer:
    """What a command found, for people and for machines."""

    text: str
    data: Any


def demo(args: Namespace, terminal: Terminal) -> Answer:
    """The embedded example, slimmed with every method at several budgets."""
    from patchslim.cli.demo import demo as run

    report = run(args.out, scenes=args.scenes, progress=terminal.progress)
    return Answer(f"{report.table()}\n\nWritten to {args.out}", report.to_json())


def slim(args: Namespace, terminal: Terminal) -> Answer:
    """A slimmed model, described, and saved where asked."""
    slimmed = slimmed_model(args, terminal)
    facts = facts_of(
        args,
        slimmed.reducer,
        slimmed.counts(),
        (slimmed.macs(), slimmed.dense_macs()),
        slimmed.tail,
    )
    lines = [described(facts)]
    if args.out is not None:
        slimmed.save(args.out)
        lines.append(f"saved to       {args.out}")
    out = None if args.out is None else str(args.out)
    schedule = slimmed.schedule.to_json()
    return Answer("\n".join(lines), {**facts, "schedule": schedule, "out": out})


def calibrate(args: Namespace, terminal: Terminal) -> Answer:
    """A calibrated model in a folder, what was found for each block, and what to do next."""
    from patchslim.calibration.calibrate import calibrate as run
    from patchslim.runs.layout import FIGURE, MODEL, RECORD

    search = search_of(args)
    schedule = None if args.schedule is None else Schedule.load(args.schedule)
    host = dense_model(args)
    images = samples_of(args, host, search)
    with _going_on(args.out):
        calibrated = run(
            host,
            images,
            reducer_of(args, "patch_slimming") if args.set else args.method,
            macs=args.macs,
            tolerance=args.tolerance,
            agreement=args.agreement,
            cap=args.cap,
            schedule=schedule,
            search=search,
            out=args.out,
            resume=args.resume,
            progress=terminal.progress,
        )
    unreadable: list[str] = getattr(images, "unreadable", [])
    _warn_of(unreadable, "left out of the calibration", terminal)
    slimmed, record = calibrated.model, calibrated.record
    model = args.out / MODEL
    costs = (slimmed.macs(), slimmed.dense_macs())
    facts = facts_of(args, slimmed.reducer, slimmed.counts(), costs, slimmed.tail)
    data = args.data or EXAMPLE
    checked = EXAMPLE if data == EXAMPLE else None
    dense = None if slimmed.trained is None else dense_name(args)
    measure_it = measuring(model, checked, None, dense)
    train_it = training(args, slimmed, data, labelled=getattr(images, "labelled", True))
    written = {"model": model, "record": args.out / RECORD}
    if calibrated.found is not None:
        written["figure"] = args.out / FIGURE
    lines = [
        described({**facts, "settings": {}}),  # the order of all cells would fill the screen
        *calibrated_lines(record),
        *(f"{name:15}{path}" for name, path in written.items()),
        f"measure it     {measure_it}",
        f"train it       {train_it}",
    ]
    told = {
        "record": record,
        "files": {name: str(path) for name, path in written.items()},
        "unreadable": unreadable,
        "measure": measure_it,
        "train": train_it,
    }
    return Answer("\n".join(lines), {**facts, **told})


def train(args: Namespace, terminal: Terminal) -> Answer | None:
    """A trained model in a folder, and what it is worth; None in a process that does not speak."""
    from patchslim.training.train import MODEL
    from patchslim.training.train import train as run

    with warnings.catch_warnings():
        # Both say that training is needed.
        warnings.simplefilter("ignore", DeepCut)
        warnings.simplefilter("ignore", Untrained)
        slimmed, prepared = opened(args, terminal)
    course = course_of(args, slimmed.reducer)
    teacher = teacher_of(args, course)
    images, validation = lessons_of(args, slimmed, prepared, terminal)
    with _going_on(args.out):
        trained = run(
            slimmed,
            images,
            course,
            out=args.out,
            validation=validation,
            teacher=teacher,
            resume=args.resume,
            tensorboard=args.tensorboard,
            progress=terminal.progress,
        )
    if trained.report is None:
        return None
    _warn_of(trained.unreadable, "replaced by others in training", terminal)
    _warn_of(getattr(validation, "unreadable", []), "left out of the validation", terminal)
    model = args.out / MODEL
    data = args.validation or (EXAMPLE if (args.data or args.model) == EXAMPLE else None)
    dense = dense_name(args) if slimmed.trained is None else None
    again = measuring(model, data, args.classes, dense)
    lines = [
        trained.report.table(),
        "",
        f"model          {model}   (weights after step {trained.step})",
        f"measure it     {again}",
    ]
    told = {
        "model": str(model),
        "step": trained.step,
        "course": course.to_json(),
        "unreadable": list(trained.unreadable),
        "report": trained.report.to_json(),
        "measure": again,
    }
    return Answer("\n".join(lines), told)


def measure(args: Namespace, terminal: Terminal) -> Answer:
    """A slimmed model beside its dense host and beside `random`."""
    from patchslim.measurement.measure import measure as run

    slimmed, prepared = opened(args, terminal)
    dense = dense_of(args, slimmed, terminal)
    images = images_of(args, slimmed, prepared, terminal)
    report = run(
        slimmed,
        images,
        dense=dense,
        batch=args.batch,
        repeats=args.repeats,
        progress=terminal.progress,
    )
    unreadable: list[str] = getattr(images, "unreadable", [])
    _warn_of(unreadable, "left out", terminal)
    text = report.table()
    if args.out is not None:
        report.save(args.out)
        text += f"\n\nSaved to {args.out}"
    if args.csv is not None:
        report.save_csv(args.csv)
        text += f"\n\nSaved as CSV to {args.csv}"
    return Answer(text, {**report.to_json(), "unreadable": unreadable})


def macs(args: Namespace, _terminal: Terminal) -> Answer:
    """Exact costs, from shapes alone."""
    from patchslim.hosts._registry import find_adapter

    host = shape_only(args.model, args.image_size)
    reducer = reducer_of(args, "tome" if asks(args) else "identity")
    adapter = find_adapter(host)
    check_class_token(host, adapter, reducer)
    shape = adapter.shape(host)
    tail: Tail = args.tail or ("exact" if args.macs is not None else "full")
    rule = plan(shape, reducer, args.schedule, tail=tail, **budget_of(args))
    rule.warn_if_short(shape.entering, shape.prefix, shape.depth, reducer, shape.resets)
    counts = counts_of(rule, shape, reducer)
    cost = slim_macs(shape, reducer, counts, tail=tail == "exact")
    facts = facts_of(args, reducer, counts, (cost, dense_macs(shape)), tail)
    facts["image_size"] = list(adapter.image_shape(host)[1:])
    return Answer(described(facts), facts)


def methods(_args: Namespace, _terminal: Terminal) -> Answer:
    """All methods: what they do, what they need, what can be set."""
    every = {name: method_facts(find_reducer(name)) for name in reducer_names()}
    lines = []
    for name, facts in every.items():
        settings = ", ".join(f"{key}={value}" for key, value in facts["settings"].items())
        lines += [
            f"{name}: {facts['doc']}",
            f"  needs: {', '.join(facts['needs']) or 'nothing'}",
            f"  settings: {settings or 'none'}",
            f"  removes tokens by {facts['spread']}",
        ]
    return Answer("\n".join(lines), every)


def models(args: Namespace, _terminal: Terminal) -> Answer:
    """The families, and the names of timm's registry that they serve."""
    lines, data = [], {}
    for family, called in families().items():
        in_timm = family.startswith("timm_")
        names = timm_names(family, args.filter) if in_timm else []
        data[family] = {"family": called, "names": names}
        if names:
            lines += [f"{called}: {len(names)} names", *(f"  {name}" for name in names)]
        elif not in_timm and not args.filter:
            lines.append(f"{called}: give the folder of such a model")
    if args.filter and not lines:
        every = [
            name for family in data if family.startswith("timm_") for name in timm_names(family)
        ]
        raise UnknownName.of("model", args.filter, every)
    if not args.filter:
        lines.append(f"{EXAMPLE}: the embedded example")
    return Answer("\n".join(lines), data)


def show(args: Namespace, terminal: Terminal) -> Answer:
    """A picture of the patches that survive in one image, at several depths."""
    from patchslim.data.images import Images
    from patchslim.report.patch_maps import draw, survivors

    slimmed, prepared = opened(args, terminal)
    images = Images.for_host(slimmed, args.image, prepared=prepared, limit=1)
    batch, _ = next(iter(images))
    survivals = survivors(slimmed, batch)[0]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(_pixels(batch[0], images.mean, images.std), survivals).save(args.out)
    lines = [
        f"after block {each.block}: {each.slow} patches slow, {each.waiting} wait"
        if each.waiting
        else f"after block {each.block}: {each.left} patches left"
        for each in survivals
    ]
    facts = {
        "left": {each.block: each.left for each in survivals},
        "waiting": {each.block: each.waiting for each in survivals},
        "out": str(args.out),
    }
    return Answer("\n".join([*lines, f"picture: {args.out}"]), facts)


def _warn_of(unreadable: Sequence[str], fate: str, terminal: Terminal) -> None:
    """Says how many images could not be read, and names the first."""
    if unreadable:
        first = "; ".join(unreadable[:3]) + ("; ..." if len(unreadable) > 3 else "")
        terminal.note(f"warning: {len(unreadable)} images are unreadable and {fate}: {first}")


@contextlib.contextmanager
def _going_on(out: Path) -> Iterator[None]:
    """Has an interruption say how to go on, where something was written down."""
    from patchslim.runs.layout import CHECKPOINT

    try:
        yield
    except KeyboardInterrupt as cut:
        if not (out / CHECKPOINT).is_file():
            raise
        raise KeyboardInterrupt(
            f"{out} has a checkpoint: the same command with --resume goes on from there"
        ) from cut


def _pixels(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """A normalised image (C, H, W) as the bytes (H, W, 3) that were prepared."""
    import torch

    shown = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    shown = (shown.expand(3, -1, -1) * 255).round().clamp(0, 255).byte()
    return shown.permute(1, 2, 0).numpy()
