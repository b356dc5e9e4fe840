"""`patchslim export`: one model into an artefact, or several of equal weights into a folder."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from patchslim.cli.resolve import open_export_images, open_model, read_labels
from patchslim.cli.result import CommandResult
from patchslim.cli.terminal import show_name
from patchslim.cli.text import facts_text, model_facts
from patchslim.deployment.artefact import Artefact
from patchslim.deployment.budgets import Budgets
from patchslim.deployment.export import export

if TYPE_CHECKING:
    from patchslim.cli.terminal import Terminal


def run_export(args: Namespace, terminal: Terminal) -> tuple[CommandResult, list[str]]:
    """What was written and checked, and the images that could not be read."""
    each_args = [Namespace(**{**vars(args), "model": model}) for model in args.model]
    opened = [open_model(each, terminal) for each in each_args]
    models = [model for model, _ in opened]
    images = open_export_images(each_args[0], *opened[0])
    options: dict[str, Any] = {
        "precision": args.precision,
        "images": images,
        "max_kl": args.max_kl,
        "max_drop": args.max_drop,
        "batch": args.batch,
        "labels": None if args.labels is None else read_labels(args.labels, args.limits),
        "layout": args.layout,
    }
    written: Artefact | Budgets
    if len(models) > 1:
        written = export(models, args.out, args.to, **options)
    else:
        written = export(models[0], args.out, args.to, **options)
    if isinstance(written, Budgets):
        result = _describe_budgets(args, written)
    else:
        result = _describe_one(args, written, model_facts(each_args[0], models[0].plan))
    return result, list(getattr(images, "unreadable", []))


def _describe_one(args: Namespace, artefact: Artefact, facts: dict[str, Any]) -> CommandResult:
    """What was written for one model."""
    facts = {
        **facts,
        "target": artefact.card["target"],
        "precision": artefact.card["precision"],
        "out": str(args.out),
        "bytes": artefact.size,
        "check": artefact.card["checked"],
    }
    kind = f"for {facts['target']} in {facts['precision']}"
    if args.layout is not None:
        kind += f", version 1 for {args.layout}"
    lines = [
        facts_text(facts),
        f"exported       {show_name(args.out)}, {kind}, {artefact.size / 1e6:.1f} MB",
    ]
    if "delegated" in artefact.card:
        facts["delegated"] = artefact.card["delegated"]
        lines.append(
            "delegated      {operators} of {of} operators, in {partitions} parts".format(
                **facts["delegated"]
            )
        )
    lines.append(f"checked        {artefact.check}")
    return CommandResult("\n".join(lines), facts)


def _describe_budgets(args: Namespace, budgets: Budgets) -> CommandResult:
    """What was written for several models, a line for each."""
    cards = {name: each.card for name, each in budgets.items()}
    first = next(iter(cards.values()))
    facts = {
        "target": first["target"],
        "precision": first["precision"],
        "layout": args.layout,
        "out": str(args.out),
        "bytes": budgets.size,
        "bytes_apart": budgets.bytes_apart,
        "models": {
            name: {
                "path": str(budgets[name].path),
                "method": card["method"],
                "tokens": card["tokens"],
                "macs": card["macs"],
                "share": card["macs"] / card["dense_macs"],
                "check": card["checked"],
            }
            for name, card in cards.items()
        },
    }
    kind = f"for {first['target']} in {first['precision']}"
    sizes = f"{budgets.size / 1e6:.1f} MB; apart the models take {budgets.bytes_apart / 1e6:.1f} MB"
    lines = [f"exported       {show_name(args.out)}, {kind}, {sizes}"]
    for number, (name, artefact) in enumerate(budgets.items(), 1):
        version = "" if args.layout is None else f", version {number}"
        lines.append(f"{name:14} {artefact.card['method']}{version}: {artefact.check}")
    return CommandResult("\n".join(lines), facts)
