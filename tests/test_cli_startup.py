"""The command line answers at once, and Ctrl-C ends it in one line while Python is importing."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patchslim.cli.parser import make_parser
from patchslim.runs.layout import CHECKPOINT_FILE
from patchslim.versions import package_version
from tiny_training import write_images

SOURCE = str(Path(__file__).resolve().parents[1] / "src")
LIBRARIES = {"torch", "numpy", "timm", "transformers", "PIL", "safetensors", "shtab"}
COMMANDS = list(make_parser().commands)

# What needs no model: the command, its exit code, and a part of what it says.
QUICK = [
    (["--help"], 0, "example: patchslim demo"),
    (["--version"], 0, f"patchslim {package_version()}"),
    *(([command, "--help"], 0, "example:") for command in COMMANDS),
    ([], 2, "the following arguments are required: COMMAND"),
    (["trian"], 2, "invalid choice: 'trian'. Did you mean 'train'?"),
    (["slim"], 2, "the following arguments are required: MODEL"),
    (["train", "digits"], 2, "the following arguments are required: --out"),
    (["slim", "digits", "--mac", "0.6"], 2, "--mac 0.6. Did you mean '--macs'?"),
    (["slim", "digits", "--tail", "exakt"], 2, "invalid choice: 'exakt'. Did you mean 'exact'?"),
    (["slim", "digits", "--macs", "60%"], 2, "'60%' is not a number. A share is written as 0.6."),
    (["measure", "digits", "--device", "cuda"], 2, "unrecognized arguments: --device cuda.\n"),
    (["slim", "digits", "--method", "evitt"], 2, "Unknown method 'evitt'. Did you mean 'evit'"),
]


def start(*argv: str, importtime: bool = False, new_session: bool = False) -> subprocess.Popen[str]:
    """Starts a process, as a user does."""
    command = [sys.executable, *(["-X", "importtime"] if importtime else []), "-m", "patchslim"]
    return subprocess.Popen(
        [*command, *argv],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_session,
    )


# One process answers them all, since most of the time goes into starting Python. Whatever is
# imported stays, so that the first answer that needs a library is the one that is named.
ANSWERING = """
import contextlib, io, json, sys
from patchslim.__main__ import main
libraries = set(json.loads(sys.argv[1]))
answers = []
for argv in json.loads(sys.argv[2]):
    sys.argv = ["patchslim", *argv]
    with contextlib.redirect_stdout(io.StringIO()) as out, \\
            contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code or 0
    loaded = sorted(libraries & set(sys.modules))
    answers.append([code, out.getvalue(), err.getvalue(), loaded])
print(json.dumps(answers))
"""


def test_what_needs_no_model_is_answered_without_torch():
    lists = [json.dumps(sorted(LIBRARIES)), json.dumps([argv for argv, _, _ in QUICK])]
    done = subprocess.run(
        [sys.executable, "-c", ANSWERING, *lists],
        env={**os.environ, "PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answers = json.loads(done.stdout)
    assert len(answers) == len(QUICK)
    for (argv, code, said), (ended, out, err, loaded) in zip(QUICK, answers, strict=True):
        assert (ended, loaded) == (code, []), argv
        assert said in (err if code else out), argv
        assert "Traceback" not in err, argv


@pytest.mark.slow
def test_it_is_answered_in_half_a_second_of_processor_time():
    """Processor time is measured, since other processes on the machine make the clock unfair."""

    def seconds(argv: list[str]) -> float:
        before = os.times()
        start(*argv).communicate()
        after = os.times()
        return after.children_user + after.children_system - (
            before.children_user + before.children_system
        )  # fmt: skip

    for argv, _, _ in QUICK:
        assert statistics.median(seconds(argv) for _ in range(3)) < 0.5, argv


COST = ["macs", "deit_small_patch16_224", "--macs", "0.6"]
# Moments of a start: the module that has just been imported. Not the last one, timm: after it the
# command is over before the signal comes, on a busy machine.
EARLY = ["patchslim.cli.terminal", "patchslim.cli.main", "torch._C"]
LATER = ["torch", "torch.nn", "patchslim.cli.resolve", "timm.layers"]


@pytest.mark.parametrize(
    "module", [*EARLY, *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]
)
def test_ctrl_c_during_the_imports_is_one_line_and_code_130(module):
    process = start(*COST, importtime=True)
    assert process.stderr is not None
    for line in process.stderr:  # import times, one line per module
        if line.rpartition("|")[2].strip() == module:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, out, said) == (130, "", ["interrupted"])


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_a_start_is_one_line_and_code_130(tmp_path):
    """Only after our code has begun; before that Python itself is starting."""
    codes = []
    for number in range(20):
        shown = tmp_path / f"{number}.txt"
        with shown.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-X", "importtime", "-m", "patchslim", *COST],
                env={**os.environ, "PYTHONPATH": SOURCE}, stdout=stream, stderr=stream,
            )  # fmt: skip
            while not re.search(r"\| +signal$", shown.read_text(), flags=re.MULTILINE):
                assert process.poll() is None
                time.sleep(0.0005)
            time.sleep(0.001 * 1.4**number)
            process.send_signal(signal.SIGINT)
            codes.append(process.wait(timeout=60))
        said = [line for line in shown.read_text().splitlines() if "import time:" not in line]
        assert said == ["interrupted"], number
    assert codes == [130] * 20  # the last moment is after 0.6 s, in the middle of torch


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_in_a_real_training_says_how_to_continue(tmp_path, workers):
    """Ctrl-C comes long after the imports; processes that read images get it too, silently."""
    out = tmp_path / "run"
    command = [
        "train", "digits", "--macs", "0.6", "--data", str(write_images(tmp_path / "photos")),
        "--labels", "0", "--batch", "4", "--steps", "100000", "--checkpoint", "1",
        "--workers", str(workers), "--out", str(out),
    ]  # fmt: skip
    process = start(*command, new_session=True)
    while not (out / CHECKPOINT_FILE).exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.count("interrupted") == 1
    assert err.splitlines()[-1].endswith("the same command with --resume goes on from there")
