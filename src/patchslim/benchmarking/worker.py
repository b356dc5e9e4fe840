"""`Worker`: the process of one file, as the process that measures sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from patchslim import errors
from patchslim.errors import PatchslimError

LAST_LINES = 3  # of what a process that died had printed
PATIENCE = 5  # seconds in which a process may end by itself


class Worker:
    """A process that runs one file when it is told to.

    Attributes:
        path: the file or folder.
        streams: how many streams it runs at once; None for one call on all threads.
        facts: what the file says of itself, once it is open.
        idle: seconds of the processor that it took while it had nothing to do.
        waited: for how many seconds it had nothing to do.
    """

    def __init__(self, path: Path, threads: int, streams: int | None) -> None:
        self.path, self.threads, self.streams = path, threads, streams
        self.facts: dict[str, Any] = {}
        self.idle = self.waited = 0.0
        self._printed = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (`end` closes it)
        # -P keeps modules in the working folder from being taken for installed ones.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "patchslim.benchmarking.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=_environment(threads),
            text=True,
            encoding="utf-8",
        )
        self._since = time.perf_counter()

    def open(self) -> None:
        """Opens the file; an error of its runtime is raised here."""
        order = {"do": "open", "path": str(self.path), "threads": self.threads}
        self.facts = self._ask({**order, "streams": self.streams})

    def time(self, batch: int, calls: int, seed: int) -> float:
        """Seconds of one call, of which it makes `calls`."""
        waited = time.perf_counter() - self._since
        answer = self._ask({"do": "time", "batch": batch, "calls": calls, "seed": seed})
        self.idle += answer["idle"]
        self.waited += waited
        return float(answer["seconds"])

    def look_back(self) -> dict[str, Any]:
        """The most memory that it held, and the nodes of the graph that it ran."""
        return self._ask({"do": "look back"})

    def end(self) -> None:
        """Ends the process, whatever it does."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # it is dead, and an order was on its way
                    continue
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._printed.close()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Sends an order and waits for the answer."""
        orders, answers = self._process.stdin, self._process.stdout
        if orders is None or answers is None:
            raise PatchslimError(f"The process of {self.path} has no pipes.")
        try:
            orders.write(json.dumps(order) + "\n")
            orders.flush()
            line = answers.readline()
        except OSError:
            line = ""
        self._since = time.perf_counter()
        if not line:
            raise PatchslimError(self._say_died())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(errors, answer["kind"], PatchslimError)
            raise kind(answer["error"])
        return answer

    def _say_died(self) -> str:
        """Why the process died, as far as that is known."""
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return f"The process of {self.path} answers no more."
        self._printed.seek(0)
        said = [line.strip() for line in self._printed if line.strip()][-LAST_LINES:]
        reason = f"with exit code {code}"
        if code < 0:
            reason = f"by {signal.Signals(-code).name}"
            if -code == getattr(signal, "SIGKILL", 0):
                reason += " (was there no memory left?)"
        last = f" It said: {' / '.join(said)}" if said else ""
        return f"The process that ran {self.path} ended {reason}.{last}"


def _environment(threads: int) -> dict[str, str]:
    """The environment of a worker: this very package, and as many threads as were asked for."""
    package = str(Path(__file__).parents[2])
    known = os.environ.get("PYTHONPATH")
    paths = package if known is None else os.pathsep.join([package, known])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
