"""The command line: arguments in, one answer on stdout, everything else on stderr.

It knows no models and no methods; `commands.py` does the work. Nothing heavy is imported before
the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from patchslim.cli.options import (
    EXIT_USAGE_ERROR,
    Parser,
    add_classes,
    add_command,
    add_method,
    add_search_options,
    add_training_options,
    add_weights,
    positive_int,
)
from patchslim.cli.terminal import Terminal
from patchslim.errors import PatchslimError

EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141

MODEL_HELP = """\
MODEL is one of
  digits         the embedded example, with its trained weights
  a name         such as deit_small_patch16_224 (`patchslim models` lists them)
  a folder       of a Hugging Face image classifier (config.json and weights)
"""
SAVED_HELP = "  a folder       saved by patchslim; then leave method and budget out\n"
DATA_HELP = (
    "images: a folder, a .zip or .tar of one, a saved Hugging Face dataset, WebDataset shards, or "
    "`digits`"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code of the process."""
    terminal = Terminal()
    try:
        args = make_parser().parse_args(argv)
        terminal.silent = not _is_main_process(args)
        with warnings.catch_warnings():
            _show_warnings(terminal)
            answer = _run_command(args, terminal)
        terminal.clear()
        if answer is not None:
            print(json.dumps(answer.data, indent=2) if args.json else answer.text, flush=True)
    except PatchslimError as error:
        terminal.fail(f"error: {error}")
        return EXIT_USAGE_ERROR
    except KeyboardInterrupt as cut:
        terminal.note("; ".join(["interrupted", *map(str, cut.args)]))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has gone; Python would complain again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except OSError as error:
        terminal.fail(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return EXIT_USAGE_ERROR
    return 0


def make_parser() -> Parser:
    """The parser of all commands."""
    top = Parser(
        prog="patchslim",
        description="Makes a vision transformer faster by giving it fewer patches, with proof.",
        epilog="example: patchslim demo\nexample: patchslim slim deit_small_patch16_224 --macs 0.6",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=_version_text())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_slim(commands)
    _add_calibrate(commands)
    _add_train(commands)
    _add_measure(commands)
    _add_macs(commands)
    _add_lists(commands)
    _add_show(commands)
    return top


def _run_command(args: argparse.Namespace, terminal: Terminal) -> Any:
    """The answer of the command that the arguments name."""
    from patchslim.cli import commands

    run: Callable[[argparse.Namespace, Terminal], Any] = getattr(commands, args.command)
    return run(args, terminal)


def _add_demo(commands: Any) -> None:
    one = add_command(
        commands,
        "demo",
        "slims the embedded example with every method and reports what that costs and wins",
        "patchslim demo --out runs/demo",
    )
    one.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    one.add_argument(
        "--scenes", type=positive_int, default=100, metavar="N", help="images to test on"
    )


def _add_slim(commands: Any) -> None:
    one = add_command(
        commands,
        "slim",
        "slims a model, says what that does to its tokens and operations, and saves it",
        "patchslim slim deit_small_patch16_224 --weights deit.safetensors --method tome \\\n"
        "           --macs 0.6 --out runs/deit-0.6",
        MODEL_HELP,
    )
    one.add_argument("model", metavar="MODEL")
    add_weights(one)
    add_method(one)
    one.add_argument("--out", type=Path, metavar="FOLDER", help="where to save the slimmed model")


def _add_calibrate(commands: Any) -> None:
    one = add_command(
        commands,
        "calibrate",
        "finds, on unlabelled images, which patches each block can do without, or a threshold",
        "patchslim calibrate deit_small_patch16_224 --weights deit.safetensors --macs 0.6 \\\n"
        "           --data imagenet/train --out runs/deit-ps",
        MODEL_HELP,
    )
    one.add_argument("model", metavar="MODEL")
    add_weights(one)
    group = one.add_argument_group("method and goal (give one goal)")
    add = group.add_argument
    add(
        "--method",
        default="patch_slimming",
        metavar="NAME",
        help="patch_slimming (usual), patch_slimming_dynamic; or one that lets images keep "
        "different numbers of patches: similarity, tome, ats, duplicates",
    )
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the latter")
    add("--macs", type=float, metavar="X", help="operations: a share (0.6) or a number (0.8e9)")
    add("--tolerance", type=float, metavar="X", help="the largest --error, instead of a budget")
    add("--agreement", type=float, metavar="X", help="share of answers that stay (thresholds)")
    add("--cap", type=float, metavar="X", help="operations of the costliest image (thresholds)")
    add("--schedule", type=Path, metavar="FILE", help="a saved schedule: the counts, or the cap")
    add = one.add_argument
    add(
        "--data", metavar="PATH", help=f"{DATA_HELP}, which MODEL `digits` has of itself; no labels"
    )
    add("--out", type=Path, required=True, metavar="FOLDER", help="takes all that is written")
    add("--resume", action="store_true", help="go on with the calibration in --out")
    add_search_options(one)


def _add_train(commands: Any) -> None:
    one = add_command(
        commands,
        "train",
        "fine-tunes a slimmed model, by default to answer as the untouched model does",
        "patchslim train deit_small_patch16_224 --weights deit.safetensors --method evit \\\n"
        "           --macs 0.6 --data imagenet/train --validation imagenet/val --out runs/evit",
        MODEL_HELP + SAVED_HELP,
    )
    one.add_argument("model", metavar="MODEL")
    add_weights(one)
    add_method(one)
    add = one.add_argument
    add("--data", metavar="PATH", help=f"{DATA_HELP}, which MODEL `digits` has of itself")
    add("--validation", metavar="PATH", help="other images, to choose the best weights and report")
    add_classes(one)
    add("--limit", type=positive_int, metavar="N", help="how many images of each, evenly spread")
    add("--out", type=Path, required=True, metavar="FOLDER", help="takes all that is written")
    add("--teacher", metavar="MODEL", help="whose answers are learned; the untouched MODEL's")
    add("--teacher-weights", type=Path, metavar="FILE", help="weights of a teacher from timm")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--tensorboard", action="store_true", help="write TensorBoard's files beside log.csv")
    add_training_options(one)


def _add_measure(commands: Any) -> None:
    one = add_command(
        commands,
        "measure",
        "measures a slimmed model beside its dense host and beside random patches",
        "patchslim measure runs/deit-0.6 --data imagenet/val --classes classes.txt --limit 1000",
        MODEL_HELP + SAVED_HELP,
    )
    one.add_argument("model", metavar="MODEL")
    add_weights(one)
    add_method(one)
    one.add_argument("--data", metavar="PATH", help=f"{DATA_HELP}; without it, costs alone")
    add_classes(one)
    one.add_argument(
        "--limit", type=positive_int, metavar="N", help="how many images, evenly spread"
    )
    one.add_argument(
        "--dense",
        metavar="WEIGHTS",
        help="what a trained model was before: a file of weights, `digits`, or a folder of MODEL's",
    )
    one.add_argument(
        "--batch", type=positive_int, default=8, metavar="N", help="images at a time (8)"
    )
    one.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds of timing (20)")
    one.add_argument("--out", type=Path, metavar="FILE", help="where to save the report as JSON")
    one.add_argument("--csv", type=Path, metavar="FILE", help="where to save it in timm's columns")


def _add_macs(commands: Any) -> None:
    one = add_command(
        commands,
        "macs",
        "counts multiply-adds exactly, from shapes alone; needs no weights",
        "patchslim macs deit_small_patch16_224 --method evit --keep-rate 0.7 --at 3,6,9 --json",
        MODEL_HELP,
    )
    one.add_argument("model", metavar="MODEL")
    add_method(one)
    one.add_argument(
        "--image-size", type=positive_int, metavar="N", help="side of the images (models by name)"
    )


def _add_lists(commands: Any) -> None:
    add_command(
        commands,
        "methods",
        "lists the methods, what they need and what can be set",
        "patchslim methods",
    )
    one = add_command(
        commands,
        "models",
        "lists the families of models, and the names of models that they serve",
        "patchslim models dinov3",
    )
    one.add_argument("filter", nargs="?", default="", metavar="FILTER", help="part of a name")


def _add_show(commands: Any) -> None:
    one = add_command(
        commands,
        "show",
        "draws which patches of one image survive, at several depths",
        "patchslim show runs/deit-0.6 cat.jpg --out cat-patches.png",
        MODEL_HELP + SAVED_HELP,
    )
    one.add_argument("model", metavar="MODEL")
    one.add_argument("image", type=Path, metavar="IMAGE")
    add_weights(one)
    add_method(one)
    one.add_argument("--out", type=Path, default=Path("patches.png"), metavar="FILE.png")


def _is_main_process(args: argparse.Namespace) -> bool:
    """Whether this process speaks for all that train together."""
    alone = args.command != "train" or os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


def _show_warnings(terminal: Terminal) -> None:
    """Shows our own warnings in one line each; those of the libraries beneath are not for users."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        terminal.note(f"warning: {message}")

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module="patchslim")
    warnings.showwarning = show


def _version_text() -> str:
    from patchslim.versions import installed_version

    return f"patchslim {installed_version('patchslim') or '(not installed)'}"
