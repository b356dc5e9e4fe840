"""One hostile input, and what patchslim made of it.

Attacks run in forked processes with limits on time and memory, so that a hang, a crash or a bomb
is a verdict and not the end of the suite.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from patchslim.errors import PatchslimError

SECONDS = 30  # more than any of them needs on two busy cores
TOGETHER = 25  # attacks in one process: a fork of all that is loaded costs more than most of them
MEMORY = 3 << 30  # beyond what its process has when it begins


class Verdict(Enum):
    """What became of an attack; the last four are faults."""

    ANSWERED = "answered"
    REFUSED = "refused"
    FOREIGN = "foreign exceptions"
    HUNG = "hangs"
    WRONG = "silently wrong"
    LOST = "lost"

    @property
    def is_fault(self) -> bool:
        return self not in (Verdict.ANSWERED, Verdict.REFUSED)


class SilentlyWrong(AssertionError):
    """An attack raises it where an answer came that no user would want."""


class Lost(AssertionError):
    """An attack raises it where something that was there is gone, or half written."""


@dataclass(frozen=True)
class Attack:
    """`run` gets an empty folder. It returns where the answer is right, and raises where not."""

    name: str
    run: Callable[[Path], object]


@dataclass(frozen=True)
class Outcome:
    """A verdict, and the message or the traceback behind it."""

    attack: str
    verdict: Verdict
    detail: str = ""


def list_kinds() -> list[str]:
    """Names of the modules here that have attacks, found on disk."""
    names = sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [name for name in names if name != "attack" and not name.startswith("_")]


def list_attacks(kind: str, every: int = 1) -> list[Attack]:
    """The attacks of one kind, or every so-manieth of them; the same ones each time."""
    module = importlib.import_module(f"attacks.{kind}")
    attacks: list[Attack] = list(module.attacks())
    names = [attack.name for attack in attacks]
    assert len(set(names)) == len(names), f"{kind}: two attacks have one name"
    return attacks[::every]


def try_attacks(attacks: list[Attack], seconds: float = SECONDS) -> Iterator[Outcome]:
    """Tries one after the other, a number of them in each process, and says what became of each.

    A process that hangs or dies is the verdict on the attack that it was at, and another one goes
    on behind that.
    """
    done = 0
    while done < len(attacks):
        for outcome in try_in_one_process(attacks[done : done + TOGETHER], seconds):
            done += 1
            yield outcome


def try_attack(attack: Attack, seconds: float = SECONDS) -> Outcome:
    """Runs an attack in a process of its own and says what became of it."""
    (outcome,) = try_attacks([attack], seconds)
    return outcome


def try_in_one_process(attacks: list[Attack], seconds: float) -> Iterator[Outcome]:
    """Runs attacks in one process until one hangs or ends it."""
    folder = Path(tempfile.mkdtemp(prefix="attack"))
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        run_in_child(attacks, folder, writer)
    os.close(writer)
    status = None
    try:
        for attack in attacks:
            sent = read_line(reader, time.monotonic() + seconds)
            if sent is None:
                yield Outcome(attack.name, Verdict.HUNG, f"no answer after {seconds:g} s")
                return
            if not sent:
                _, status = os.waitpid(child, 0)
                died = f"the process died with status {status}"
                yield Outcome(attack.name, Verdict.FOREIGN, died)
                return
            verdict, detail = json.loads(sent)
            yield Outcome(attack.name, Verdict(verdict), detail)
    finally:
        os.close(reader)
        kill_group(child)
        if status is None:
            os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)


def run_in_child(attacks: list[Attack], folder: Path, writer: int) -> None:
    """The child's whole life: it runs the attacks, sends a verdict on each, and ends."""
    os.setpgid(0, 0)
    with Path("/proc/self/statm").open() as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    nothing = os.open(os.devnull, os.O_RDWR)
    warnings.simplefilter("ignore")  # a test runner may have made them errors
    environment = dict(os.environ)
    for number, attack in enumerate(attacks):
        own = folder / str(number)
        own.mkdir()
        os.chdir(own)
        for stream in (0, 1, 2):  # the attack before may have closed them
            os.dup2(nothing, stream)
        verdict, detail = judge(attack, own)
        os.write(writer, json.dumps([verdict.value, detail[-4000:]]).encode() + b"\n")
        os.environ.clear()
        os.environ.update(environment)
        shutil.rmtree(own, ignore_errors=True)
    os._exit(0)


def judge(attack: Attack, folder: Path) -> tuple[Verdict, str]:
    """Runs the attack in this process."""
    try:
        attack.run(folder)
    except PatchslimError as refusal:
        return Verdict.REFUSED, f"{type(refusal).__name__}: {refusal}"
    except SilentlyWrong as fault:
        return Verdict.WRONG, str(fault)
    except Lost as fault:
        return Verdict.LOST, str(fault)
    except BaseException:  # noqa: BLE001 - whatever it is, it is the verdict
        return Verdict.FOREIGN, traceback.format_exc()
    return Verdict.ANSWERED, ""


def read_line(reader: int, deadline: float) -> bytes | None:
    """What the child says next, to the end of the line; empty where it has ended, None if late."""
    sent = b""
    while not sent.endswith(b"\n"):
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(reader, 1)
        if not part:
            return b""
        sent += part
    return sent


def kill_group(child: int) -> None:
    """Ends a child and what it has begun."""
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
