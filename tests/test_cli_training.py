"""`patchslim train`: what it reads, what it writes, what it says, and how it is stopped."""

import json
import os
import re
import shutil
import signal
import socket
import time
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import timm
import webdataset
from safetensors.torch import save_file

import patchslim
from child_process import needs_fork, start_patchslim
from child_process import run_patchslim as run
from patchslim.cli.parser import make_parser
from patchslim.errors import Untrained
from patchslim.model.load import load
from patchslim.runs import checkpoint
from patchslim.runs.layout import CHECKPOINT_FILE, MODEL_FOLDER, REPORT_FILE
from patchslim.runs.log import read_log
from patchslim.settings import group_settings
from patchslim.training.config import TrainConfig
from patchslim.training.train import train
from tiny_training import make_batches, trainable_vit, write_images

pytestmark = needs_fork
QUICK = ["--batch", 4, "--steps", 2, "--workers", 0]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Makes a slimmed model, its dense weights, and images in class folders."""
    at = tmp_path_factory.mktemp("desk")
    patchslim.slim(trainable_vit(), "tome", r=2).save(at / "slim")
    save_file(trainable_vit().state_dict(), at / "vit.safetensors")
    write_images(at / "photos")
    return at


def test_it_writes_a_run_and_says_how_to_measure_it(desk, tmp_path):
    data, out = desk / "photos", tmp_path / "runs" / "one"
    command = ["train", desk / "slim", "--data", data, "--validation", data, *QUICK]
    ended = run(tmp_path, *command, "--lr", 1e-4, "--out", out)
    assert ended.code == 0, ended.err
    assert {entry.name for entry in out.iterdir()} == {
        CHECKPOINT_FILE,
        "log.csv",
        MODEL_FOLDER,
        REPORT_FILE,
    }
    for part in ("dense", "untrained", "trained", f"model          {out / MODEL_FOLDER}"):
        assert part in ended.out
    assert load(out / MODEL_FOLDER).trained["course"]["lr"] == 1e-4
    measure = ended.out.splitlines()[-1].removeprefix("measure it     ")
    assert (
        measure == f"patchslim measure {out / MODEL_FOLDER} --data {data} --dense {desk / 'slim'}"
    )
    measured = run(tmp_path, *measure.split()[1:], "--repeats", 0, "--json")
    assert (measured.code, "note:" in measured.err) == (0, False)
    again = json.loads(measured.out)["rows"]
    (trained,) = [
        row
        for row in json.loads((out / REPORT_FILE).read_text())["rows"]
        if row["name"] == "trained"
    ]
    assert again[1]["kl"] == pytest.approx(trained["kl"])


def interrupt_the_second_checkpoint():
    """PyTorch turns an interrupted write into a RuntimeError about the size of its archive."""
    write, written = checkpoint._HashingFile.write, []

    def interrupted(file, part):
        written.append(file)
        if len(set(written)) == 2 and written.count(file) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return write(file, part)

    checkpoint._HashingFile.write = interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_while_a_checkpoint_is_written_is_no_error(desk, tmp_path):
    out = tmp_path / "run"
    command = ["train", desk / "slim", "--data", desk / "photos", *QUICK, "--checkpoint", 1]
    ended = run(tmp_path, *command, "--out", out, first=interrupt_the_second_checkpoint)
    assert (ended.code, "Traceback" in ended.err) == (130, False)
    assert ended.err.splitlines()[-1].endswith("the same command with --resume goes on from there")
    assert run(tmp_path, *command, "--out", out, "--resume").code == 0


def test_json_is_everything_and_nothing_else(desk, tmp_path):
    ended = run(
        tmp_path, "train", desk / "slim", "--data", desk / "photos", *QUICK, "--out",
        tmp_path / "o", "--json",
    )  # fmt: skip
    data = json.loads(ended.out)
    assert (data["step"], data["unreadable"]) == (2, [])
    assert data["model"] == str(tmp_path / "o" / MODEL_FOLDER)
    assert data["course"] == TrainConfig(batch=4, steps=2, workers=0).to_json()
    assert data["measure"].startswith("patchslim measure")
    assert [row["name"] for row in data["report"]["rows"]][:2] == ["dense", "untrained"]
    assert "note: without --validation" in ended.err


def test_without_dense_weights_measuring_says_with_what_it_compares(desk, tmp_path):
    train(load(desk / "slim"), make_batches(), TrainConfig(steps=1, batch=4), out=tmp_path / "o")
    model = tmp_path / "o" / MODEL_FOLDER
    alone = run(tmp_path, "measure", model, "--repeats", 0)
    assert "note: `dense` is the trained host" in alone.err
    for dense in ("slim", "vit.safetensors"):
        beside = run(tmp_path, "measure", model, "--dense", desk / dense, "--repeats", 0)
        assert (beside.code, "trained host" in beside.err) == (0, False)


def test_every_setting_is_an_option_with_its_usual_value():
    options = {action.dest: action for action in make_parser().commands["train"]._actions}
    for each in fields(TrainConfig):
        option = options[each.name]
        assert option.option_strings == [f"--{each.name.replace('_', '-')}"]
        usual = f"{each.default:g}" if type(each.default) is float else each.default
        shown = f"{each.metadata['about']} ({usual})" if usual else each.metadata["about"]
        assert option.help.startswith(shown)


def test_options_override_the_methods_training_defaults(desk, tmp_path):
    with pytest.warns(Untrained):
        patchslim.slim(trainable_vit(), "dynamicvit", keep=0.7).save(tmp_path / "made")
    ended = run(
        tmp_path, "train", tmp_path / "made", "--data", desk / "photos", *QUICK, "--host-lr", 0.5,
        "--recompute", "--out", tmp_path / "o", "--distil-weight", 0.25,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    config = load(tmp_path / "o" / MODEL_FOLDER).trained["course"]
    assert (config["host_lr"], config["tokens"], config["distil_weight"]) == (0.5, 0.5, 0.25)
    assert config["recompute"]


@pytest.mark.slow
def test_the_example_has_images_of_its_own_and_no_warning_that_training_is_needed(tmp_path):
    ended = run(
        tmp_path, "train", "digits", "--method", "dynamicvit", "--macs", 0.4, "--limit", 8,
        *QUICK, "--out", tmp_path / "o",
    )  # fmt: skip
    assert (ended.code, "warning" in ended.err) == (0, False)
    assert "--data digits --dense digits" in ended.out


def test_a_timm_model_with_weights_and_one_from_scratch(desk, tmp_path):
    data = write_images(tmp_path / "photos", kinds="abcdefg", count=1)
    command = ["train", "test_vit", "--macs", 0.7, "--data", data, *QUICK]
    scratch = run(
        tmp_path, *command, "--distil", "none", "--labels", 1, "--out", tmp_path / "scratch"
    )
    assert scratch.code == 2
    assert "7 class folders and the model 1000 classes" in scratch.err
    save_file(timm_state("test_vit", 7), tmp_path / "seven.safetensors")
    weights = ["--weights", tmp_path / "seven.safetensors"]
    tuned = run(tmp_path, *command, *weights, "--out", tmp_path / "tuned")
    assert (tuned.code, "random weights" in tuned.err) == (0, False)
    assert f"--dense {tmp_path / 'seven.safetensors'}" in tuned.out


def timm_state(name, classes):
    return timm.create_model(name, num_classes=classes).state_dict()


@pytest.mark.parametrize(
    "kind",
    ["shards", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dataset", "zip"))],
)
def test_every_kind_of_data(desk, tmp_path, kind):
    files = sorted((desk / "photos").rglob("*.png"))
    labels = [("ant", "bee", "cat").index(file.parent.name) for file in files]
    place = tmp_path / kind
    if kind == "dataset":
        encoded = [{"bytes": file.read_bytes(), "path": None} for file in files]
        features = datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=["ant", "bee", "cat"])
        )
        made = datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features)
        made.save_to_disk(place)
    elif kind == "shards":
        place.mkdir()
        with webdataset.TarWriter(str(place / "train-000.tar")) as tar:
            for number, (file, label) in enumerate(zip(files, labels, strict=True)):
                tar.write({"__key__": str(number), "png": file.read_bytes(), "cls": str(label)})
    else:
        place = shutil.make_archive(str(place), "zip", desk / "photos")
    ended = run(
        tmp_path, "train", desk / "slim", "--data", place, *QUICK, "--limit", 5, "--json",
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert load(tmp_path / "o" / MODEL_FOLDER).trained["images"] == 5
    measured = run(tmp_path, "measure", desk / "slim", "--data", place, "--repeats", 0, "--json")
    assert json.loads(measured.out)["rows"][0]["accuracy"] is not None


def test_resuming_a_finished_run_writes_the_same_again(desk, tmp_path):
    command = ["train", desk / "slim", "--data", desk / "photos", *QUICK, "--out", tmp_path / "o"]
    assert run(tmp_path, *command).code == 0
    weights = tmp_path / "o" / MODEL_FOLDER / "model.safetensors"
    before, log = weights.read_bytes(), read_log(tmp_path / "o" / "log.csv")
    assert run(tmp_path, *command, "--resume").code == 0
    assert weights.read_bytes() == before
    assert read_log(tmp_path / "o" / "log.csv") == log


@pytest.mark.parametrize(
    ("sent", "checkpoint", "code", "last"),
    [
        (signal.SIGINT, 10_000_000, 130, "interrupted"),
        (signal.SIGINT, 1, 130, "interrupted; {} has a checkpoint: the same command with --resume"),
        (signal.SIGTERM, 10_000_000, 2, "error: Stopped by SIGTERM after step"),
    ],
)
def test_a_run_that_is_stopped_says_how_to_resume(desk, tmp_path, sent, checkpoint, code, last):
    out = tmp_path / "o"
    command = ["train", desk / "slim", "--data", desk / "photos", "--out", out, *QUICK]
    command += ["--steps", 10_000_000, "--checkpoint", checkpoint]
    read, write = os.pipe()
    with (tmp_path / "out").open("w") as file:
        child = start_patchslim([str(each) for each in command], file.fileno(), write)
    os.close(write)
    with os.fdopen(read) as stream:
        seen = ""
        while "step" not in seen:
            seen = stream.readline()
        while checkpoint == 1 and not (out / CHECKPOINT_FILE).exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), stream.read()
            time.sleep(0.001)
        os.kill(child, sent)
        seen = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert "Traceback" not in seen
    assert seen.splitlines()[-1].startswith(last.format(out))
    assert (out / CHECKPOINT_FILE).exists() == (sent == signal.SIGTERM or checkpoint == 1)


def together(tmp_path, *argv, second=()):
    """Runs two processes that train together; returns their exit codes, stdout and stderr.

    The second one has the arguments `second` too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (
            (tmp_path / f"out-{rank}").open("w") as out,
            (tmp_path / f"err-{rank}").open("w") as err,
        ):
            children.append(
                start_patchslim(
                    [str(each) for each in (*argv, *(second if rank else ()))],
                    out.fileno(), err.fileno(),
                    first=lambda place=place: os.environ.update(place),
                )
            )  # fmt: skip
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = [[(tmp_path / f"{kind}-{rank}").read_text() for rank in range(2)]
            for kind in ("out", "err")]  # fmt: skip
    return codes, *said


@pytest.mark.slow
def test_the_first_of_two_processes_prints_and_both_say_why_they_end(desk, tmp_path):
    data = desk / "photos"
    command = ["train", desk / "slim", "--data", data, "--validation", data, *QUICK]
    codes, out, err = together(tmp_path, *command, "--out", tmp_path / "o")
    assert codes == [0, 0], err
    assert "trained" in out[0]
    assert out[1] == ""
    assert "note:" not in err[1]
    codes, out, err = together(tmp_path, *command, "--out", tmp_path / "o")
    assert codes == [2, 2]
    assert all("holds a run already" in each for each in err)


def test_two_processes_that_were_started_differently_are_refused(desk, tmp_path):
    command = ["train", desk / "slim", "--data", desk / "photos", *QUICK, "--out", tmp_path / "o"]
    codes, _, err = together(tmp_path, *command, second=["--lr", 1e-3])
    assert codes == [2, 2]
    assert all("lr is 5e-05 in process 0 and 0.001 in process 1" in each for each in err)
    assert not (tmp_path / "o").exists()


def test_help_lists_settings_in_their_groups_in_the_order_of_a_training():
    groups = group_settings(TrainConfig)
    assert list(groups) == [
        "optimiser",
        "schedule of removal",
        "loss",
        "augmentation",
        "evaluation and checkpoints",
        "machine",
    ]
    shown = make_parser().commands["train"].format_help()
    places = [shown.index(f"\n{title}:\n") for title in groups]
    assert places == sorted(places)
    for (title, settings), start, end in zip(
        groups.items(), places, [*places[1:], len(shown)], strict=True
    ):
        listed = re.findall(r"^  --([a-z-]+)", shown[start:end], flags=re.MULTILINE)
        assert listed == [each.name.replace("_", "-") for each in settings], title


def test_the_page_has_every_setting_with_its_default_in_the_same_groups():
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    for title, settings in group_settings(TrainConfig).items():
        heading = f"**{title.capitalize()}**\n\n| setting | default | |\n|---|---|---|\n"
        listed = page.partition(heading)[2].partition("\n\n")[0].splitlines()
        assert listed == [
            f"| `{each.name}` | `{each.default!r}` | {each.metadata['about']} |"
            for each in settings
        ], title
