"""Every mistake in training has one clear answer, and leaves nothing half written.

Two tables, one of mistakes through Python and one of the command line; `bad_input.py` checks
each row.
"""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import patchslim
from bad_input import check_command, check_python, link_all_but, lose_library
from child_process import needs_fork
from child_process import run_patchslim as run
from patchslim.data.images import Images
from patchslim.errors import (
    BadData,
    BadFile,
    BadSetting,
    Diverged,
    MissingExtra,
    PatchslimError,
    UnknownName,
    UnsupportedModel,
    WrongInput,
)
from patchslim.model.load import load
from patchslim.runs.layout import CHECKPOINT_FILE, MODEL_FOLDER, REPORT_FILE
from patchslim.training.config import TrainConfig
from patchslim.training.train import train
from tiny_training import SIDE, make_batches, trainable_vit, write_images

SHORT = TrainConfig(steps=2, batch=4, workers=0)
WHOLE = {CHECKPOINT_FILE, "log.csv", MODEL_FOLDER, REPORT_FILE}  # what a run leaves when it is done


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Makes everything that is wrong, and what is right beside it."""
    at = tmp_path_factory.mktemp("desk")
    made = SimpleNamespace(at=at, vit=trainable_vit())
    made.slim = patchslim.slim(made.vit, "tome", r=2)
    made.evit = patchslim.slim(made.vit, "evit", keep=0.7)
    made.trained = train(made.slim, make_batches(), SHORT, out=at / "run").model
    made.slim.save(at / "slim")
    patchslim.slim(trainable_vit(5), "tome", r=2).save(at / "of-five")
    save_file(trainable_vit().state_dict(), at / "vit.safetensors")
    save_file(trainable_vit(5).state_dict(), at / "five.safetensors")
    write_images(at / "photos")
    shutil.make_archive(str(at / "photos"), "gztar", at / "photos")
    write_images(at / "ants", kinds=("ant",))
    write_images(at / "flat" / "all", kinds=(".",))
    write_images(at / "seven", kinds="abcdefg", count=1)
    (at / "empty").mkdir()
    for kind in ("ant", "bee", "cat"):
        (at / "broken" / kind).mkdir(parents=True)
        (at / "broken" / kind / "0.png").write_bytes(b"no image")
    (at / "classes.txt").write_text("ant\nbee\ncat\n")
    shutil.copytree(at / "run", at / "cut")
    whole = (at / "run" / CHECKPOINT_FILE).read_bytes()
    (at / "cut" / CHECKPOINT_FILE).write_bytes(whole[: len(whole) // 2])
    (at / "file").write_text("a file")
    return made


def images(desk, name, **more):
    return Images.for_host(desk.vit, desk.at / name, **more)


def learn(desk, out, *, slimmed=None, data=None, config=SHORT, **more):
    """Starts a short run in which one thing is wrong."""
    return train(slimmed or desk.slim, data or make_batches(), config, out=out, **more)


def short(**given):
    return TrainConfig.of({}, {"steps": 2, "batch": 4, "workers": 0, **given})


# name: (what is done, the kind of error, words that the message must have)
PYTHON = {
    "no images": (
        lambda d, out: train(d.slim, [], SHORT, out=out), BadData, "no images | empty"),
    "an empty folder": (
        lambda d, out: learn(d, out, data=images(d, "empty")), BadData, "empty | looked for .jpg"),
    "only unreadable images": (
        lambda d, out: learn(d, out, data=images(d, "broken")),
        BadData, "3 images | 0.png | cannot be read"),
    "a compressed tar": (
        lambda d, out: learn(d, out, data=images(d, "photos.tar.gz")),
        BadData, "photos.tar.gz | compressed | Unpack it once"),
    "images that can be read once": (
        lambda d, out: train(d.slim, iter(make_batches()), SHORT, out=out),
        WrongInput, "several times | list(it)"),
    "batches that are none": (
        lambda d, out: train(d.slim, [torch.zeros(4, 3, SIDE, SIDE)], SHORT, out=out),
        WrongInput, "Batch 0 is a Tensor | pair"),
    "one class": (
        lambda d, out: learn(d, out, data=make_batches((1, 1, 1, 1))),
        BadData, "label 1 | several classes | --labels 0"),
    "one class of a list": (
        lambda d, out: learn(d, out, data=images(d, "ants", classes=d.at / "classes.txt")),
        BadData, "label 0 | several classes | --labels 0"),
    "label outside the range": (
        lambda d, out: learn(d, out, data=make_batches((0, 1, 2, 7))),
        WrongInput, "from 0 to 7 | classes 0 to 2 | --classes"),
    "label below the range": (
        lambda d, out: learn(d, out, data=make_batches((0, 1, 2, -1))),
        WrongInput, "from -1 to 2 | classes 0 to 2"),
    "no labels": (
        lambda d, out: learn(d, out, data=make_batches((None,) * 4)),
        BadData, "no labels | --labels 0 | --classes"),
    "nothing to learn from": (
        lambda d, out: learn(d, out, config=short(labels=0, distil="none")),
        BadSetting, "labels=0 and distil='none'"),
    "teacher of another label space": (
        lambda d, out: learn(d, out, teacher=trainable_vit(5)),
        UnsupportedModel, "5 classes | 3 | same classes"),
    "slimmed teacher of tokens": (
        lambda d, out: learn(d, out, teacher=d.slim, config=short(tokens=1.0)),
        UnsupportedModel, "tokens= | dense | .host"),
    "trained model without a teacher": (
        lambda d, out: learn(d, out, slimmed=d.trained),
        UnsupportedModel, "trained before | --teacher | distil='none'"),
    "token distillation without the token": (
        lambda d, out: learn(d, out, config=short(distil="token")),
        BadSetting, "distillation token | VisionTransformer | 'soft'"),
    "a model that is not slimmed": (
        lambda d, out: train(d.vit, make_batches(), SHORT, out=out),
        UnsupportedModel, "VisionTransformer | patchslim.slim"),
    "a batch that cannot be divided": (
        lambda d, out: learn(d, out, config=short(accumulate=3)),
        BadSetting, "batch=4 | accumulate | batch=6"),
    "mixing an odd number": (
        lambda d, out: learn(d, out, config=short(batch=3, mixup=0.8)), BadSetting, "pairs | 3"),
    "changing prepared images": (
        lambda d, out: learn(d, out, config=short(erasing=0.2)),
        BadSetting, "erasing=0.2 | prepared already"),
    "policy that timm does not know": (
        lambda d, out: learn(d, out, data=images(d, "photos"), config=short(randaugment="rnd-m9")),
        BadSetting, "'rnd-m9' | rand-m9-mstd0.5-inc1"),
    "unknown setting": (
        lambda d, out: learn(d, out, config=short(warm_up=0.1)),
        UnknownName, "'warm_up' | Did you mean 'warmup'"),
    "setting of the wrong type": (
        lambda d, out: learn(d, out, config=short(lr="1e-4")), BadSetting, "lr='1e-4' | float"),
    "part of a step": (
        lambda d, out: learn(d, out, config=short(steps=1.5)), BadSetting, "steps=1.5 | int"),
    "setting that is no number": (
        lambda d, out: learn(d, out, config=short(lr=float("nan"))), BadSetting, "lr=nan | float"),
    "unknown way to distil": (
        lambda d, out: learn(d, out, config=short(distil="sotf")),
        UnknownName, "'sotf' | Did you mean 'soft'"),
    "setting out of its range": (
        lambda d, out: learn(d, out, config=short(ema=1.0)), BadSetting, "ema=1.0 | below 1"),
    "no way at all": (
        lambda d, out: learn(d, out, config=short(wise=0.0)), BadSetting, "wise=0.0 | above 0"),
    "a host that never learns": (
        lambda d, out: learn(d, out, config=short(freeze=1.0)),
        BadSetting, "freeze=1 | host_lr=0"),
    "validation that can be read once": (
        lambda d, out: learn(d, out, validation=iter(make_batches())),
        WrongInput, "validation= | several times | list"),
    "validation with NaN": (
        lambda d, out: learn(d, out, validation=make_batches(bad=[1])),
        WrongInput, "Image 1 of batch 0 | NaN"),
    "validation with labels outside the range": (
        lambda d, out: learn(d, out, validation=make_batches((0, 1, 2, 9))),
        WrongInput, "from 0 to 9 | classes 0 to 2"),
    "images with NaN": (
        lambda d, out: learn(d, out, data=make_batches(bad=[2])),
        Diverged, "step 1 | not a number | image 2 | Lower lr | look at these images"),
    "learning rate that blows up": (
        lambda d, out: learn(d, out, config=short(lr=1e6, steps=6)),
        Diverged, "step 2 | Lower lr (now 1e+06)"),
    "a file for a folder": (
        lambda d, out: learn(d, d.at / "file"), BadFile, "file"),
    "a folder that holds a run": (
        lambda d, out: learn(d, d.at / "run"), BadFile, "holds a run already | --resume"),
    "checkpoint of another method": (
        lambda d, out: learn(d, d.at / "run", slimmed=d.evit, resume=True),
        BadFile, "another run | its method is ToMe, and now it is EViT"),
    "checkpoint of other settings": (
        lambda d, out: learn(d, d.at / "run", config=short(lr=1e-3), resume=True),
        BadFile, "another run | there lr=5e-05, now 0.001"),
    "checkpoint of other images": (
        lambda d, out: learn(d, d.at / "run", data=make_batches((0, 1, 2, 0, 1)), resume=True),
        BadFile, "another run | 4 named | 5 named"),
    "checkpoint of another teacher": (
        lambda d, out: learn(d, d.at / "run", teacher=trainable_vit(init_values=2.0), resume=True),
        BadFile, "another run | the teacher answers otherwise"),
    "truncated checkpoint": (
        lambda d, out: learn(d, d.at / "cut", resume=True),
        BadFile, f"{CHECKPOINT_FILE} is truncated | train from the start"),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
def test_in_python(name, desk, tmp_path):
    act, error, words = PYTHON[name]
    act = partial(act, desk, tmp_path / "out")
    # The log has what came before the mistake, and nothing else is there.
    check_python(act, error, words, stays=desk.at, out=tmp_path, leaves={"out/log.csv"})


# name: (arguments, words that stderr must have); {} is the desk's folder
SHELL = {
    "no folder to write to": ("train {}/slim --data {}/photos", "--out"),
    "no images": ("train {}/slim --out o", "What is it to learn from | --data PATH"),
    "an empty folder": ("train {}/slim --data {}/empty --out o", "empty | looked for .jpg"),
    "only unreadable images": (
        "train {}/slim --data {}/broken --workers 0 --out o", "3 images | 0.png"),
    "one class": (
        "train {}/slim --data {}/ants --classes {}/classes.txt --out o",
        "label 0 | several classes | --labels 0"),
    "classes that are not the model's": (
        "train {}/slim --data {}/seven --out o", "7 class folders | no labels | --classes"),
    "classes of a validation alone": (
        "train {}/slim --data {}/photos --validation {}/empty --out o", "empty | looked for .jpg"),
    "no budget": ("train digits --out o", "How much | macs=0.6"),
    "a budget for a slimmed model": (
        "train {}/slim --macs 0.5 --data {}/photos --out o", "slimmed already | leave out"),
    "unknown method": ("train digits --method evti --macs 0.5 --out o", "'evti' | 'evit'"),
    "unknown option": ("train digits --macs 0.5 --learning-rate 1 --out o", "--learning-rate"),
    "number that is none": ("train digits --macs 0.5 --lr small --out o", "--lr | small | --help"),
    "part of a step": ("train digits --macs 0.5 --steps 1.5 --out o", "--steps | 1.5 | --help"),
    "unknown way to distil": (
        "train digits --macs 0.5 --distil sotf --out o", "--distil | sotf | soft"),
    "setting out of its range": (
        "train {}/slim --data {}/photos --warmup 2 --out o", "warmup | between 0 and 1"),
    "its own teacher of random weights": (
        "train test_vit --macs 0.6 --data {}/photos --out o",
        "random weights | --weights FILE | --teacher | --distil none"),
    "a teacher of random weights": (
        "train {}/slim --data {}/photos --teacher test_vit --out o",
        "test_vit | random weights | --teacher-weights"),
    "weights without a teacher": (
        "train {}/slim --data {}/photos --teacher-weights {}/vit.safetensors --out o",
        "--teacher."),
    "a teacher that nobody listens to": (
        "train {}/slim --data {}/photos --teacher {}/slim --distil none --out o",
        "--teacher | --distil none"),
    "teacher of another label space": (
        "train {}/slim --data {}/photos --teacher {}/of-five --out o",
        "5 classes | 3 | same classes"),
    "trained model without a teacher": (
        "train {}/run/model --data {}/photos --out o", "trained before | --teacher"),
    "token distillation without the token": (
        "train {}/slim --data {}/photos --distil token --batch 2 --out o",
        "distillation token | 'soft'"),
    "a batch that cannot be divided": (
        "train {}/slim --data {}/photos --batch 7 --accumulate 2 --out o", "batch=7 | batch=8"),
    "learning rate that blows up": (
        "train {}/slim --data {}/photos --batch 2 --steps 4 --workers 0 --lr 1e6 --out o",
        "step 2 | Lower lr"),
    "a folder that holds a run": (
        "train {}/slim --data {}/photos --out {}/run", "holds a run already | --resume"),
    "checkpoint of other images": (
        "train {}/slim --data {}/photos --steps 2 --batch 4 --workers 0 --out {}/run --resume",
        "another run | 4 named"),
    "truncated checkpoint": (
        "train {}/slim --data {}/photos --out {}/cut --resume", "truncated | train from the start"),
    "a file for a folder": ("train {}/slim --data {}/photos --out {}/file", "file"),
    "dense weights of another model": (
        "measure {}/run/model --dense {}/five.safetensors", "does not fit | this very model"),
    "dense weights that are not there": (
        "measure {}/run/model --dense {}/no.safetensors", "no.safetensors | no such file"),
    "dense weights that were trained": (
        "measure {}/run/model --dense {}/run/model", "trained | began with"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHELL)
def test_on_the_command_line(name, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, words = SHELL[name]
    check_command(line, words, stays=desk.at, out=tmp_path, leaves={"o/log.csv"})


# --- what cannot be put in a row


@needs_fork
def test_without_tensorboard_the_error_comes_before_anything_is_written(
    desk, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    farm = link_all_but("tensorboard", tmp_path / "farm")
    command = ["train", desk.at / "slim", "--data", desk.at / "photos", "--batch", 2]
    ended = run(
        tmp_path, *command, "--out", "o", "--tensorboard",
        first=lambda: lose_library("tensorboard", farm),
    )  # fmt: skip
    assert (ended.code, ended.out) == (2, "")
    assert "TensorBoard is not installed: pip install" in ended.err
    assert not list(tmp_path.glob("o/*"))
    assert issubclass(MissingExtra, PatchslimError)


@needs_fork
def test_unreadable_images_are_counted_and_the_first_is_named(desk, tmp_path):
    data = shutil.copytree(desk.at / "photos", tmp_path / "photos")
    (data / "ant" / "2.png").write_bytes(b"no image")
    ended = run(
        tmp_path, "train", desk.at / "slim", "--data", data, "--validation", data, "--epochs", 2,
        "--batch", 7, "--workers", 0, "--out", tmp_path / "o",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    warned = [line for line in ended.err.splitlines() if line.startswith("warning:")]
    assert len(warned) == 2
    assert warned[0].startswith(
        "warning: 1 images are unreadable and replaced by others in training"
    )
    assert all("ant/2.png" in line for line in warned)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_whole(desk, small_disk):
    out = small_disk / "run"
    learn(desk, out, config=short(steps=2))
    before = (out / CHECKPOINT_FILE).read_bytes()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(BadFile, match=r"the disk is full|No space left"):
        learn(desk, out, config=short(steps=2), resume=True)
    assert (out / CHECKPOINT_FILE).read_bytes() == before
    (small_disk / "ballast").unlink()
    learn(desk, out, config=short(steps=2), resume=True)
    assert {entry.name for entry in out.iterdir()} == WHOLE
    assert load(out / MODEL_FOLDER).trained["step"] == 2
