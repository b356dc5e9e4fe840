"""What `patchslim bench` does: takes parsed arguments, answers as text and as data."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patchslim.cli.resolve import dense_model, open_images
from patchslim.cli.result import CommandResult
from patchslim.cli.terminal import show_name
from patchslim.errors import PatchslimError
from patchslim.hosts._catalog import EXAMPLE
from patchslim.methods._registry import check_method_name
from patchslim.model.load import load
from patchslim.saving.folder import is_saved

if TYPE_CHECKING:
    from torch import nn

    from patchslim.cli.terminal import Terminal

AT_ONCE = 32  # images that are read and scored at a time
CALIBRATION = 256  # images to calibrate on


def bench(args: Namespace, terminal: Terminal) -> CommandResult:
    """Measures all cells that are not in the folder yet, and shows all of them."""
    from patchslim.sweep.bench import bench as run
    from patchslim.sweep.resolution import RESOLUTION

    for name in args.methods or ():
        if name != RESOLUTION and not is_saved(name):
            check_method_name(name)
    names = list(dict.fromkeys(args.models))
    if args.weights is not None and len(names) > 1:
        raise PatchslimError("--weights FILE is of one model: give one, or --pretrained.")
    if args.data is None and names != [EXAMPLE]:
        raise PatchslimError(
            "On which images are the models to be compared? Give --data PATH: a folder of images, "
            "an archive of one, a saved Hugging Face dataset, WebDataset shards, or `digits`."
        )
    hosts = {name: dense_model(Namespace(**vars(args), model=name)) for name in names}
    found = run(
        hosts,
        lambda host: _open(args.data or EXAMPLE, "test", args, host, args.limit),
        _contestants(args.methods),
        out=args.out,
        budgets=args.budgets,
        runtimes=args.runtimes,
        precisions=args.precisions,
        batches=args.batches,
        calibration=_calibration(args),
        corruptions=args.corruptions,
        rounds=args.rounds,
        threads=args.threads,
        workers=args.workers,
        seed=args.seed,
        progress=terminal.progress,
    )
    lines = [found.report.table(), *found.lines()]
    there = len(found.cells) - found.measured
    known = f"; {there} were there before" if there else ""
    lines.append(f"{found.measured} cells measured{known}. Saved to {show_name(args.out)}")
    data = {
        **found.report.to_json(),
        "refused": {str(cell): reason for cell, reason in found.refused.items()},
        "measured": found.measured,
        "out": str(args.out),
    }
    return CommandResult("\n\n".join([lines[0], "\n".join(lines[1:])]), data)


def _contestants(names: Sequence[str] | None) -> dict[str, Any] | None:
    """Returns names of methods, and the models in folders, by what was typed."""
    if names is None:
        return None
    return {name: load(name) if is_saved(name) else name for name in names}


def _calibration(args: Namespace) -> Any:
    """Returns what opens the images to calibrate on; None if there are none."""
    path = args.calibration
    if path is None and args.data in (None, EXAMPLE):
        path = EXAMPLE  # whose training scenes are others than the tested ones
    if path is None:
        return None
    return lambda host: _open(path, "train", args, host, CALIBRATION)


def _open(path: str, split: Any, args: Namespace, host: nn.Module, limit: int | None) -> Any:
    """Opens images for a model."""
    scored = split == "test"
    options = Namespace(
        command=args.command,
        classes=args.classes if scored else None,
        limit=limit,
        batch=AT_ONCE,
        limits=args.limits,
    )
    with warnings.catch_warnings():
        if not scored:
            warnings.filterwarnings("ignore", message=".*so labels are left out")
        return open_images(path, split, options, host, None)
