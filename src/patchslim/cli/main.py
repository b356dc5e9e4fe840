"""The command line: arguments in, one answer on stdout, everything else on stderr.

It knows no models and no methods; `commands.py` does the work. torch is imported only when the
arguments are known to be good.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from patchslim.cli.interruption import remember_interrupts, restore_interrupts
from patchslim.cli.options import EXIT_USAGE_ERROR
from patchslim.cli.outputs import own_outputs
from patchslim.cli.parser import make_parser
from patchslim.cli.result import CommandResult
from patchslim.cli.terminal import Terminal
from patchslim.errors import PatchslimError
from patchslim.methods._registry import check_method_name

EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code of the process."""
    terminal = Terminal()
    try:
        with remember_interrupts(), restore_interrupts():
            _answer(argv, terminal)
    except PatchslimError as error:
        terminal.fail(f"error: {error}")
        return EXIT_USAGE_ERROR
    except KeyboardInterrupt as interrupt:
        terminal.note("; ".join(["interrupted", *map(str, interrupt.args)]))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the answer is gone. Python would complain again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except OSError as error:
        terminal.fail(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return EXIT_USAGE_ERROR
    return 0


def _answer(argv: Sequence[str] | None, terminal: Terminal) -> None:
    """Runs the command and prints its answer."""
    args = make_parser().parse_command(argv)
    _check_method(args)
    terminal.silent = not _is_main_process(args)
    with warnings.catch_warnings():
        _show_warnings(terminal)
        result = _run_command(args, terminal)
    terminal.clear()
    if result is not None:
        terminal.answer(json.dumps(result.data, indent=2) if args.json else result.text)


def _check_method(args: argparse.Namespace) -> None:
    """Refuses a method that is not there, before anything takes long."""
    method = getattr(args, "method", None)
    if method == "auto" and args.command != "plan":
        raise PatchslimError(
            f"--method auto: `patchslim plan` finds the best method for a target on this device, "
            f"and saves a model that `patchslim {args.command}` takes."
        )
    if method and method != "auto":
        check_method_name(method)


def _run_command(args: argparse.Namespace, terminal: Terminal) -> CommandResult | None:
    """Runs the command that the arguments name."""
    if args.command == "completion":
        from patchslim.cli.completion import completion

        return completion(args, make_parser())
    # Of processes that train together the first owns what is written.
    with own_outputs(args) if _is_main_process(args) else contextlib.nullcontext():
        from patchslim.cli import commands  # imports torch

        run: Callable[[argparse.Namespace, Terminal], CommandResult | None]
        run = getattr(commands, args.command)
        return run(args, terminal)


def _is_main_process(args: argparse.Namespace) -> bool:
    """Tells whether this process prints, of all the processes that train together."""
    alone = args.command != "train" or os.environ.get("WORLD_SIZE", "1") == "1"
    return alone or os.environ.get("RANK", "0") == "0"


def _show_warnings(terminal: Terminal) -> None:
    """Shows our own warnings in one line each; warnings of other libraries are not for users."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        terminal.note(f"warning: {message}")

    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", module="patchslim")
    warnings.showwarning = show
