"""Every mistake has one clear answer: what was given, what is needed, and the cure.

Two tables, one of mistakes through Python and one of the command line; `bad_input.py` checks
each row.
"""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

import patchslim
from bad_input import check_command, check_python, link_all_but, lose_library
from child_process import kill_when, needs_fork
from child_process import run_patchslim as run
from patchslim.data.images import Images
from patchslim.errors import (
    BadData,
    BadFile,
    BadSchedule,
    ImpossibleBudget,
    MissingExtra,
    NeedsClassToken,
    OldVersion,
    UnknownName,
    UnsupportedModel,
    WrongInput,
)
from patchslim.hosts._registry import library_names, load_library
from patchslim.measurement.measure import measure
from patchslim.model.load import load
from patchslim.saving.folder import RECIPE_FILE, WEIGHTS_FILE
from patchslim.saving.seal import seal_recipe
from patchslim.schedules.schedule import Counts
from patchslim.versions import check_version, installed_version

TINY = "test_vit"
TINY_GAP = "test_vit2"


def vit(**more):
    settings = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **settings, **more).eval()


def hf_vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def edited(saved, to, **changes):
    path = Path(shutil.copytree(saved, to))
    recipe = json.loads((path / RECIPE_FILE).read_text()) | changes
    (path / RECIPE_FILE).write_text(json.dumps(seal_recipe(recipe)))
    return path


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Makes everything that is wrong, and what is right beside it."""
    at = tmp_path_factory.mktemp("desk")
    made = SimpleNamespace(at=at, vit=vit(), gap=vit(class_token=False, global_pool="avg"))
    made.slim = patchslim.slim(made.vit, "tome", r=2)
    made.slim.save(at / "saved")
    patchslim.slim(hf_vit(), "tome", r=2).save(at / "saved-hf")
    hf_vit().save_pretrained(at / "hf")
    edited(at / "saved", at / "future", patchslim=7, package="3.2.1")
    edited(at / "saved", at / "strange-method", method="tomme")
    shutil.copytree(at / "saved", at / "truncated")
    whole = (at / "saved" / WEIGHTS_FILE).read_bytes()
    (at / "truncated" / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 3])
    state = timm.create_model(TINY).state_dict()
    save_file(state, at / "vit.safetensors")
    (at / "cut.safetensors").write_bytes((at / "vit.safetensors").read_bytes()[:5000])
    save_file(timm.create_model(TINY_GAP).state_dict(), at / "other.safetensors")
    torch.save(made.vit, at / "pickled.pth")
    (at / "empty").mkdir()
    (at / "texts").mkdir()
    (at / "texts" / "a.txt").write_text("text")
    (at / "photos" / "cat").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    for number in range(3):
        Image.fromarray(pixels).save(at / "photos" / "cat" / f"{number}.png")
    shutil.copytree(at / "photos", at / "mixed")
    (at / "mixed" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (at / "broken").mkdir()
    (at / "broken" / "a.png").write_bytes(b"no image")
    (at / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    (at / "classes.txt").write_text("cats\ndogs\n")
    (at / "schedule.json").write_text("{")
    return made


def images(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def with_nan():
    batch = torch.randn(4, 3, 32, 32)
    batch[2, 0, 5, 5] = torch.nan
    return batch


def prepared(path, **more):
    return Images(
        path, image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0,
        interpolation="bicubic", **more,
    )  # fmt: skip


# name: (what is done, the kind of error, words that the message must have)
PYTHON = {
    "unknown method": (
        lambda d: patchslim.slim(d.vit, "tone", r=2),
        UnknownName, "'tone' | Did you mean 'tome' | Known: adamerge, algm, | patchslim methods"),
    "unknown budget": (
        lambda d: patchslim.slim(d.vit, "tome", mac=0.6), UnknownName, "'mac' | 'macs'"),
    "no budget": (
        lambda d: patchslim.slim(d.vit, "tome"), BadSchedule, "How much | macs=0.6 | r=13"),
    "several budgets": (
        lambda d: patchslim.slim(d.vit, "tome", macs=0.6, r=3),
        BadSchedule, "one of them | macs, r"),
    "budget and schedule": (
        lambda d: patchslim.slim(d.vit, "tome", Counts((9,) * 4, 17, 1), r=3),
        BadSchedule, "one of them | r, schedule"),
    "budget out of reach": (
        lambda d: patchslim.slim(d.vit, "tome", macs=0.02),
        ImpossibleBudget, "macs=0.02 | ToMe | Nearest possible: macs=0."),
    "budget that is no share": (
        lambda d: patchslim.slim(d.vit, "tome", macs=60),
        ImpossibleBudget, "macs=60 | a share | (0.6)"),
    "budget that is NaN": (
        lambda d: patchslim.slim(d.vit, "tome", macs=float("nan")),
        ImpossibleBudget, "macs=nan | a share"),
    "keep more than all": (
        lambda d: patchslim.slim(d.vit, "topk", keep=1.5), BadSchedule, "keep=1.5 | at most 1"),
    "keep rate of zero": (
        lambda d: patchslim.slim(d.vit, "topk", keep_rate=0.0), BadSchedule, "keep_rate=0.0 | 0.7"),
    "negative r": (
        lambda d: patchslim.slim(d.vit, "tome", r=-1), BadSchedule, "r=-1 | 0 or more"),
    "blocks beyond the last": (
        lambda d: patchslim.slim(d.vit, "topk", keep_rate=0.5, at=(3, 6)),
        BadSchedule, "at=(3, 6) | 0 to 3"),
    "counts that rise": (
        lambda d: patchslim.slim(d.vit, "topk", keep=[9, 12, 9, 9]),
        BadSchedule, "12 | 9 enter | fall"),
    "schedule for another size": (
        lambda d: patchslim.slim(d.vit, "topk", Counts((9,) * 4, 50, 1)),
        BadSchedule, "50 tokens | 17 | again"),
    "schedule file that is none": (
        lambda d: patchslim.slim(d.vit, "topk", d.at / "schedule.json"),
        BadFile, "schedule.json | not a saved schedule"),
    "unsupported host": (
        lambda d: patchslim.slim(timm.create_model("test_resnet"), "tome", r=2),
        UnsupportedModel, "ResNet | no attention over tokens | patchslim models"),
    "no host at all": (
        lambda d: patchslim.slim("deit_small", "tome", r=2),
        UnsupportedModel, "torch.nn.Module | str"),
    "host that drops patches": (
        lambda d: patchslim.slim(vit(patch_drop_rate=0.5), "tome", r=2),
        UnsupportedModel, "patch_drop_rate | Build it with patch_drop_rate=0"),
    "host without weights": (
        lambda d: patchslim.slim(vit().to("meta"), "tome", r=2),
        UnsupportedModel, "no weights yet"),
    "slimming twice": (
        lambda d: patchslim.slim(d.slim, "tome", r=2), UnsupportedModel, "already | .host"),
    "no class token": (
        lambda d: patchslim.slim(d.gap, "evit", keep=0.5),
        NeedsClassToken, "EViT | class token | need none | tome"),
    "image of the wrong size": (
        lambda d: d.slim(images(1, 3, 40, 40)),
        WrongInput, "(1, 3, 40, 40) | 32x32 | dynamic_img_size=True"),
    "image of the wrong size, transformers": (
        lambda d: patchslim.slim(hf_vit(), "tome", r=2)(images(1, 3, 40, 40)),
        WrongInput, "(1, 3, 40, 40) | 32x32 | interpolate_pos_encoding=True"),
    "one image without a batch": (
        lambda d: d.slim(images(3, 32, 32)), WrongInput, "(3, 32, 32) | (batch, 3, 32, 32)"),
    "grey images": (
        lambda d: d.slim(images(2, 1, 32, 32)), WrongInput, "(2, 1, 32, 32) | (batch, 3, 32, 32)"),
    "bytes for images": (
        lambda d: d.slim(images(1, 3, 32, 32, dtype=torch.uint8)),
        WrongInput, "torch.uint8 | float images"),
    "an array for images": (
        lambda d: d.slim(np.zeros((1, 3, 32, 32))), WrongInput, "ndarray | float images"),
    "nothing for images": (lambda d: d.slim(), WrongInput, "NoneType | float images"),
    "an option that cannot be honoured": (
        lambda d: patchslim.slim(hf_vit(), "tome", r=2)(
            images(1, 3, 32, 32), output_attentions=True),
        WrongInput, "output_attentions | pixel_values"),
    "measuring NaN": (
        lambda d: measure(d.slim, [(with_nan(), None)], repeats=0),
        WrongInput, "Image 2 of batch 0 | NaN"),
    "measuring NaN in a later batch": (
        lambda d: measure(
            d.slim, [(torch.randn(4, 3, 32, 32), None), (with_nan(), None)], repeats=0),
        WrongInput, "Image 2 of batch 1 | NaN"),
    "measuring nothing": (
        lambda d: measure(d.slim, [], repeats=0), BadData, "no images | empty"),
    "data that is not there": (
        lambda d: prepared(d.at / "nowhere"), BadData, "nowhere | Give a folder"),
    "empty folder": (
        lambda d: prepared(d.at / "empty"), BadData, "empty | looked for .jpg | found nothing"),
    "folder without images": (
        lambda d: prepared(d.at / "texts"), BadData, "texts | looked for .jpg | 1 other files"),
    "folder without a readable image": (
        lambda d: list(prepared(d.at / "broken")), BadData, "None of the 1 images | a.png"),
    "damaged archive": (
        lambda d: prepared(d.at / "cut.zip"), BadData, "cut.zip | damaged or truncated"),
    "class folder that is not listed": (
        lambda d: prepared(d.at / "photos", classes=d.at / "classes.txt"),
        BadData, "'cat' | classes.txt | Nearest: cats"),
    "no save there": (
        lambda d: load(d.at / "nowhere"), BadFile, f"nowhere | {WEIGHTS_FILE} | {RECIPE_FILE}"),
    "folder that is no save": (
        lambda d: load(d.at / "photos"), BadFile, f"not saved by patchslim | {RECIPE_FILE}"),
    "truncated weights": (
        lambda d: load(d.at / "truncated"), BadFile, "truncated | bytes | Copy it again"),
    "recipe of a future version": (
        lambda d: load(d.at / "future"), BadFile, "format 7 | 3.2.1 | pip install -U"),
    "recipe with an unknown method": (
        lambda d: load(d.at / "strange-method"), UnknownName, "'tomme' | 'tome'"),
    "saving over other things": (
        lambda d: d.slim.save(d.at / "photos"), BadFile, "photos | cat | delete | new folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
def test_in_python(name, desk, tmp_path):
    act, error, words = PYTHON[name]
    check_python(lambda: act(desk), error, words, stays=desk.at, out=tmp_path)


# name: (arguments, words that stderr must have); {} is the desk's folder
SHELL = {
    "no command": ("", "COMMAND | patchslim --help"),
    "unknown command": ("slimm x", "slimm | invalid choice | --help"),
    "unknown method": (f"slim {TINY} --method tone --r 2", "'tone' | Did you mean 'tome'"),
    "unknown model": ("slim tset_vit --macs 0.6", "'tset_vit' | Did you mean 'test_vit' | digits"),
    "unknown pretrained tag": (f"slim {TINY}.in99 --macs 0.6", "in99 | r160_in1k"),
    "model folder that is not there": ("slim runs/nowhere --macs 0.6", "no folder runs/nowhere"),
    "model folder that holds none": (
        "slim {}/photos --macs 0.6", "photos | recipe.json | config.json"),
    "unknown setting": (
        f"slim {TINY} --method evit --set fusee=1 --keep 0.5", "'fusee' | Did you mean 'fuse'"),
    "setting without a value": (f"slim {TINY} --method evit --set fuse --keep 0.5", "fuse=false"),
    "setting of the wrong kind": (
        f"slim {TINY} --method evit --set fuse=perhaps --keep 0.5", "fuse=perhaps | true or false"),
    "method without settings": (
        f"slim {TINY} --method topk --set fuse=1 --keep 0.5", "topk has no settings"),
    "unsupported host": (
        "slim test_resnet --macs 0.6",
        "ResNet | no attention over tokens | patchslim models"),
    "no class token": (
        f"slim {TINY_GAP} --method evit --macs 0.7", "EViT | class token | need none | tome"),
    "no budget": (f"slim {TINY}", "How much | macs=0.6"),
    "several budgets": (f"slim {TINY} --macs 0.6 --r 3", "one of them | macs, r"),
    "budget out of reach": (f"slim {TINY} --macs 0.02", "macs=0.02 | Nearest possible: macs=0."),
    "budget that is no number": (f"slim {TINY} --macs much", "--macs | much | --help"),
    "slimming twice": ("slim {}/saved --macs 0.6", "slimmed already"),
    "a budget for a saved model": ("measure {}/saved --macs 0.6", "slimmed already | leave out"),
    "weights that are not there": (
        f"slim {TINY} --macs 0.6 --weights {{}}/no.safetensors", "no.safetensors | .pth"),
    "weights that are cut": (
        f"slim {TINY} --macs 0.6 --weights {{}}/cut.safetensors", "cut.safetensors | truncated"),
    "weights of another model": (
        f"slim {TINY} --macs 0.6 --weights {{}}/other.safetensors",
        "does not fit | this very model"),
    "weights that are a pickled model": (
        f"slim {TINY} --macs 0.6 --weights {{}}/pickled.pth", "code in a file | state_dict()"),
    "weights for the example": (
        "slim digits --macs 0.6 --weights {}/vit.safetensors", "digits | own weights"),
    "truncated save": ("measure {}/truncated", "truncated | bytes | Copy it again"),
    "save of a future version": ("measure {}/future", "format 7 | 3.2.1 | pip install -U"),
    "empty folder": ("measure {}/saved --data {}/empty", "empty | looked for .jpg | found nothing"),
    "data that is not there": ("measure {}/saved --data {}/none", "none | Give a folder"),
    "none readable": ("measure {}/saved --data {}/broken", "None of the 1 images | a.png"),
    "class folder that is not listed": (
        "measure {}/saved --data {}/photos --classes {}/classes.txt", "'cat' | Nearest: cats"),
    "classes without data": ("measure {}/saved --classes {}/classes.txt", "--classes | --data"),
    "showing what is no image": ("show {}/saved {}/broken/a.png", "a.png"),
    "showing an image that is not there": ("show {}/saved {}/no.png", "no.png"),
    "models of an unknown name": ("models dino3v", "'dino3v'"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHELL)
def test_on_the_command_line(name, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, words = SHELL[name]
    check_command(line, words, stays=desk.at, out=tmp_path, progress=False)


# --- no errors, but they must not pass in silence


@pytest.mark.filterwarnings("ignore::patchslim.errors.Untrained")
@pytest.mark.parametrize("method", patchslim.method_names())
def test_a_plain_forward_of_nan_gives_nan_and_never_a_finite_answer(method, desk):
    budget = {} if method == "identity" else {"macs": 0.8}
    slimmed = patchslim.slim(desk.vit, method, **budget)
    one, every = with_nan(), torch.full_like(with_nan(), torch.nan)
    with torch.no_grad():
        assert slimmed(every).isnan().all()
        answer, dense = slimmed(one), desk.vit(one)
    assert torch.equal(answer.isnan(), dense.isnan())
    assert answer[2].isnan().all()


@needs_fork
def test_an_unreadable_image_is_named_and_counted_and_the_run_goes_on(desk, tmp_path):
    data = desk.at / "mixed"
    readable = prepared(data)
    assert sum(len(batch) for batch, _ in readable) == 3
    assert [entry.split(":")[0] for entry in readable.unreadable] == ["cat/broken.jpg"]
    ended = run(tmp_path, "measure", desk.at / "saved", "--data", data, "--repeats", 0, "--json")
    assert ended.code == 0
    assert "warning: 1 images are unreadable and left out: cat/broken.jpg" in ended.err
    report = json.loads(ended.out)
    assert report["birth"]["images"] == 3
    assert len(report["unreadable"]) == 1


@needs_fork
def test_an_interrupted_save_leaves_the_old_one(desk, tmp_path):
    path = tmp_path / "saved"
    desk.slim.save(path)
    before = hashlib.sha256((path / RECIPE_FILE).read_bytes()).hexdigest()
    fresh = tmp_path / ".saved.new"
    other = patchslim.slim(vit(), "topk", keep=0.5)
    kill_when(lambda: [other.save(path) for _ in range(1000)], when=fresh.exists)
    if hashlib.sha256((path / RECIPE_FILE).read_bytes()).hexdigest() == before:
        assert load(path).counts() == desk.slim.counts()
    else:
        assert load(path).counts() == other.counts()
    desk.slim.save(path)
    assert load(path).counts() == desk.slim.counts()
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


# --- libraries that are missing or old, for real: another sys.path


@pytest.fixture
def reread_versions():
    installed_version.cache_clear()
    yield
    installed_version.cache_clear()


@pytest.mark.parametrize(
    ("library", "version", "cure"),
    [
        ("timm", "1.0.9", "pip install -U 'timm>=1.0.26'"),
        ("torch", "2.5.1+cpu", "pip install -U 'torch>=2.6'"),
        ("transformers", "4.57.0", "pip install -U 'transformers>=5.18'"),
        ("transformers", "5.0.0rc1", "pip install -U 'transformers>=5.18'"),
    ],
)
def test_an_old_library_is_refused_with_the_cure(
    library, version, cure, tmp_path, monkeypatch, reread_versions
):
    info = tmp_path / f"{library}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = partial(check_version, library)
    if library in library_names():
        check = load_library(library).check_version
    with pytest.raises(OldVersion) as raised:
        check()
    for word in (library, version, cure):
        assert word in str(raised.value)


@needs_fork
@pytest.mark.parametrize(
    ("library", "line", "cure"),
    [
        ("transformers", "slim {}/hf --macs 0.7", "pip install 'patchslim[hf]'"),
        ("transformers", "measure {}/saved-hf", "pip install 'patchslim[hf]'"),
        ("timm", f"slim {TINY} --macs 0.7", "pip install 'timm>=1.0.26'"),
        ("timm", "measure {}/saved", "pip install 'timm>=1.0.26'"),
    ],
)
def test_a_missing_library_is_named_with_the_cure(library, line, cure, desk, tmp_path):
    farm = link_all_but(library, tmp_path / "farm")
    ended = run(
        tmp_path,
        *line.replace("{}", str(desk.at)).split(),
        first=lambda: lose_library(library, farm),
    )
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    assert f"{library} is not installed: {cure}" in ended.err


def test_a_missing_extra_is_an_import_error_too():
    assert issubclass(MissingExtra, ImportError)
