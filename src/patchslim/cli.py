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
from typing import Any, NoReturn

from patchslim.errors import PatchslimError
from patchslim.terminal import Terminal

WRONG = 2  # exit code for a user's mistake, as argparse has it
INTERRUPTED = 130
PIPE_CLOSED = 141

MODEL = """\
MODEL is one of
  digits         the embedded example, with its trained weights
  a timm name    such as deit_small_patch16_224 (`patchslim models` lists them)
  a folder       of a Hugging Face image classifier (config.json and weights)
"""
SAVED = "  a folder       saved by `patchslim slim --out`; then leave method and budget out\n"


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in two lines."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and where to find help."""
        sys.stderr.write(f"error: {message}\nhelp: {self.prog} --help\n")
        sys.exit(WRONG)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code of the process."""
    terminal = Terminal()
    try:
        args = parser().parse_args(argv)
        with warnings.catch_warnings():
            _show_warnings(terminal)
            answer = _run(args, terminal)
        terminal.clear()
        print(json.dumps(answer.data, indent=2) if args.json else answer.text, flush=True)
    except PatchslimError as error:
        terminal.note(f"error: {error}")
        return WRONG
    except KeyboardInterrupt:
        terminal.note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has gone; Python would complain again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        terminal.note(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return WRONG
    return 0


def parser() -> Parser:
    """The parser of all commands."""
    top = Parser(
        prog="patchslim",
        description="Makes a vision transformer faster by giving it fewer patches, with proof.",
        epilog="example: patchslim demo\nexample: patchslim slim deit_small_patch16_224 --macs 0.6",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=_version())
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_slim(commands)
    _add_measure(commands)
    _add_macs(commands)
    _add_lists(commands)
    _add_show(commands)
    return top


def _run(args: argparse.Namespace, terminal: Terminal) -> Any:
    """The answer of the command that the arguments name."""
    from patchslim import commands

    command: Callable[[argparse.Namespace, Terminal], Any] = getattr(commands, args.command)
    return command(args, terminal)


def _add_demo(commands: Any) -> None:
    one = _command(
        commands,
        "demo",
        "slims the embedded example with every method and reports what that costs and wins",
        "patchslim demo --out runs/demo",
    )
    one.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER")
    one.add_argument("--scenes", type=_count, default=400, metavar="N", help="images to test on")


def _add_slim(commands: Any) -> None:
    one = _command(
        commands,
        "slim",
        "slims a model, says what that does to its tokens and operations, and saves it",
        "patchslim slim deit_small_patch16_224 --weights deit.safetensors --method tome \\\n"
        "           --macs 0.6 --out runs/deit-0.6",
        MODEL,
    )
    one.add_argument("model", metavar="MODEL")
    _add_weights(one)
    _add_method(one)
    one.add_argument("--out", type=Path, metavar="FOLDER", help="where to save the slimmed model")


def _add_measure(commands: Any) -> None:
    one = _command(
        commands,
        "measure",
        "measures a slimmed model beside its dense host and beside random patches",
        "patchslim measure runs/deit-0.6 --data imagenet/val --classes classes.txt --limit 1000",
        MODEL + SAVED,
    )
    one.add_argument("model", metavar="MODEL")
    _add_weights(one)
    _add_method(one)
    one.add_argument(
        "--data",
        metavar="PATH",
        help="images: a folder, a .zip or .tar of one, a saved Hugging Face dataset, or `digits`; "
        "without it, costs alone",
    )
    one.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the class folders, by label, one a line",
    )
    one.add_argument("--limit", type=_count, metavar="N", help="how many images, evenly spread")
    one.add_argument("--batch", type=_count, default=8, metavar="N", help="images at a time (8)")
    one.add_argument("--repeats", type=int, default=20, metavar="N", help="rounds of timing (20)")
    one.add_argument("--out", type=Path, metavar="FILE", help="where to save the report as JSON")
    one.add_argument("--csv", type=Path, metavar="FILE", help="where to save it in timm's columns")


def _add_macs(commands: Any) -> None:
    one = _command(
        commands,
        "macs",
        "counts multiply-adds exactly, from shapes alone; needs no weights",
        "patchslim macs deit_small_patch16_224 --method evit --keep-rate 0.7 --at 3,6,9 --json",
        MODEL,
    )
    one.add_argument("model", metavar="MODEL")
    _add_method(one)
    one.add_argument(
        "--image-size", type=_count, metavar="N", help="side of the images (timm names)"
    )


def _add_lists(commands: Any) -> None:
    _command(
        commands,
        "methods",
        "lists the methods, what they need and what can be set",
        "patchslim methods",
    )
    one = _command(
        commands,
        "models",
        "lists the families of models, and the names in timm's registry that they serve",
        "patchslim models dinov3",
    )
    one.add_argument("filter", nargs="?", default="", metavar="FILTER", help="part of a name")


def _add_show(commands: Any) -> None:
    one = _command(
        commands,
        "show",
        "draws which patches of one image survive, at several depths",
        "patchslim show runs/deit-0.6 cat.jpg --out cat-patches.png",
        MODEL + SAVED,
    )
    one.add_argument("model", metavar="MODEL")
    one.add_argument("image", type=Path, metavar="IMAGE")
    _add_weights(one)
    _add_method(one)
    one.add_argument("--out", type=Path, default=Path("patches.png"), metavar="FILE.png")


def _command(commands: Any, name: str, purpose: str, example: str, more: str = "") -> Parser:
    """A command with its help, an example, and the option that machines use."""
    one: Parser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{more}".rstrip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    return one


def _add_weights(one: Parser) -> None:
    group = one.add_argument_group("weights of a timm model")
    group.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors or a torch file")
    group.add_argument("--pretrained", action="store_true", help="let timm fetch its own")


def _add_method(one: Parser) -> None:
    group = one.add_argument_group("method and budget (give one budget)")
    add = group.add_argument
    add("--method", metavar="NAME", help="tome by default; `patchslim methods` lists them")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    add("--macs", type=float, metavar="X", help="operations: a share (0.6) or a number (0.8e9)")
    add(
        "--keep",
        type=_keep,
        metavar="X",
        help="share of patches left at the end, or a count a block",
    )
    add(
        "--r", type=_removed, metavar="N", help="tokens removed a block: 13, or 13,13,...; or 13:-1"
    )
    add("--keep-rate", type=float, metavar="X", help="share of patches kept at each of --at")
    add("--at", type=_numbers, metavar="3,6,9", help="blocks, counted from 0")
    add("--schedule", type=Path, metavar="FILE", help="a saved schedule instead of a budget")
    add(
        "--tail", choices=("exact", "full"), help="what the last block computes (exact with --macs)"
    )


def _count(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3,6,9") from None


def _keep(text: str) -> float | list[int]:
    """A share, or one count a block."""
    return list(_numbers(text)) if "," in text else _float(text)


def _removed(text: str) -> float | list[int] | tuple[float, float]:
    """A number a block, one number for each block, or a number and how it is tilted."""
    if "," in text:
        return list(_numbers(text))
    number, colon, inflect = text.partition(":")
    return (_float(number), _float(inflect)) if colon else _float(number)


def _float(text: str) -> float:
    """A number, whole where it is."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _show_warnings(terminal: Terminal) -> None:
    """Shows our own warnings in one line each; those of the libraries beneath are not for users."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        terminal.note(f"warning: {message}")

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module="patchslim")
    warnings.showwarning = show


def _version() -> str:
    from patchslim.versions import installed

    return f"patchslim {installed('patchslim') or '(not installed)'}"
