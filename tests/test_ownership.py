"""One owner of what is written: a second one is refused at once, and a dead one does not hold."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import patchslim
from child_process import fork_child, needs_fork
from patchslim.errors import BadFile
from patchslim.runs.ownership import LOCK_FILE, Owner, own_file, own_folder
from patchslim.training.config import TrainConfig

pytestmark = needs_fork


def hold(own, path):
    """The id of a process that owns a path until it is killed."""

    def work():
        with own(path):
            (path.parent / "begun").touch()
            time.sleep(300)

    return start(work, path.parent / "begun")


def start(work, begun, seconds=60):
    """The id of a process that does `work`, once it has made the file `begun`."""
    child = fork_child(work)
    end = time.monotonic() + seconds
    while not begun.exists():
        assert time.monotonic() < end, f"no {begun} came"
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "it ended"
        time.sleep(0.005)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("own", [own_folder, own_file])
def test_a_second_process_is_refused_and_told_who_writes(own, tmp_path):
    child = hold(own, tmp_path / "run")
    try:
        begun = time.monotonic()
        with pytest.raises(BadFile) as refusal, own(tmp_path / "run"):
            pass
        assert time.monotonic() - begun < 1
        for word in (str(child), socket.gethostname(), Path(sys.argv[0]).name, "another place"):
            assert word in str(refusal.value)
    finally:
        kill(child)
    with own(tmp_path / "run"):  # the dead one does not hold it
        pass


def test_nothing_is_left_behind(tmp_path):
    with own_folder(tmp_path / "a" / "run"), own_file(tmp_path / "b" / "file.json"):
        assert (tmp_path / "a" / "run" / LOCK_FILE).exists()
    assert not list(tmp_path.iterdir())
    with own_folder(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "log.csv").touch()
    assert [entry.name for entry in (tmp_path / "a" / "run").iterdir()] == ["log.csv"]


def test_the_owner_may_own_again_and_its_threads_may_not(tmp_path):
    refused = []

    def try_it():
        try:
            with own_folder(tmp_path):
                pass
        except BadFile as error:
            refused.append(str(error))

    with own_folder(tmp_path), own_folder(tmp_path):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert str(os.getpid()) in refused[0]
    try_it()
    assert len(refused) == 1


def test_a_forked_process_neither_owns_nor_holds_what_its_parent_does(tmp_path):
    def work():
        with pytest.raises(BadFile), own_folder(tmp_path / "run"):
            pass

    with own_folder(tmp_path / "run"):
        sleeper = fork_child(lambda: time.sleep(300))
        child = fork_child(work)
        assert os.waitpid(child, 0)[1] == 0
    try:
        with own_folder(tmp_path / "run"):  # the sleeper does not hold it, as a worker would not
            pass
    finally:
        kill(sleeper)


def test_what_another_machine_owns_is_refused_until_its_lock_is_deleted(tmp_path):
    owner = {**vars(Owner.this()), "host": "far-away"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(owner))
    with (
        pytest.raises(BadFile, match=rf"on far-away.*delete the file.*{LOCK_FILE}"),
        own_folder(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / LOCK_FILE).read_text()) == owner
    (tmp_path / LOCK_FILE).unlink()
    with own_folder(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "[" * 5000, "\0" * 100])
def test_a_lock_file_that_says_nothing_holds_nobody_back(text, tmp_path):
    (tmp_path / LOCK_FILE).write_text(text)
    with own_folder(tmp_path):
        pass


def test_without_locks_of_the_system_the_process_itself_is_asked_for(tmp_path, monkeypatch):
    """As on a file system that has none: a living process holds, a dead or another one does not."""

    def fail(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", fail)
    child = fork_child(lambda: time.sleep(300))
    owner = {**vars(Owner.this()), "process": child, "started": ""}
    for started, holds in ((owner_start(child), True), ("another boot 7", False)):
        (tmp_path / LOCK_FILE).write_text(json.dumps({**owner, "started": started}))
        if holds:
            with pytest.raises(BadFile, match="delete the file"), own_folder(tmp_path):
                pass
        else:  # its id was given to another process
            with own_folder(tmp_path):
                pass
    kill(child)
    (tmp_path / LOCK_FILE).write_text(json.dumps(owner))
    with own_folder(tmp_path):
        pass


def owner_start(process):
    from patchslim.runs.ownership import _start_time

    return _start_time(process)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(BadFile, match="Could not make the folder"), own_folder(tmp_path / "file"):
        pass
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / LOCK_FILE).symlink_to(tmp_path / "file")
    with pytest.raises(BadFile, match="Could not write"), own_folder(tmp_path / "link"):
        pass
    assert (tmp_path / "file").read_text() == "text"


def slimmed():
    import timm

    torch.manual_seed(0)
    settings = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4}
    host = timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings).eval()
    return patchslim.slim(host, "topk", keep=0.7)


IMAGES = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))]


def train_in(out, *, resume=False, progress=None):
    config = TrainConfig(steps=4, batch=4, checkpoint=1, workers=0)
    patchslim.train(slimmed(), IMAGES, config, out=out, resume=resume, progress=progress)


def calibrate_in(out, *, resume=False, progress=None):
    config = patchslim.PatchSlimmingConfig(mode="free", images=4, probe=2, batch=4)
    patchslim.calibrate(
        slimmed().host, IMAGES, "patch_slimming", tolerance=0.5, config=config,
        out=out, resume=resume, progress=progress,
    )  # fmt: skip


@pytest.mark.parametrize("run", [train_in, calibrate_in])
def test_two_runs_cannot_write_into_one_folder_and_a_killed_one_does_not_hold_it(run, tmp_path):
    out = tmp_path / "run"

    def stop(_):
        (tmp_path / "begun").touch()
        time.sleep(300)

    child = start(lambda: run(out, progress=stop), tmp_path / "begun")
    try:
        with pytest.raises(BadFile, match=rf"being written by process {child} on"):
            run(out, resume=True)
    finally:
        kill(child)

    def note(line):
        raise KeyboardInterrupt(line)

    with pytest.raises(KeyboardInterrupt):  # it goes on, and says so
        run(out, resume=True, progress=note)
    assert not (out / LOCK_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        ["demo", "--out", "{}"],
        ["slim", "digits", "--macs", "0.6", "--out", "{}"],
        ["measure", "digits", "--macs", "0.6", "--out", "{}"],
        ["train", "digits", "--macs", "0.6", "--out", "{}"],
        ["calibrate", "digits", "--macs", "0.6", "--out", "{}"],
    ],
    ids=lambda argv: argv[0],
)
def test_each_command_is_refused_before_anything_takes_long(argv, tmp_path):
    """torch takes seconds to import, and is not imported for a refusal."""
    out = tmp_path / "out"
    own = own_folder if argv[0] in ("demo", "train", "calibrate") else own_file
    code = "import sys; from patchslim.cli.main import main; code = main(); "
    code += "print('torch' in sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", code, *(each.format(out) for each in argv)]
    with own(out):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert f"is being written by process {os.getpid()}" in done.stderr
