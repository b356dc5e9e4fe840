"""The command line: answers on stdout, all else on stderr, and an exit code for the outcome."""

import json
import os
import pty
import shutil
import signal
import sys

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from child_process import needs_fork, run_patchslim, start_patchslim
from patchslim.cli.main import main
from patchslim.cli.parser import make_parser
from patchslim.cli.terminal import Terminal
from patchslim.methods._registry import method_names
from patchslim.model.load import load

pytestmark = needs_fork
TINY = "test_vit"  # timm's own: 6 blocks, 101 tokens, random weights
COMMANDS = """
    demo slim plan calibrate train export measure bench benchmark macs methods models show
    completion
""".split()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "cat.png"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 180, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def photos(picture):
    folder = picture.parent / "photos"
    folder.mkdir()
    for number in range(4):
        shutil.copy(picture, folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Makes a fine-tuned timm model: its own number of classes, in both kinds of file."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    model = timm.create_model(TINY, num_classes=7)
    save_file(model.state_dict(), folder / "vit.safetensors")
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "vit.pth")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("saved")
    path = folder / "tiny"
    command = ["slim", TINY, "--weights", weights / "vit.safetensors", "--macs", "0.6"]
    assert run_patchslim(folder, *command, "--out", path).code == 0
    return path


# --- each command


def test_macs_prints_the_object_that_is_promised(tmp_path):
    ended = run_patchslim(
        tmp_path, "macs", "deit_small_patch16_224", "--method", "evit", "--keep-rate", "0.7",
        "--at", "3,6,9", "--json",
    )  # fmt: skip
    data = json.loads(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert data["gmacs"] == 3.029
    assert data["dense_gmacs"] == 4.599
    assert data["tokens"] == [197] * 3 + [140] * 3 + [100] * 3 + [72] * 3


def test_macs_of_the_dense_model_and_of_another_size(tmp_path):
    dense = json.loads(run_patchslim(tmp_path, "macs", "deit_small_patch16_224", "--json").out)
    assert (dense["method"], dense["share"]) == ("identity", 1.0)
    large = run_patchslim(tmp_path, "macs", "deit_small_patch16_224", "--image-size", 384, "--json")
    data = json.loads(large.out)
    assert (data["image_size"], data["tokens"][0]) == ([384, 384], 577)


def test_macs_of_a_giant_takes_no_memory(tmp_path):
    data = json.loads(run_patchslim(tmp_path, "macs", "vit_7b_patch16_dinov3", "--json").out)
    assert data["dense_gmacs"] > 1000


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        (["--r", "13"], [88, 75, 62, 49, 36, 23]),
        (["--r", "10,0,10,0,0,0"], [91, 91, 81, 81, 81, 81]),
        (["--r", "10:-1"], [81, 65, 53, 45, 41, 41]),
        (["--keep", "90,80,70,60,50,40"], [90, 80, 70, 60, 50, 40]),
        (["--keep", "0.5", "--method", "topk", "--at", "2"], [101, 101, 51, 51, 51, 51]),
        (["--keep-rate", "0.5", "--at", "1,3", "--method", "evit"], [101, 52, 52, 28, 28, 28]),
        (["--keep-rate", "0.5", "--at", "1", "--method", "evit", "--set", "fuse=false"],
         [101, 51, 51, 51, 51, 51]),
    ],
)  # fmt: skip
def test_every_budget_can_be_spelled(tmp_path, budget, tokens):
    ended = run_patchslim(tmp_path, "macs", TINY, *budget, "--json")
    assert json.loads(ended.out)["tokens"] == tokens


def test_slim_says_what_it_did_and_saves(tmp_path, weights):
    out = tmp_path / "runs" / "tiny"
    command = ["slim", TINY, "--weights", weights / "vit.safetensors", "--macs", "0.6"]
    ended = run_patchslim(tmp_path, *command, "--out", out)
    assert (ended.code, ended.err) == (0, "")
    for part in (
        TINY,
        "tome (proportional=True, threshold=0.0), tail exact",
        "tokens left",
        "choosing adds",
        str(out),
    ):
        assert part in ended.out
    data = json.loads(run_patchslim(tmp_path, *command, "--out", out, "--json").out)
    loaded = load(out)
    assert data["tokens"] == list(loaded.counts())
    assert data["share"] == loaded.macs().total / loaded.dense_macs().total <= 0.6
    assert data["schedule"] == json.loads((out / "recipe.json").read_text())["schedule"]


def test_slim_takes_a_torch_file_and_the_number_of_classes_from_it(tmp_path, weights):
    for name in ("vit.pth", "vit.safetensors"):
        file = weights / name
        assert run_patchslim(
            tmp_path, "slim", TINY, "--weights", file, "--r", 5, "--out", tmp_path / name
        ).code == 0  # fmt: skip
    one, other = load(tmp_path / "vit.pth"), load(tmp_path / "vit.safetensors")
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(one(images), other(images))
        assert one(images).shape == (2, 7)


def test_slim_takes_a_schedule_file_and_settings(tmp_path, saved):
    schedule = tmp_path / "schedule.json"
    schedule.write_text(json.dumps({"kind": "rate", "rate": 0.5, "at": [2]}))
    ended = run_patchslim(
        tmp_path, "slim", TINY, "--method", "evit", "--set", "fuse=false", "--schedule", schedule,
        "--tail", "exact", "--json",
    )  # fmt: skip
    data = json.loads(ended.out)
    assert (data["settings"], data["tail"], data["tokens"][2]) == ({"fuse": False}, "exact", 51)


def test_only_random_weights_are_reported_as_random(tmp_path, weights):
    data = run_patchslim(tmp_path, "slim", TINY, "--macs", "0.6")
    assert "random weights" in data.err
    assert len(data.err.splitlines()) == 1
    trained = run_patchslim(tmp_path, "slim", TINY, "--macs", 0.6, "--weights", weights / "vit.pth")
    assert trained.err == ""


def test_warnings_are_single_lines_on_stderr(tmp_path):
    ended = run_patchslim(tmp_path, "slim", TINY, "--macs", "0.4", "--json")
    assert json.loads(ended.out)["share"] <= 0.4
    lines = ended.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["note", "warning"]
    assert "fine-tuning" in lines[1]


def test_a_hugging_face_folder_is_a_model(tmp_path, picture):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    assert transformers.AutoModelForImageClassification  # imported once, for all child processes
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "hf")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "hf")
    ended = run_patchslim(
        tmp_path, "slim", tmp_path / "hf", "--macs", 0.7, "--out", tmp_path / "slim"
    )
    assert (ended.code, ended.err) == (0, "")
    measured = run_patchslim(
        tmp_path, "measure", tmp_path / "slim", "--data", picture, "--repeats", 0, "--json"
    )
    assert (measured.code, "assumed" in measured.err) == (0, False)
    images = json.loads((tmp_path / "slim" / "recipe.json").read_text())["images"]
    assert images["mean"] == [0.5, 0.5, 0.5]
    assert images["stated"]


def test_measure_a_saved_model_on_a_folder(tmp_path, saved, photos):
    ended = run_patchslim(
        tmp_path, "measure", saved, "--data", photos, "--limit", 5, "--batch", 2, "--repeats", 1,
        "--out", tmp_path / "report.json", "--html", tmp_path / "report.html",
    )  # fmt: skip
    assert ended.code == 0
    for name in ("dense", "tome 0.60", "vs random"):
        assert name in ended.out
    assert "random/<wbr>tome 0.60" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 images are unreadable and left out: broken.png" in ended.err
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == 3


def test_measure_json_is_the_report_and_nothing_else(tmp_path, saved, photos):
    ended = run_patchslim(
        tmp_path, "measure", saved, "--data", photos, "--repeats", 0, "--batch", 4, "--json"
    )
    data = json.loads(ended.out)
    assert data["birth"]["images"] == 4
    assert data["unreadable"][0].startswith("broken.png")
    assert [row["method"] for row in data["rows"]] == ["dense", "tome", "random"]


def test_measure_without_images_measures_costs_and_says_so(tmp_path, saved):
    ended = run_patchslim(tmp_path, "measure", saved, "--repeats", 1, "--batch", 1, "--json")
    rows = json.loads(ended.out)["rows"]
    assert rows[1]["accuracy"] is None
    assert rows[1]["latency"]["repeats"] == 1
    assert "note: without --data" in ended.err


def test_methods_lists_every_file(tmp_path):
    data = json.loads(run_patchslim(tmp_path, "methods", "--json").out)
    assert sorted(data) == method_names()
    assert data["evit"]["settings"] == {"fuse": True}
    assert "class token" in data["topk"]["needs"][0]
    assert data["tome"]["needs"] == []
    assert data["dynamicvit"]["training"] == {"tokens": 0.5, "distil_weight": 0.5, "host_lr": 0.01}
    shown = run_patchslim(tmp_path, "methods").out
    assert all(name in shown for name in method_names())
    assert "training defaults: --tokens 0.5 --distil-weight 0.5 --host-lr 0.01" in shown


def test_models_lists_what_timm_registers(tmp_path):
    data = json.loads(run_patchslim(tmp_path, "models", "--json").out)
    assert "deit_small_patch16_224" in data["timm_vit"]["names"]
    assert "vit_small_patch16_dinov3" in data["timm_eva"]["names"]
    every = [name for family in data.values() for name in family["names"]]
    assert not {"resnet50", "swin_tiny_patch4_window7_224"} & set(every)
    assert len(every) == len(set(every)) > 250
    few = run_patchslim(tmp_path, "models", "dinov3").out
    assert "vit_base_patch16_dinov3" in few
    assert "deit" not in few


def test_show_draws_a_picture_and_counts(tmp_path, saved, picture):
    out = tmp_path / "new" / "patches.png"
    ended = run_patchslim(tmp_path, "show", saved, picture, "--out", out, "--json")
    data = json.loads(ended.out)
    assert ended.code == 0
    assert len(data["left"]) == 3
    with Image.open(out) as drawn:
        assert drawn.width > 4 * 160
    assert run_patchslim(tmp_path, "show", TINY, picture, "--macs", 0.6, "--out", out).code == 0


# --- manners


def test_every_command_has_help_with_an_example():
    text = make_parser().format_help()
    commands = make_parser().commands
    assert list(commands) == COMMANDS
    for name, one in commands.items():
        assert name in text
        shown = one.format_help()
        assert f"patchslim {name}" in shown.partition("example:")[2]
        assert "--json" in shown


def test_wrong_arguments_are_two_lines_and_exit_code_2(tmp_path):
    for argv in ([], ["slimm"], ["slim"], ["slim", TINY, "--keep", "much"],
                 ["macs", TINY, "--image-size", "0"], ["slim", TINY, "--r", "13;4"],
                 ["slim", TINY, "--at", "3;6"], ["slim", TINY, "--tail", "long"]):  # fmt: skip
        ended = run_patchslim(tmp_path, *argv)
        assert (ended.code, ended.out) == (2, "")
        first, second = ended.err.splitlines()
        assert first.startswith("error: ")
        assert second.startswith("help: patchslim")


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("patchslim ")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, weights):
    (tmp_path / "file").write_text("")
    command = ["slim", TINY, "--macs", 0.6, "--weights", weights / "vit.pth"]
    ended = run_patchslim(tmp_path, *command, "--out", tmp_path / "file" / "runs")
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    assert "file" in ended.err


def test_ctrl_c_ends_in_one_line_with_code_130(tmp_path, saved):
    read, write = os.pipe()
    with (tmp_path / "out").open("w") as out:
        child = start_patchslim(
            ["measure", str(saved), "--repeats", "1000000"], out.fileno(), write
        )
    os.close(write)
    with os.fdopen(read) as stream:
        seen = stream.readline() + stream.readline()
        os.kill(child, signal.SIGINT)
        seen += stream.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert "Traceback" not in seen
    assert seen.splitlines()[-1] == "interrupted"


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with (tmp_path / "err").open("w") as err:
        child = start_patchslim(["methods"], write, err.fileno())
        os.close(write)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 141
    assert (tmp_path / "err").read_text() == ""


def test_progress_overwrites_itself_on_a_terminal_and_only_there(monkeypatch, tmp_path):
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        terminal = Terminal()
        terminal.progress("one")
        terminal.progress("two")
        terminal.note("note: three")
        shown = ""
        while not shown.endswith("\n"):
            shown += os.read(leader, 1000).decode()
    os.close(leader)
    assert shown == "\rone\x1b[K\rtwo\x1b[K\r\x1b[Knote: three\r\n"
    with (tmp_path / "log").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        terminal = Terminal()
        for number in range(100):
            terminal.progress(f"round {number}")
        terminal.clear()
    assert (tmp_path / "log").read_text() == "round 0\n"


# --- the embedded example


def test_the_example_is_measured_on_its_own_scenes(tmp_path):
    ended = run_patchslim(
        tmp_path, "measure", "digits", "--macs", 0.6, "--limit", 16, "--repeats", 0, "--json"
    )
    assert (ended.code, ended.err.count("note")) == (0, 0)
    data = json.loads(ended.out)
    assert data["birth"]["images"] == 16
    assert data["rows"][0]["accuracy"]["value"] > 0.8


def test_the_example_is_saved_and_measured_from_the_folder(tmp_path):
    assert (
        run_patchslim(tmp_path, "slim", "digits", "--macs", 0.6, "--out", tmp_path / "a").code == 0
    )
    ended = run_patchslim(
        tmp_path, "measure", tmp_path / "a", "--data", "digits", "--limit", 8, "--repeats", 0,
        "--json",
    )  # fmt: skip
    assert json.loads(ended.out)["birth"]["images"] == 8
