"""What each command of `patchslim` does: takes parsed arguments, answers as text and as data.

Nothing is printed here; `main.py` does that. A wrong argument raises a `PatchslimError`, as in
Python.
"""

from __future__ import annotations

import contextlib
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchslim.cli.bench_command import bench as bench
from patchslim.cli.interruption import restore_interrupts
from patchslim.cli.next_steps import dense_argument, measure_command, train_command
from patchslim.cli.plan_command import plan as plan
from patchslim.cli.resolve import (
    budget_from_args,
    dense_from_args,
    dense_model,
    has_budget,
    method_from_args,
    open_calibration_images,
    open_measurement_images,
    open_model,
    open_training_images,
    search_from_args,
    slimmed_model,
    teacher_from_args,
    train_config_from_args,
)
from patchslim.cli.result import CommandResult
from patchslim.cli.terminal import show_name
from patchslim.cli.text import (
    METHOD_GROUPS,
    calibration_lines,
    facts_text,
    method_facts,
    model_facts,
    training_text,
)
from patchslim.errors import DeepCut, PatchslimError, UnknownName, Untrained
from patchslim.hosts._catalog import EXAMPLE, build_without_weights, family_facts
from patchslim.methods._registry import DEFAULT_METHOD, find_method, method_names
from patchslim.model.plan import make_plan
from patchslim.saving.folder import check_saveable, is_saved
from patchslim.schedules.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from patchslim.cli.terminal import Terminal


def demo(args: Namespace, terminal: Terminal) -> CommandResult:
    """Halves the embedded example with every method."""
    from patchslim.cli.demo import demo as run
    from patchslim.cli.demo_runtimes import write_table

    made = run(args.out, scenes=args.scenes, progress=terminal.progress)
    lines = [made.report.table(), write_table(made.runtimes), *made.missing]
    lines.append(f"Written to {show_name(args.out)}")
    runtimes = [asdict(row) for row in made.runtimes]
    data = {**made.report.to_json(), "runtimes": runtimes, "missing_runtimes": made.missing}
    return CommandResult("\n\n".join(lines), data)


def slim(args: Namespace, terminal: Terminal) -> CommandResult:
    """Slims a model, describes it, and saves it if `--out` is given."""
    slimmed = slimmed_model(args, terminal)
    facts = model_facts(args, slimmed.plan)
    lines = [facts_text(facts)]
    if args.out is not None:
        slimmed.save(args.out)
        lines.append(f"saved to       {show_name(args.out)}")
    out = None if args.out is None else str(args.out)
    schedule = slimmed.schedule.to_json()
    return CommandResult("\n".join(lines), {**facts, "schedule": schedule, "out": out})


def calibrate(args: Namespace, terminal: Terminal) -> CommandResult:
    """Calibrates a model into a folder; says what was found per block and what to do next."""
    from patchslim.calibration.calibrate import calibrate as run
    from patchslim.runs.layout import FIGURE_FILE, MODEL_FOLDER, RECORD_FILE

    search = search_from_args(args)
    schedule = None if args.schedule is None else Schedule.load(args.schedule)
    host = dense_model(args)
    images = open_calibration_images(args, host, search)
    with _suggest_resume(args.out):
        calibrated = run(
            host,
            images,
            method_from_args(args, "patch_slimming") if args.set else args.method,
            macs=args.macs,
            tolerance=args.tolerance,
            agreement=args.agreement,
            cap=args.cap,
            schedule=schedule,
            config=search,
            out=args.out,
            resume=args.resume,
            progress=terminal.progress,
        )
    unreadable: list[str] = getattr(images, "unreadable", [])
    _warn_unreadable(unreadable, "left out of the calibration", terminal)
    slimmed, record = calibrated.model, calibrated.record
    model = args.out / MODEL_FOLDER
    facts = model_facts(args, slimmed.plan)
    data = args.data or EXAMPLE
    labelled_data = EXAMPLE if data == EXAMPLE else None
    dense = None if slimmed.trained is None else dense_argument(args)
    measure_it = measure_command(model, labelled_data, None, dense)
    train_it = train_command(args, slimmed, data, labelled=getattr(images, "has_labels", True))
    written = {"model": model, "record": args.out / RECORD_FILE}
    if calibrated.search_result is not None:
        written["figure"] = args.out / FIGURE_FILE
    lines = [
        facts_text({**facts, "settings": {}}),  # the positions of all patches would fill the screen
        *calibration_lines(record),
        *(f"{name:15}{show_name(path)}" for name, path in written.items()),
        f"measure it     {show_name(measure_it)}",
        f"train it       {show_name(train_it)}",
    ]
    more = {
        "record": record,
        "files": {name: str(path) for name, path in written.items()},
        "unreadable": unreadable,
        "measure": measure_it,
        "train": train_it,
    }
    return CommandResult("\n".join(lines), {**facts, **more})


def train(args: Namespace, terminal: Terminal) -> CommandResult | None:
    """Trains a model into a folder and reports on it; None in a process that does not print."""
    from patchslim.runs.layout import MODEL_FOLDER
    from patchslim.training.train import train as run

    with warnings.catch_warnings():
        # Both warn that the model needs training, which is what happens now.
        warnings.simplefilter("ignore", DeepCut)
        warnings.simplefilter("ignore", Untrained)
        slimmed, prepared = open_model(args, terminal)
    config = train_config_from_args(args, slimmed.method)
    teacher = teacher_from_args(args, config)
    images, validation = open_training_images(args, slimmed, prepared, terminal)
    with _suggest_resume(args.out):
        trained = run(
            slimmed,
            images,
            config,
            out=args.out,
            validation=validation,
            teacher=teacher,
            resume=args.resume,
            tensorboard=args.tensorboard,
            progress=terminal.progress,
        )
    if trained.report is None:
        return None
    _warn_unreadable(trained.unreadable, "replaced by others in training", terminal)
    _warn_unreadable(getattr(validation, "unreadable", []), "left out of the validation", terminal)
    model = args.out / MODEL_FOLDER
    data = args.validation or (EXAMPLE if (args.data or args.model) == EXAMPLE else None)
    dense = dense_argument(args) if slimmed.trained is None else None
    measure_it = measure_command(model, data, args.classes, dense)
    lines = [
        trained.report.table(),
        "",
        f"model          {show_name(model)}   (weights after step {trained.step})",
        f"measure it     {show_name(measure_it)}",
    ]
    facts = {
        "model": str(model),
        "step": trained.step,
        "course": config.to_json(),
        "unreadable": list(trained.unreadable),
        "report": trained.report.to_json(),
        "measure": measure_it,
    }
    return CommandResult("\n".join(lines), facts)


def export(args: Namespace, terminal: Terminal) -> CommandResult:
    """Writes models for another runtime, and says what was checked."""
    from patchslim.cli.exporting import run_export

    result, unreadable = run_export(args, terminal)
    _warn_unreadable(unreadable, "left out of the check", terminal)
    return result


def benchmark(args: Namespace, terminal: Terminal) -> CommandResult:
    """Times files on their runtimes, one process a file."""
    from patchslim.benchmarking.benchmark import benchmark as run

    found = run(
        args.files,
        batch=args.batch,
        threads=args.threads,
        rounds=args.rounds,
        warmup=args.warmup,
        streams=args.streams,
        seed=args.seed,
        progress=terminal.progress,
    )
    lines = [found.table()]
    if args.out is not None:
        found.save(args.out)
        lines.append(f"Saved to {show_name(args.out)}")
    if args.csv is not None:
        found.save_csv(args.csv)
        lines.append(f"Saved as CSV to {show_name(args.csv)}")
    return CommandResult("\n\n".join(lines), found.to_json())


def measure(args: Namespace, terminal: Terminal) -> CommandResult:
    """Measures a slimmed model beside its dense host and `random`, or an exported one."""
    from patchslim.cli.artefacts import find_artefact, find_dense_beside
    from patchslim.deployment.measure import measure as run
    from patchslim.report.html import save_page

    if args.card and not is_saved(args.model):
        raise PatchslimError(
            f"--card: {show_name(args.model)} was not saved by patchslim, so it has no model card. "
            "Save the slimmed model first (`patchslim slim ... --out FOLDER`), and measure FOLDER."
        )
    if args.card:
        check_saveable(args.model)
    model: Any = find_artefact(args)
    dense: Any
    if model is None:
        model, prepared = open_model(args, terminal)
        dense = dense_from_args(args, model, terminal)
    else:
        prepared, dense = model.preprocessing, find_dense_beside(args, terminal)
    images = open_measurement_images(args, model, prepared, terminal)
    report = run(
        model,
        images,
        dense=dense,
        batch=args.batch,
        repeats=args.repeats,
        progress=terminal.progress,
    )
    unreadable: list[str] = getattr(images, "unreadable", [])
    _warn_unreadable(unreadable, "left out", terminal)
    text = report.table()
    if args.out is not None:
        report.save(args.out)
        text += f"\n\nSaved to {show_name(args.out)}"
    if args.csv is not None:
        report.save_csv(args.csv)
        text += f"\n\nSaved as CSV to {show_name(args.csv)}"
    if args.html is not None:
        save_page(report, args.html)
        text += f"\n\nSaved as a page to {show_name(args.html)}"
    if args.card:
        model.save(args.model, results=report)
        text += f"\n\nPut into the card of {show_name(args.model)}"
    return CommandResult(text, {**report.to_json(), "unreadable": unreadable})


def macs(args: Namespace, _terminal: Terminal) -> CommandResult:
    """Counts operations exactly, from shapes alone."""
    host = build_without_weights(args.model, args.image_size)
    method = method_from_args(args, DEFAULT_METHOD if has_budget(args) else "identity")
    plan = make_plan(host, method, args.schedule, tail=args.tail, **budget_from_args(args))
    shape = plan.shape
    plan.schedule.warn_if_short(shape.entering, shape.prefix, shape.depth, method, shape.resets)
    facts = model_facts(args, plan)
    facts["image_size"] = list(plan.adapter.describe(host).image_size)
    return CommandResult(facts_text(facts), facts)


def methods(args: Namespace, _terminal: Terminal) -> CommandResult:
    """Lists methods by group, or one: what they do, what they need, what can be set."""
    names = [args.name] if args.name else method_names()
    every = {name: method_facts(find_method(name)) for name in names}
    order = [*METHOD_GROUPS]
    every = dict(sorted(every.items(), key=lambda each: order.index(each[1]["group"])))
    lines: list[str] = []
    shown = ""
    for name, facts in every.items():
        if facts["group"] != shown:
            shown = facts["group"]
            lines += ["", f"Methods that {METHOD_GROUPS[shown]} ({shown}):", ""]
        settings = ", ".join(f"{key}={value}" for key, value in facts["settings"].items())
        training = training_text(facts["training"])
        lines += [
            f"{name}: {facts['doc']}",
            f"  needs: {', '.join(facts['needs']) or 'nothing'}",
            f"  settings: {settings or 'none'}",
            f"  removes tokens by {facts['spread']}",
            *([f"  training defaults: {training}"] if training else []),
        ]
    return CommandResult("\n".join(lines).strip(), every)


def models(args: Namespace, _terminal: Terminal) -> CommandResult:
    """Lists the families of models, and the names that they serve."""
    data, lines = family_facts(args.filter), []
    for facts in data.values():
        label, names, hint = facts["family"], facts["names"], facts.pop("hint", None)
        if names:
            lines += [f"{label}: {len(names)} names", *(f"  {name}" for name in names)]
        elif not args.filter:
            lines.append(f"{label}: " + (f"give {hint}" if hint else facts["unavailable"]))
    if args.filter and not lines:
        every = [name for facts in family_facts().values() for name in facts["names"]]
        raise UnknownName.of("model", args.filter, every)
    if not args.filter:
        lines.append(f"{EXAMPLE}: the embedded example")
    return CommandResult("\n".join(lines), data)


def show(args: Namespace, terminal: Terminal) -> CommandResult:
    """Draws the patches that survive in one image, at several depths."""
    from patchslim.data.images import Images
    from patchslim.data.limits import Limits
    from patchslim.report.patch_maps import trace_patches
    from patchslim.report.patch_pictures import draw_patches, find_picture_format, save_picture

    find_picture_format(args.out)
    slimmed, prepared = open_model(args, terminal)
    limits = Limits.parse(args.limits)
    images = Images.for_host(slimmed, args.image, prepared=prepared, limit=1, limits=limits)
    batch, _ = next(iter(images))
    survivals = trace_patches(slimmed, batch)[0]
    picture = draw_patches(_to_pixels(batch[0], images.mean, images.std), survivals)
    save_picture(picture, args.out)
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
    return CommandResult("\n".join([*lines, f"picture: {show_name(args.out)}"]), facts)


def _warn_unreadable(unreadable: Sequence[str], outcome: str, terminal: Terminal) -> None:
    """Warns of images that could not be read, and names the first three."""
    if unreadable:
        first = "; ".join(unreadable[:3]) + ("; ..." if len(unreadable) > 3 else "")
        terminal.note(f"warning: {len(unreadable)} images are unreadable and {outcome}: {first}")


@contextlib.contextmanager
def _suggest_resume(out: Path) -> Iterator[None]:
    """Adds to the message on Ctrl-C how to continue, if there is a checkpoint to continue from."""
    from patchslim.runs.layout import CHECKPOINT_FILE

    try:
        with restore_interrupts():
            yield
    except KeyboardInterrupt as interrupt:
        if not (out / CHECKPOINT_FILE).is_file():
            raise
        raise KeyboardInterrupt(
            f"{out} has a checkpoint: the same command with --resume goes on from there"
        ) from interrupt


def _to_pixels(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Turns a normalised image (C, H, W) back into pixels: bytes (H, W, 3)."""
    import torch

    pixels = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pixels = (pixels.expand(3, -1, -1) * 255).round().clamp(0, 255).byte()
    return pixels.permute(1, 2, 0).numpy()
