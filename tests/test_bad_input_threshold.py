"""Every mistake in asking for a threshold has one clear answer, and leaves nothing half written.

Two tables, one of mistakes through Python and one of the command line; `bad_input.py` checks
each row.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers

import patchslim
from bad_input import check_command, check_python
from patchslim.calibration.calibrate import calibrate
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.errors import (
    BadData,
    BadFile,
    BadSchedule,
    BadSetting,
    ImpossibleBudget,
    NeedsClassToken,
    UnknownName,
    UnsupportedModel,
    WrongInput,
)
from patchslim.methods.evit import EViT
from patchslim.methods.similarity import Similarity
from patchslim.methods.tome import ToMe
from patchslim.schedules.schedule import Counts
from patchslim.testing.trial import tiny_host
from tiny_training import SIDE, make_batches, trainable_vit, write_images

COUNTS = Counts((17, 12, 12), 17, 1)


def small(size=16, batch=4):
    """Makes a batch of noise for the tiny host."""
    return [(torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)), None)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Makes a host in memory and one in a folder, and images."""
    at = tmp_path_factory.mktemp("desk")
    made = SimpleNamespace(at=at, vit=trainable_vit())
    made.slim = patchslim.slim(made.vit, "tome", r=2)
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        image_size=SIDE, patch_size=8, num_labels=3,
    )  # fmt: skip
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(at / "hf")
    write_images(at / "photos")
    (at / "file").write_text("a file")
    return made


def fit(desk, out, method="tome", *, host=None, data=None, **asked):
    """Runs a short calibration in which one thing is wrong."""
    asked = {"config": PatchSlimmingConfig(images=4, batch=4)} | asked
    data = make_batches() if data is None else data
    return calibrate(host or desk.vit, data, method, out=out, **asked)


# name: (what is done, the kind of error, words that the message must have)
PYTHON = {
    "no goal": (
        fit, BadSchedule, "Give one of macs | 0.6 | agreement | 0.95"),
    "two goals": (
        lambda d, out: fit(d, out, macs=0.6, agreement=0.9),
        BadSchedule, "Give one of macs | and agreement"),
    "a cap alone": (
        lambda d, out: fit(d, out, cap=0.6), BadSchedule, "Give one of macs | and agreement"),
    "agreement of nothing": (
        lambda d, out: fit(d, out, agreement=0.0), BadSchedule, "agreement=0.0 | between 0 and 1"),
    "agreement of all": (
        lambda d, out: fit(d, out, agreement=1), BadSchedule, "agreement=1: | 0.95"),
    "agreement above all": (
        lambda d, out: fit(d, out, agreement=1.5), BadSchedule, "agreement=1.5 | between 0 and 1"),
    "agreement that is no number": (
        lambda d, out: fit(d, out, agreement=float("nan")), BadSchedule, "agreement=nan | 0.95"),
    "agreement in words": (
        lambda d, out: fit(d, out, agreement="0.9"), BadSchedule, "agreement='0.9' | number"),
    "agreement out of reach": (
        lambda d, out: fit(d, out, agreement=0.95, host=unsure(), data=small(batch=16), cap=0.5,
                           config=PatchSlimmingConfig(images=16)),
        ImpossibleBudget, "agreement=0.95 | cap"),
    "a budget that is none": (
        lambda d, out: fit(d, out, macs=60), ImpossibleBudget, "macs=60 | 0.6 | multiply-adds"),
    "a budget in words": (
        lambda d, out: fit(d, out, macs="0.6"), BadSchedule, "macs='0.6' | number"),
    "a budget of nothing": (
        lambda d, out: fit(d, out, macs=0.0), ImpossibleBudget, "macs=0.0 | above 0"),
    "a budget out of reach of pixels": (
        lambda d, out: fit(d, out, "duplicates", macs=0.01),
        ImpossibleBudget, "macs=0.01 | Duplicates | on average | Give more"),
    "a budget out of reach of pairs": (
        lambda d, out: fit(d, out, macs=0.05),
        ImpossibleBudget, "macs=0.05 | ToMe | on average | Give more"),
    "a budget out of reach above the floor": (
        lambda d, out: fit(d, out, "similarity", macs=0.5),
        ImpossibleBudget, "macs=0.5 | Similarity | floor"),
    "settings of another search": (
        lambda d, out: fit(d, out, macs=0.8, config=PatchSlimmingConfig(mode="free", lr=1e-4)),
        BadSetting, "mode, epochs, lr | Patch Slimming | images and batch alone"),
    "a budget above the cap": (
        lambda d, out: fit(d, out, macs=0.8, cap=0.6),
        ImpossibleBudget, "macs=0.8 | cap of 0.6 | larger one"),
    "a cap that is none": (
        lambda d, out: fit(d, out, agreement=0.9, cap=60), ImpossibleBudget, "cap=60 | 0.6"),
    "a cap in words": (
        lambda d, out: fit(d, out, macs=0.6, cap="0.8"), BadSchedule, "cap='0.8' | number"),
    "a cap out of reach": (
        lambda d, out: fit(d, out, agreement=0.9, cap=0.02),
        ImpossibleBudget, "=0.02 | ToMe cannot go below | Nearest possible"),
    "a cap and a schedule": (
        lambda d, out: fit(d, out, macs=0.6, cap=0.8, schedule=COUNTS),
        BadSchedule, "cap (a budget) | schedule (its counts) | not both"),
    "a schedule of another host": (
        lambda d, out: fit(d, out, macs=0.6, schedule=Counts((9, 9, 9), 10, 1)),
        BadSchedule, "10 | 17"),
    "a tolerance": (
        lambda d, out: fit(d, out, tolerance=0.1), BadSchedule, "tolerance | macs= or agreement="),
    "going on": (
        lambda d, out: fit(d, out, macs=0.6, resume=True), BadSchedule, "resume | in one go"),
    "agreement of Patch Slimming": (
        lambda d, out: fit(d, out, "patch_slimming", agreement=0.9),
        BadSchedule, "agreement | different numbers of patches | macs, tolerance or schedule"),
    "a cap of Patch Slimming": (
        lambda d, out: fit(d, out, "patch_slimming", macs=0.6, cap=0.8),
        BadSchedule, "cap | different numbers of patches | macs, tolerance or schedule"),
    "agreement of a method of fixed counts": (
        lambda d, out: fit(d, out, "topk", agreement=0.9),
        BadSchedule, "agreement | different numbers of patches"),
    "a Method of fixed counts": (
        lambda d, out: fit(d, out, EViT(), macs=0.6), UnknownName, "EViT | similarity | tome"),
    "groups that are told how many stay": (
        lambda d, out: fit(d, out, Similarity(group="medoids"), macs=0.6),
        UnknownName, "Similarity | medoids"),
    "a class for a Method": (
        lambda d, out: fit(d, out, ToMe, macs=0.6), BadSetting, "Give an instance: ToMe()"),
    "an unknown method": (
        lambda d, out: fit(d, out, "similar", macs=0.6),
        UnknownName, "'similar' | Did you mean 'similarity'"),
    "no images": (
        lambda d, out: fit(d, out, macs=0.6, data=[]), BadData, "no images | need no labels"),
    "an empty batch": (
        lambda d, out: fit(d, out, macs=0.6, data=small(batch=0)), BadData, "Batch 0 | no images"),
    "images with NaN": (
        lambda d, out: fit(d, out, macs=0.6, data=make_batches(bad=[2])),
        WrongInput, "Image 2 of batch 0 | NaN"),
    "batches that are none": (
        lambda d, out: fit(d, out, macs=0.6, data=[small()[0][0]]),
        WrongInput, "Batch 0 is a Tensor | pair"),
    "images of several sizes": (
        lambda d, out: fit(d, out, macs=0.6, data=[*make_batches((0,)), *small()]),
        BadData, "several sizes | one"),
    "images of another size": (
        lambda d, out: fit(d, out, macs=0.6, data=small()),
        WrongInput, "16 | 32"),
    "a host without a class token": (
        lambda d, out: fit(d, out, "similarity", macs=0.6, host=averaging(), data=small()),
        NeedsClassToken, "Similarity | class token | duplicates | tome"),
    "samples of a host without a class token": (
        lambda d, out: fit(d, out, "ats", macs=0.6, host=averaging(), data=small()),
        NeedsClassToken, "ATS | class token | duplicates | tome"),
    "a slimmed model": (
        lambda d, out: fit(d, out, macs=0.6, host=d.slim),
        UnsupportedModel, "slimmed already | .host"),
    "a model of no known family": (
        lambda d, out: fit(d, out, macs=0.6, host=torch.nn.Linear(2, 2)),
        UnsupportedModel, "adapter"),
    "settings that are no Search": (
        lambda d, out: fit(d, out, macs=0.6, config={"images": 4}),
        BadSetting, "config= | PatchSlimmingConfig"),
    "a setting out of its range": (
        lambda d, out: fit(d, out, ToMe(threshold=1.5), macs=0.6),
        BadSetting, "threshold=1.5 | between 0"),
    "a file for a folder": (lambda d, out: fit(d, d.at / "file", macs=0.8), BadFile, "file"),
}  # fmt: skip


# name: why the message differs from what it must be
def averaging():
    return tiny_host(readout="average")


def unsure():
    """Makes a tiny host that answers most images differently, so that any removal may change it."""
    host = tiny_host()
    with torch.no_grad():
        host.head.bias -= host(small(batch=16)[0][0]).mean(dim=0)
    return host


@pytest.mark.parametrize("name", PYTHON)
def test_in_python(name, desk, tmp_path):
    act, error, words = PYTHON[name]
    act = partial(act, desk, tmp_path / "out")
    check_python(act, error, words, stays=desk.at, out=tmp_path)


# name: (arguments, words that stderr must have); {} is the desk's folder
SHELL = {
    "no goal": ("--method similarity --data {}/photos", "Give one of macs | agreement"),
    "two goals": ("--method tome --macs 0.6 --agreement 0.9 --data {}/photos", "Give one of macs"),
    "agreement of all": ("--method tome --agreement 1 --data {}/photos", "agreement=1.0 | 0.95"),
    "agreement in words": ("--method tome --agreement most", "--agreement | most | --help"),
    "a budget above the cap": (
        "--method tome --macs 0.8 --cap 0.6 --data {}/photos", "macs=0.8 | cap of 0.6"),
    "a budget out of reach": (
        "--method tome --macs 0.05 --data {}/photos", "macs=0.05 | ToMe | Give more"),
    "going on": ("--method ats --macs 0.6 --data {}/photos --resume", "resume | in one go"),
    "a tolerance": ("--method tome --tolerance 0.1 --data {}/photos", "tolerance | macs="),
    "agreement of Patch Slimming": (
        "--agreement 0.9 --data {}/photos", "agreement | different numbers of patches"),
    "an unknown setting": (
        "--method similarity --set flor=0.5 --macs 0.8 --data {}/photos",
        "'flor' | similarity | Did you mean 'floor'"),
    "a setting in words": (
        "--method similarity --set floor=half --macs 0.8 --data {}/photos", "floor=half | float"),
    "a setting without a value": (
        "--method similarity --set floor --macs 0.8 --data {}/photos", "--set floor | NAME=VALUE"),
    "settings that do not go together": (
        "--method similarity --set group=leader --macs 0.8 --data {}/photos",
        "group='leader' | needs a threshold"),
    "an unknown choice": (
        "--method similarity --set group=wards --macs 0.8 --data {}/photos",
        "'wards' | Did you mean 'ward'"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHELL)
def test_on_the_command_line(name, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, words = SHELL[name]
    check_command(f"calibrate {{}}/hf {line} --out o", words, stays=desk.at, out=tmp_path)
