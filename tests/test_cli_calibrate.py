"""`patchslim calibrate`: what it reads, what it writes, what it says, and how it is stopped."""

import json
import os
import shlex
import shutil
import signal
import time
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from child_process import needs_fork, start_patchslim
from child_process import run_patchslim as run
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.cli.parser import make_parser
from patchslim.model.load import load
from patchslim.runs.layout import CHECKPOINT_FILE, FIGURE_FILE, MODEL_FOLDER, RECORD_FILE
from patchslim.schedules.schedule import Counts
from patchslim.settings import group_settings
from tiny_training import SIDE, write_images

pytestmark = needs_fork
QUICK = ["--images", 6, "--probe", 4, "--batch", 3, "--epochs", 1]
FREE = [*QUICK[:-2], "--mode", "free"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Makes a model with its own weights, weights of a timm model, and images in class folders."""
    at = tmp_path_factory.mktemp("desk")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        image_size=SIDE, patch_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(at / "hf")
    processor = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(at / "hf")
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), at / "vit.safetensors")
    write_images(at / "photos")
    write_images(at / "flat", kinds=(".",), count=6)
    return at


def read_line(text, name):
    """Reads what a line of the answer says after its name."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(name).strip()


def test_it_writes_all_files_and_says_how_to_measure_and_train(desk, tmp_path):
    out = tmp_path / "runs" / "one"
    command = ["calibrate", desk / "hf", "--data", desk / "flat", *QUICK, "--macs", 0.6]
    ended = run(tmp_path, *command, "--out", out)
    assert ended.code == 0, ended.err
    assert {entry.name for entry in out.iterdir()} == {
        CHECKPOINT_FILE,
        MODEL_FOLDER,
        RECORD_FILE,
        FIGURE_FILE,
    }
    record, model = json.loads((out / RECORD_FILE).read_text()), load(out / MODEL_FOLDER)
    assert read_line(ended.out, "method") == "patch_slimming, tail exact"
    assert read_line(ended.out, "tokens left").startswith(" ".join(map(str, model.counts())))
    assert len(read_line(ended.out, "errors").partition(" (")[0].split()) == 2
    assert read_line(ended.out, "tolerance") == f"{record['tolerance']:.3g}, on 6 images"
    assert json.loads(read_line(ended.out, "schedule")) == record["schedule"]
    for name, file in (("model", MODEL_FOLDER), ("record", RECORD_FILE), ("figure", FIGURE_FILE)):
        assert str(out / file) in ended.out
        assert name in ended.out
    measure, train = read_line(ended.out, "measure it"), read_line(ended.out, "train it")
    assert measure == f"patchslim measure {out / MODEL_FOLDER} --dense {desk / 'hf'}"
    assert train == (
        f"patchslim train {out / MODEL_FOLDER} --data {desk / 'flat'} --teacher {desk / 'hf'} "
        f"--labels 0 --out {out / 'trained'}"
    )
    measured = run(tmp_path, *shlex.split(measure)[1:], "--repeats", 0)
    assert (measured.code, "trained host" in measured.err) == (0, False), measured.err
    quick = ["--steps", 1, "--batch", 2, "--workers", 0]
    trained = run(tmp_path, *shlex.split(train)[1:], *quick)
    assert trained.code == 0, trained.err
    assert load(out / "trained" / "model").calibrated == model.calibrated


def test_json_is_everything_and_nothing_else(desk, tmp_path):
    out = tmp_path / "o"
    ended = run(
        tmp_path, "calibrate", desk / "hf", "--data", desk / "photos", *FREE, "--tolerance", 0.05,
        "--method", "patch_slimming_dynamic", "--out", out, "--json",
    )  # fmt: skip
    data = json.loads(ended.out)
    assert ended.code == 0
    assert data["record"] == json.loads((out / RECORD_FILE).read_text())
    assert (data["method"], data["unreadable"]) == ("patch_slimming_dynamic", [])
    assert data["tokens"] == data["record"]["schedule"]["kept"]
    assert data["share"] == data["record"]["macs"]
    assert all(Path(file).exists() for file in data["files"].values())
    assert data["files"]["model"] == str(out / MODEL_FOLDER)
    # Nothing was tuned, so the model's own host is still the dense model.
    assert data["measure"] == f"patchslim measure {out / MODEL_FOLDER}"
    assert "--teacher" not in data["train"]


def test_every_setting_is_an_option_with_its_usual_value():
    options = {action.dest: action for action in make_parser().commands["calibrate"]._actions}
    for each in fields(PatchSlimmingConfig):
        option = options[each.name]
        assert option.option_strings == [f"--{each.name}"]
        assert option.help.startswith(each.metadata["about"])
        assert option.help.endswith(f" ({shown(getattr(PatchSlimmingConfig(), each.name))})")
    assert options["mode"].choices == ("paper", "fast", "free")
    assert options["error"].choices == ("relative", "absolute")


def test_options_override_the_modes_search_defaults(desk, tmp_path):
    ended = run(
        tmp_path, "calibrate", desk / "hf", "--data", desk / "photos", "--mode", "paper", *QUICK,
        "--seed", 4, "--tolerance", 0.01, "--out", tmp_path / "o",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    wanted = PatchSlimmingConfig(mode="paper", images=6, probe=4, batch=3, epochs=1, seed=4)
    assert load(tmp_path / "o" / MODEL_FOLDER).calibrated["search"] == wanted.to_json()
    assert (wanted.step, wanted.error) == (10, "absolute")


def test_a_saved_schedule_is_met(desk, tmp_path):
    Counts((15, 10, 10), 17, 1).save(tmp_path / "counts.json")
    ended = run(
        tmp_path, "calibrate", desk / "hf", "--data", desk / "photos", *FREE, "--schedule",
        tmp_path / "counts.json", "--out", tmp_path / "o",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert read_line(ended.out, "tolerance") == "none, on 6 images"
    assert load(tmp_path / "o" / MODEL_FOLDER).counts() == (15, 10, 10)


def test_a_timm_model_with_weights_on_classes_that_are_not_its_own(desk, tmp_path):
    data = write_images(tmp_path / "photos", kinds="abcdefg", count=1)
    weights = desk / "vit.safetensors"
    ended = run(
        tmp_path, "calibrate", "test_vit", "--weights", weights, "--data", data, *QUICK,
        "--tolerance", 0.5, "--step", 50, "--out", tmp_path / "o",
    )  # fmt: skip
    assert (ended.code, "labels" in ended.err) == (0, False), ended.err
    assert f"--dense {weights}" in read_line(ended.out, "measure it")
    train = read_line(ended.out, "train it")
    assert f"--teacher test_vit --teacher-weights {weights}" in train
    assert "--labels 0" in train


def test_unreadable_images_are_counted_and_named(desk, tmp_path):
    data = shutil.copytree(desk / "photos", tmp_path / "photos")
    (data / "ant" / "2.png").write_bytes(b"no image")
    ended = run(
        tmp_path, "calibrate", desk / "hf", "--data", data, *FREE, "--images", 7, "--tolerance",
        0.05, "--out", tmp_path / "o", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    (warning,) = [line for line in ended.err.splitlines() if line.startswith("warning:")]
    assert "1 images are unreadable and left out of the calibration: ant/2.png" in warning
    record = json.loads(ended.out)
    assert (record["record"]["images"], len(record["unreadable"])) == (6, 1)


def test_progress_shows_layer_candidate_error_and_time_left(desk, tmp_path):
    leader, follower = os.openpty()
    out = tmp_path / "o"
    command = ["calibrate", desk / "hf", "--data", desk / "photos", *QUICK, "--tolerance", 0.05]
    with (tmp_path / "stdout").open("w") as file:
        child = start_patchslim([str(e) for e in [*command, "--out", out]], file.fileno(), follower)
        os.close(follower)
        seen = b""
        while part := read(leader):
            seen += part
    os.close(leader)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lines = seen.decode().split("\r")
    assert any("block 1: " in line and "patches give an error of" in line for line in lines)
    assert any("of 16 patches, error" in line for line in lines)
    assert any("block 0 is done" in line and " left" in line for line in lines)


def read(leader):
    """Reads what a terminal shows next; nothing if nobody writes to it any more."""
    try:
        return os.read(leader, 4096)
    except OSError:
        return b""


def test_resuming_a_finished_run_writes_the_same_again(desk, tmp_path):
    command = ["calibrate", desk / "hf", "--data", desk / "photos", *QUICK, "--tolerance", 0.05]
    command += ["--out", tmp_path / "o"]
    first = run(tmp_path, *command)
    weights = tmp_path / "o" / MODEL_FOLDER / "model.safetensors"
    before = weights.read_bytes()
    again = run(tmp_path, *command, "--resume")
    assert (again.code, again.out) == (0, first.out)
    assert weights.read_bytes() == before


def test_ctrl_c_says_how_to_resume(desk, tmp_path):
    out = tmp_path / "o"
    command = ["calibrate", desk / "hf", "--data", desk / "photos", *QUICK, "--tolerance", 0.05]
    command += ["--epochs", 25, "--out", out]
    read_end, write_end = os.pipe()
    with (tmp_path / "stdout").open("w") as file:
        child = start_patchslim([str(each) for each in command], file.fileno(), write_end)
    os.close(write_end)
    while not (out / CHECKPOINT_FILE).exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGINT)
    with os.fdopen(read_end) as stream:
        seen = stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert "Traceback" not in seen
    said = f"interrupted; {out} has a checkpoint: the same command with --resume goes on from there"
    assert seen.splitlines()[-1] == said
    ended = run(tmp_path, *command, "--resume")
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_the_example_has_images_of_its_own(tmp_path):
    ended = run(
        tmp_path, "calibrate", "digits", "--macs", 0.7, "--images", 8, "--probe", 8, "--mode",
        "free", "--out", tmp_path / "o",
    )  # fmt: skip
    assert (ended.code, "warning" in ended.err) == (0, False), ended.err
    assert read_line(ended.out, "measure it").endswith("--data digits")
    assert "--data digits" in read_line(ended.out, "train it")


def test_the_page_has_every_setting_with_its_default_in_the_groups_of_help():
    page = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    text, usual = make_parser().commands["calibrate"].format_help(), PatchSlimmingConfig()
    for title, settings in group_settings(PatchSlimmingConfig).items():
        assert f"\n{title}:\n  --{settings[0].name} " in text
        heading = f"**{title.capitalize()}**\n\n| option | default | |\n|---|---|---|\n"
        listed = page.partition(heading)[2].partition("\n\n")[0].splitlines()
        assert listed == [
            f"| `--{each.name}` | `{shown(getattr(usual, each.name))}` | {each.metadata['about']} |"
            for each in settings
        ], title


def shown(usual):
    """Writes a value as an option takes it."""
    return f"{usual:g}" if type(usual) is float else str(usual)
