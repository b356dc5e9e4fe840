"""What `patchslim plan` does: takes parsed arguments, answers as text and as data."""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from patchslim.cli.resolve import dense_model, method_from_args, open_images
from patchslim.cli.result import CommandResult
from patchslim.cli.terminal import show_name
from patchslim.cli.text import facts_text, model_facts
from patchslim.errors import PatchslimError
from patchslim.hosts._catalog import EXAMPLE

if TYPE_CHECKING:
    from torch import nn

    from patchslim.cli.terminal import Terminal

AT_ONCE = 16  # images that are read and judged at a time


def plan(args: Namespace, terminal: Terminal) -> CommandResult:
    """Plans for this device, says what was predicted and measured, and saves the model."""
    from patchslim.planning.goal import PlanGoal
    from patchslim.planning.plan import AUTO
    from patchslim.planning.plan import plan as run
    from patchslim.saving.folder import check_saveable

    # A wrong target is refused before a model is built.
    PlanGoal(args.latency_ms, args.images_per_second, args.macs, args.max_kl)
    if args.method == AUTO and args.set:
        raise PatchslimError("--set is for one method: name it with --method, or leave it out.")
    method = AUTO if args.method == AUTO else method_from_args(args, args.method)
    if args.out is not None:
        check_saveable(args.out)
    host = dense_model(args)
    planned = run(
        host,
        _open_planning_images(args, host),
        method,
        latency_ms=args.latency_ms,
        images_per_second=args.images_per_second,
        macs=args.macs,
        max_kl=args.max_kl,
        batch=args.batch,
        runtime=args.runtime,
        precision=args.precision,
        threads=args.threads,
        seconds=args.seconds,
        fresh=args.fresh,
        progress=terminal.progress,
    )
    facts = model_facts(args, planned.model.plan)
    lines = [facts_text(facts), *planned.lines()]
    if args.out is not None:
        planned.model.save(args.out)
        lines.append(f"saved to       {show_name(args.out)}")
    out = None if args.out is None else str(args.out)
    return CommandResult("\n".join(lines), {**facts, **planned.to_json(), "out": out})


def _open_planning_images(args: Namespace, host: nn.Module) -> Any:
    """Opens the images to choose with and to report on; they need no labels."""
    data = args.data or (EXAMPLE if args.model == EXAMPLE else None)
    if data is None:
        raise PatchslimError(
            "On which images is it to be chosen what goes? Give --data PATH: a folder of images, "
            "an archive of one, a saved Hugging Face dataset, WebDataset shards, or `digits`. They "
            "need no labels."
        )
    options = Namespace(
        command=args.command, classes=None, limit=args.limit, batch=AT_ONCE, limits=args.limits
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*so labels are left out")
        return open_images(data, "train", options, host, None)
