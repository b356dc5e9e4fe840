"""Long commands, stopped at any moment: nothing is lost, and a resumed run ends the same.

Most moments are tried in forked processes, which have imported everything; the ones while Python is
importing need processes of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import patchslim
import patchslim.__main__
from child_process import fork_child, needs_fork
from patchslim.cli import demo
from patchslim.runs.layout import CHECKPOINT_FILE, RECORD_FILE
from tiny_training import trainable_vit, write_images

pytestmark = [needs_fork, pytest.mark.hostile]

SOURCE = str(Path(__file__).resolve().parents[1] / "src")
KILLED, INTERRUPTED, IMPORTING = 20, 30, 10
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A command, and where it writes."""

    argv: tuple[object, ...]
    out: str = "run"
    first: Callable[[], object] = bool  # in its process, before it starts


def commands(desk: Path) -> dict[str, Command]:
    data = ("--data", desk / "photos")
    return {
        "train": Command(
            ("train", desk / "slim", *data, "--batch", 4, "--steps", 6, "--checkpoint", 1,
             "--workers", 0, "--validation", desk / "photos"),
        ),
        "calibrate": Command(
            ("calibrate", "test_vit", "--weights", desk / "vit.safetensors", "--model-kwargs",
             "num_classes=3", *data, "--method", "patch_slimming", "--images", 6,
             "--probe", 4, "--batch", 3, "--epochs", 1, "--macs", 0.6),
        ),
        "measure": Command(
            ("measure", desk / "slim", *data, "--repeats", 1), out="run.json"
        ),
        "slim": Command(("slim", "test_vit", "--macs", 0.6)),
        "export": Command(("export", desk / "small"), out="run.pt2"),
        "plan": Command(
            ("plan", "test_vit", "--weights", desk / "vit.safetensors", "--model-kwargs",
             "num_classes=3", *data, "--method", "topk", "--macs", 0.8, "--batch", 2,
             "--seconds", 0.1),
        ),
        "bench": Command(
            ("bench", "test_vit", "--weights", desk / "vit.safetensors", "--model-kwargs",
             "num_classes=3", *data, "--methods", "topk", "--budgets", 0.8, "--rounds", 1),
        ),
        "demo": Command(("demo", "--scenes", 2), first=shorten_demo),
    }  # fmt: skip


LONG = ("train", "calibrate", "measure", "slim", "export", "plan", "bench", "demo")


def shorten_demo() -> None:
    """A demo of one method at one budget. Calibration is stopped in a command of its own."""
    demo.method_names = lambda: ["tome"]
    demo.write_demo_report.__kwdefaults__ |= {"budgets": (0.7,), "repeats": 1}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A slimmed model and a few pictures."""
    at = tmp_path_factory.mktemp("desk")
    patchslim.slim(trainable_vit(), "tome", r=2).save(at / "slim")
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), at / "vit.safetensors")
    write_images(at / "photos")
    small = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=16, depth=1, num_heads=2, img_size=16, patch_size=4
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        slimmed = patchslim.slim(small.eval(), "topk", keep_rate=0.5, at=(0,), tail="full")
    slimmed.save(at / "small")
    patchslim.export(slimmed, at / "small.pt2")  # imports what no forked process then has to
    return at


def start(command: Command, folder: Path, *more: str) -> int:
    """The id of a process that runs `patchslim` as its start script would, in this folder."""
    argv = arguments(command, folder, *more)

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False)
        sys.argv = ["patchslim", *argv]
        command.first()
        return patchslim.__main__.main()

    return fork_child(work)


def arguments(command: Command, folder: Path, *more: str) -> list[str]:
    return [*map(str, command.argv), "--out", str(folder / command.out), *more]


def end(child: int) -> int:
    """Waits for a process; its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def finish(command: Command, folder: Path, *more: str) -> None:
    folder.mkdir(exist_ok=True)
    assert end(start(command, folder, *more)) == 0, read_errors(folder)


def read_errors(folder: Path) -> str:
    return (folder / "stderr.txt").read_text()


def read_results(command: Command, folder: Path) -> dict[str, object]:
    """What must be the same each time: weights, and everything in a record but time and place."""
    out = folder / command.out
    files = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    found: dict[str, object] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        found[name] = None
        if path.suffix == ".safetensors":
            found[name] = {key: value.tolist() for key, value in load_file(path).items()}
        elif path.name in (RECORD_FILE, "schedule.json"):
            found[name] = json.loads(path.read_text())
        elif path.name == "report.json" and path.parent == out:
            found[name] = [
                (row.name, row.macs, row.accuracy) for row in patchslim.Report.load(path).rows
            ]
        elif path.suffix == ".pt2":
            found[name] = read_archive(path)
    return found


def read_archive(path: Path) -> dict[str, bytes]:
    """The files in a .pt2 file; the first folder in each name is that of the path."""
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def check_whole(command: Command, folder: Path) -> None:
    """Whatever is there can be read."""
    out = folder / command.out
    for path in [out] if out.is_file() else out.rglob("*"):
        if path.is_dir() or path.name.startswith("."):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.name == CHECKPOINT_FILE:
            torch.load(path, weights_only=True)
        elif path.suffix == ".pt2":
            assert read_archive(path)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".svg":
            assert path.read_text().endswith("</svg>\n")
        else:
            assert path.stat().st_size or path.name == "log.csv", path


@dataclass(frozen=True)
class Whole:
    """A run that nobody stopped."""

    command: Command
    seconds: float
    results: dict[str, object]


@pytest.fixture(scope="module", params=LONG)
def whole(request, desk, tmp_path_factory):
    command, folder = commands(desk)[request.param], tmp_path_factory.mktemp("whole")
    begun = time.monotonic()
    finish(command, folder)
    seconds = time.monotonic() - begun
    check_whole(command, folder)
    return Whole(command, seconds, read_results(command, folder))


def stop_after(whole: Whole, folder: Path, share: float, number: signal.Signals) -> int:
    """Starts the command and sends it a signal after a share of its time; its exit code."""
    folder.mkdir()
    child = start(whole.command, folder)
    while not (folder / "stderr.txt").exists():  # a fork takes a while
        time.sleep(0.001)
    time.sleep(whole.seconds * share)
    os.kill(child, number)
    return end(child)


def check_the_rest(whole: Whole, folder: Path) -> None:
    """What is there is whole, and the run can be gone on with, or done again, to the same end."""
    check_whole(whole.command, folder)
    saved = folder / whole.command.out / CHECKPOINT_FILE
    finish(whole.command, folder, *(["--resume"] if saved.exists() else []))
    assert read_results(whole.command, folder) == whole.results


@pytest.mark.parametrize("moment", range(KILLED))
def test_killed_at_any_moment_nothing_is_lost(whole, tmp_path, moment):
    folder = tmp_path / "killed"
    code = stop_after(whole, folder, (moment + 0.5) / KILLED, signal.SIGKILL)
    assert code in (-signal.SIGKILL, 0)
    check_the_rest(whole, folder)


@pytest.mark.parametrize("moment", range(INTERRUPTED))
def test_interrupted_at_any_moment_it_says_so_and_nothing_is_lost(whole, tmp_path, moment):
    folder = tmp_path / "stopped"
    code = stop_after(whole, folder, (moment + 0.5) / INTERRUPTED, signal.SIGINT)
    said = read_errors(folder)
    assert "Traceback" not in said
    if code != 0:  # it was done before the signal came
        assert code == EXIT_INTERRUPTED
        assert sum(line.startswith("interrupted") for line in said.splitlines()) == 1
    check_the_rest(whole, folder)


@pytest.mark.parametrize("moment", range(IMPORTING))
@pytest.mark.parametrize("name", LONG)
def test_interrupted_while_it_imports_it_says_so_and_writes_nothing(name, desk, tmp_path, moment):
    command = commands(desk)[name]
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "patchslim", *arguments(command, tmp_path)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    wanted = ["patchslim.cli.terminal", "torch._C", "torch"][moment % 3]
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == wanted:
            break
    time.sleep(0.02 * moment)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out, said) == (EXIT_INTERRUPTED, "", ["interrupted"])
    assert not (tmp_path / command.out).exists()
