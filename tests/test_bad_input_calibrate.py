"""Every mistake in calibrating has one clear answer, and leaves nothing half written.

Two tables, one of mistakes through Python and one of the command line; `bad_input.py` checks
each row.
"""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from timm.models.levit import Levit

import patchslim
from bad_input import check_command, check_python
from child_process import run_in_process
from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.data.images import Images
from patchslim.errors import (
    BadData,
    BadFile,
    BadSchedule,
    BadSetting,
    Diverged,
    ImpossibleBudget,
    UnknownName,
    UnsupportedModel,
    WrongInput,
)
from patchslim.model.load import load
from patchslim.runs.layout import CHECKPOINT_FILE
from patchslim.testing.trial import tiny_host
from tiny_training import SIDE, make_batches, trainable_vit, write_images

FREE = PatchSlimmingConfig(mode="free", images=4, probe=4, batch=4)


def pyramid():
    return Levit(
        img_size=32, stem_type="s8", embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(2, 3)
    ).eval()


def averaging():
    return tiny_host(readout="average")


def small(batch=4, size=16):
    """Makes batches of noise for the tiny host."""
    return [(torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)), None)]


def hugging(folder):
    """Writes a tiny Hugging Face classifier into a folder."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        image_size=SIDE, patch_size=8, num_labels=3,
    )  # fmt: skip
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Makes everything that is wrong, and what is right beside it."""
    at = tmp_path_factory.mktemp("desk")
    made = SimpleNamespace(at=at, vit=trainable_vit())
    made.slim = patchslim.slim(made.vit, "tome", r=2)
    made.slim.save(at / "slim")
    torch.manual_seed(0)
    hugging(at / "hf")
    save_file(trainable_vit().state_dict(), at / "vit.safetensors")
    write_images(at / "photos")
    (at / "empty").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        (at / "broken").mkdir(exist_ok=True)
        (at / "broken" / name).write_bytes(b"no image")
    calibrate(made.vit, make_batches(), tolerance=0.1, config=FREE, out=at / "run")
    line = "calibrate {}/hf --data {}/photos --tolerance 0.1 --mode free --out {}/cli"
    assert run_in_process(*line.replace("{}", str(at)).split()).code == 0
    shutil.copytree(at / "run", at / "cut")
    whole = (at / "run" / CHECKPOINT_FILE).read_bytes()
    (at / "cut" / CHECKPOINT_FILE).write_bytes(whole[: len(whole) // 2])
    (at / "file").write_text("a file")
    return made


def fit(desk, out, *, host=None, data=None, search=FREE, **asked):
    """Runs a short calibration in which one thing is wrong."""
    if not {"macs", "tolerance", "schedule"} & asked.keys():
        asked["tolerance"] = 0.1
    return calibrate(host or desk.vit, data or make_batches(), out=out, config=search, **asked)


def tuned(**given):
    return PatchSlimmingConfig(**{"images": 4, "batch": 4, "epochs": 2, "lr": 1e-2} | given)


# name: (what is done, the kind of error, words that the message must have)
PYTHON = {
    "no images": (
        lambda d, out: calibrate(d.vit, [], tolerance=0.1, out=out),
        BadData, "no images | need no labels"),
    "an empty folder": (
        lambda d, out: fit(d, out, data=Images.for_host(d.vit, d.at / "empty")),
        BadData, "empty | looked for .jpg"),
    "only unreadable images": (
        lambda d, out: fit(d, out, data=Images.for_host(d.vit, d.at / "broken")),
        BadData, "None of the 3 images | 0.png"),
    "an empty batch": (
        lambda d, out: fit(d, out, data=[(torch.zeros(0, 3, SIDE, SIDE), None)]),
        BadData, "Batch 0 | no images"),
    "batches that are none": (
        lambda d, out: fit(d, out, data=[torch.zeros(4, 3, SIDE, SIDE)]),
        WrongInput, "Batch 0 is a Tensor | pair"),
    "images with NaN": (
        lambda d, out: fit(d, out, data=make_batches(bad=[2])),
        WrongInput, "Image 2 of batch 0 | NaN"),
    "images of several sizes": (
        lambda d, out: fit(d, out, data=[*make_batches((0,)), *small(1, 16)]),
        BadData, "several sizes"),
    "images of another size": (
        lambda d, out: fit(d, out, data=small(4, 16)),
        WrongInput, "16x16 | 32x32 | Resize them"),
    "images of another size for a host that takes any": (
        lambda d, out: fit(d, out, host=tiny_host(dynamic_img_size=True), data=small(4, 32)),
        WrongInput, "32x32 | 16x16 | img_size="),
    "no budget": (
        lambda d, out: calibrate(d.vit, make_batches(), out=out),
        BadSchedule, "Give one of macs | tolerance | not none"),
    "two budgets": (
        lambda d, out: fit(d, out, macs=0.6, tolerance=0.1),
        BadSchedule, "Give one of macs | not macs and tolerance"),
    "tolerance of nothing": (
        lambda d, out: fit(d, out, tolerance=0.0), BadSchedule, "tolerance=0.0 | above 0"),
    "tolerance that is no number": (
        lambda d, out: fit(d, out, tolerance=float("nan")), BadSchedule, "tolerance=nan | above 0"),
    "tolerance without an end": (
        lambda d, out: fit(d, out, tolerance=float("inf")), BadSchedule, "tolerance=inf | above 0"),
    "budget out of reach": (
        lambda d, out: fit(d, out, macs=0.05),
        ImpossibleBudget, "macs=0.05 is 0.050 | 1 patches in each block | Give more"),
    "budget out of reach of a head that reads all": (
        lambda d, out: fit(d, out, host=averaging(), data=small(), macs=0.2,
                           search=PatchSlimmingConfig(mode="free", images=4, outputs=0.8)),
        ImpossibleBudget, "macs=0.2 | 13 patches in each block | smaller share of outputs"),
    "budget that is none": (
        lambda d, out: fit(d, out, macs=60), ImpossibleBudget, "macs=60 | 0.6"),
    "tolerance that no candidate meets, tuned once": (
        lambda d, out: fit(d, out, tolerance=1e-8, search=tuned(slack=1e6)),
        ImpossibleBudget, "block 0 | all its 16 patches | Give a larger one | macs="),
    "tolerance that no candidate meets, tuned each time": (
        lambda d, out: fit(d, out, tolerance=1e-9, search=tuned(mode="paper")),
        ImpossibleBudget, "block 1 | all its 16 patches | 1e-09 | Give a larger one"),
    "a budget in the mode of the paper": (
        lambda d, out: fit(d, out, macs=0.6, search=tuned(mode="paper")),
        BadSchedule, "mode='paper' | tolerance=0.01 | mode='fast'"),
    "unknown mode": (
        lambda d, out: PatchSlimmingConfig(mode="papre"),
        UnknownName, "mode 'papre' | Did you mean 'paper'"),
    "unknown error": (
        lambda d, out: PatchSlimmingConfig(error="absolut"), UnknownName, "'absolut' | 'absolute'"),
    "unknown setting": (
        lambda d, out: PatchSlimmingConfig.of({"epoch": 3}),
        UnknownName, "'epoch' | Did you mean 'epochs'"),
    "setting of the wrong type": (
        lambda d, out: PatchSlimmingConfig(images=1.5), BadSetting, "images=1.5 | int"),
    "setting that is no number": (
        lambda d, out: PatchSlimmingConfig(lr=float("nan")), BadSetting, "lr=nan | float"),
    "setting out of its range": (
        lambda d, out: PatchSlimmingConfig(batch=0), BadSetting, "batch=0 | at least 1"),
    "share out of its range": (
        lambda d, out: PatchSlimmingConfig(outputs=1.0), BadSetting, "outputs=1.0 | below 1"),
    "tuning without passes": (
        lambda d, out: PatchSlimmingConfig(mode="fast", epochs=0),
        BadSetting, "mode='fast' | epochs from 1"),
    "passes without tuning": (
        lambda d, out: PatchSlimmingConfig(mode="free", epochs=2), BadSetting, "'free' | epochs=0"),
    "learning rate that blows up": (
        lambda d, out: fit(d, out, search=tuned(lr=1e6)),
        Diverged, "Tuning block 1 | lr=1e+06"),
    "a head that reads all patches": (
        lambda d, out: fit(d, out, host=averaging(), data=small()),
        BadSchedule, "reads all patches | outputs=0.5 | --outputs 0.5"),
    "outputs of a head that reads none": (
        lambda d, out: fit(d, out, search=PatchSlimmingConfig(mode="free", outputs=0.5)),
        BadSchedule, "outputs=0.5 | reads no patches | Leave it out"),
    "a method that needs none": (
        lambda d, out: calibrate(d.vit, make_batches(), "topk", macs=0.6, out=out),
        UnknownName, "'topk' | patch_slimming, | tome | need no calibration"),
    "unknown method": (
        lambda d, out: calibrate(d.vit, make_batches(), "patch_sliming", macs=0.6, out=out),
        UnknownName, "'patch_sliming' | Did you mean 'patch_slimming'"),
    "a slimmed model": (
        lambda d, out: fit(d, out, host=d.slim), UnsupportedModel, "slimmed already | .host"),
    "a model of no known family": (
        lambda d, out: fit(d, out, host=torch.nn.Linear(2, 2)), UnsupportedModel, "adapter"),
    "a host with a pyramid": (
        lambda d, out: fit(d, out, host=pyramid()),
        UnsupportedModel, "one grid | blocks (1,) | tome"),
    "a model of one block": (
        lambda d, out: fit(d, out, host=tiny_host(depth=1), data=small()),
        UnsupportedModel, "one block"),
    "a folder that holds a calibration": (
        lambda d, out: fit(d, d.at / "run"), BadFile, "holds a calibration already | --resume"),
    "checkpoint of another tolerance": (
        lambda d, out: fit(d, d.at / "run", tolerance=0.2, resume=True),
        BadFile, "another run | tolerance=0.1, now 0.2"),
    "truncated checkpoint": (
        lambda d, out: fit(d, d.at / "cut", resume=True),
        BadFile, f"{CHECKPOINT_FILE} is truncated"),
    "a file for a folder": (lambda d, out: fit(d, d.at / "file"), BadFile, "file"),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
def test_in_python(name, desk, tmp_path):
    act, error, words = PYTHON[name]
    # Layers that were searched before the mistake are in the checkpoint, and nothing else is there.
    left = {f"out/{CHECKPOINT_FILE}"}
    act = partial(act, desk, tmp_path / "out")
    check_python(act, error, words, stays=desk.at, out=tmp_path, leaves=left)


# name: (arguments, words that stderr must have); {} is the desk's folder
SHELL = {
    "no folder to write to": ("calibrate digits --macs 0.6", "--out | --help"),
    "no images": ("calibrate {}/hf --macs 0.6 --out o", "On which images | --data PATH | labels"),
    "an empty folder": (
        "calibrate {}/hf --macs 0.6 --data {}/empty --out o", "empty | looked for .jpg"),
    "only unreadable images": (
        "calibrate {}/hf --macs 0.6 --data {}/broken --out o", "None of the 3 images | 0.png"),
    "no budget": ("calibrate {}/hf --data {}/photos --out o", "Give one of macs | tolerance"),
    "two budgets": (
        "calibrate {}/hf --data {}/photos --macs 0.6 --tolerance 0.1 --out o",
        "not macs and tolerance"),
    "tolerance of nothing": (
        "calibrate {}/hf --data {}/photos --tolerance 0 --out o", "tolerance=0.0 | above 0"),
    "tolerance that is no number": (
        "calibrate {}/hf --data {}/photos --tolerance nan --out o", "tolerance=nan | above 0"),
    "tolerance that no candidate meets": (
        "calibrate {}/hf --data {}/photos --mode paper --epochs 1 --tolerance 1e-12 --out o",
        "block 1 | all its 16 patches | Give a larger one"),
    "budget out of reach": (
        "calibrate {}/hf --data {}/photos --macs 0.05 --out o", "macs=0.05 | Give more"),
    "budget that is none": ("calibrate {}/hf --macs little --out o", "--macs | little | --help"),
    "a budget in the mode of the paper": (
        "calibrate {}/hf --data {}/photos --macs 0.6 --mode paper --out o", "mode='paper'"),
    "unknown mode": ("calibrate {}/hf --macs 0.6 --mode quick --out o", "--mode | quick | paper"),
    "unknown error": ("calibrate {}/hf --macs 0.6 --error big --out o", "--error | big | relative"),
    "part of an image": ("calibrate {}/hf --macs 0.6 --images 1.5 --out o", "--images | 1.5"),
    "number that is none": (
        "calibrate {}/hf --macs 0.6 --data {}/photos --lr nan --out o", "lr=nan"),
    "setting out of its range": (
        "calibrate {}/hf --macs 0.6 --data {}/photos --batch 0 --out o", "batch=0 | at least 1"),
    "unknown option": ("calibrate {}/hf --macs 0.6 --keep 0.5 --out o", "--keep | --help"),
    "outputs of a head that reads none": (
        "calibrate {}/hf --macs 0.6 --data {}/photos --outputs 0.5 --out o", "outputs=0.5"),
    "a method that needs none": (
        "calibrate {}/hf --macs 0.6 --data {}/photos --method topk --out o",
        "'topk' | need no calibration"),
    "unknown method": (
        "calibrate {}/hf --macs 0.6 --data {}/photos --method patch --out o",
        "'patch' | 'patch_slimming'"),
    "unknown model": ("calibrate tset_vit --macs 0.6 --pretrained --data {}/photos --out o",
        "'tset_vit' | 'test_vit'"),
    "random weights": (
        "calibrate test_vit --macs 0.6 --data {}/photos --out o",
        "test_vit has random weights | --weights FILE | --pretrained"),
    "weights of another model": (
        "calibrate test_vit --weights {}/vit.safetensors --macs 0.6 --data {}/photos --out o",
        "vit.safetensors | does not fit"),
    "a slimmed model": (
        "calibrate {}/slim --macs 0.6 --data {}/photos --out o",
        "slimmed already | model it was made of | train"),
    "a schedule that is none": (
        "calibrate {}/hf --schedule {}/file --data {}/photos --out o", "not a saved schedule"),
    "a folder that holds a calibration": (
        "calibrate {}/hf --tolerance 0.1 --mode free --data {}/photos --out {}/cli",
        "holds a calibration already | --resume"),
    "checkpoint of another budget": (
        "calibrate {}/hf --macs 0.6 --mode free --data {}/photos --out {}/cli --resume",
        "another run | macs=None, now 0.6"),
    "checkpoint of other images": (
        "calibrate {}/hf --tolerance 0.1 --mode free --data {}/photos/ant --out {}/cli --resume",
        "another run | its images is 6 with digest"),
    "truncated checkpoint": (
        "calibrate {}/hf --tolerance 0.1 --data {}/photos --out {}/cut --resume", "truncated"),
    "a file for a folder": (
        "calibrate {}/hf --tolerance 0.1 --data {}/photos --out {}/file", "file"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHELL)
def test_on_the_command_line(name, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, words = SHELL[name]
    check_command(line, words, stays=desk.at, out=tmp_path, leaves={f"o/{CHECKPOINT_FILE}"})


# --- what cannot be put in a row


@pytest.mark.parametrize("method", ["patch_slimming", "patch_slimming_dynamic"])
def test_images_of_another_size_than_calibrated_are_refused(method, tmp_path):
    host = tiny_host(dynamic_img_size=True)
    model = calibrate(host, small(), method, tolerance=0.1, config=FREE, out=tmp_path).model
    for each in (model, load(tmp_path / "model", model=host)):
        assert each(small(2)[0][0]).shape == (2, 5)
        with pytest.raises(WrongInput, match="calibrated for 16x16 pixels") as raised:
            each(small(2, 32)[0][0])
        assert "(2, 3, 32, 32)" in str(raised.value)
        assert "Resize the images, or calibrate" in str(raised.value)
