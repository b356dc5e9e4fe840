"""Processes that start with everything imported: they run a command, or are killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import pytest

needs_fork = pytest.mark.forks  # skipped where there is no fork, and run before other tests


@dataclass(frozen=True)
class ProcessResult:
    """Exit code and output of a process."""

    code: int
    out: str
    err: str


def fork_child(work: Callable[[], Any]) -> int:
    """Starts a child process that does `work`; returns its id."""
    with warnings.catch_warnings():
        # Newer Pythons warn that threads do not survive a fork; no child here needs them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _work_and_exit(work)
    return child


def start_patchslim(
    argv: list[str], out: int, err: int, first: Callable[[], Any] | None = None
) -> int:
    """Starts a process that runs `patchslim` on these file descriptors; returns its id."""

    def work() -> int:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        if first is not None:
            first()
        from patchslim.cli.main import main

        return main(argv)

    return fork_child(work)


def run_patchslim(
    folder: Path, *argv: object, first: Callable[[], Any] | None = None
) -> ProcessResult:
    """Runs `patchslim` with these arguments to its end, after `first` in a process of its own."""
    if first is None:
        return run_in_process(*argv)
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    with out.open("w") as out_file, err.open("w") as err_file:
        child = start_patchslim(
            [str(arg) for arg in argv], out_file.fileno(), err_file.fileno(), first
        )
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return ProcessResult(code, out.read_text(), err.read_text())


def run_in_process(*argv: object) -> ProcessResult:
    """Runs `patchslim` with these arguments in this process, if none of its own is needed.

    Forking all that the tests have loaded takes longer than most commands.
    """
    from patchslim.cli.main import main

    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except Exception:  # noqa: BLE001 (an interpreter shows whatever comes)
            code = 1
            traceback.print_exc()
    return ProcessResult(code, out.getvalue(), err.getvalue())


def kill_when(work: Callable[[], Any], when: Callable[[], bool]) -> None:
    """Starts a process that does `work`, and kills it as soon as `when` is true.

    On a busy machine that takes a while: after two minutes it is killed anyway.
    """
    child = fork_child(work)
    given_up = time.monotonic() + 120
    while not when() and time.monotonic() < given_up:
        if os.waitpid(child, os.WNOHANG)[0]:
            return  # it has already done its work
        time.sleep(0.0001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _work_and_exit(work: Callable[[], Any]) -> NoReturn:
    """Does the work, and ends as an interpreter would: by the exit code, or with a traceback."""
    code = 1
    try:
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 (an interpreter shows whatever comes)
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 1
        os._exit(code)
