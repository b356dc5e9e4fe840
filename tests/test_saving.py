"""Saving and loading: the same answers bit for bit, all or nothing, and files are not trusted."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import nn

import patchslim
from child_process import fork_child, kill_when, needs_fork
from patchslim.errors import (
    BadFile,
    BadSchedule,
    PatchslimError,
    UnknownName,
    UnsupportedModel,
)
from patchslim.files import replace_folder
from patchslim.methods._method import method_settings
from patchslim.model.load import load
from patchslim.saving.folder import CARD_FILE, RECIPE_FILE, WEIGHTS_FILE
from patchslim.saving.seal import seal_recipe
from patchslim.tokens.reduction import Keep

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8}


def timm_vit(**more):
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, "num_classes": 5, **more})


def change_model(model, method, *args, **kwargs):
    """Calls one of timm's own methods that change a model, and returns the model."""
    getattr(model, method)(*args, **kwargs)
    return model


def timm_eva(**more):
    settings = {"img_size": 56, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return timm.create_model("eva02_tiny_patch14_224", **settings, **more)


def timm_dinov3(**more):
    settings = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_small_patch16_dinov3", **settings, **more)


def make_hf_host(family, task="ForImageClassification", **more):
    config = getattr(transformers, f"{family}Config")(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
        **more,
    )
    return getattr(transformers, f"{family}{task}")(config)


HOSTS = {
    "timm-vit": timm_vit,
    "timm-custom": lambda: timm_vit(
        class_token=False, global_pool="map", reg_tokens=4, init_values=0.1, in_chans=1
    ),
    "timm-wide": lambda: timm_vit(
        img_size=(32, 48), dynamic_img_size=True, act_layer="relu", norm_layer="rmsnorm"
    ),
    "timm-new-head": lambda: change_model(timm_vit(), "reset_classifier", 3, global_pool="avg"),
    "timm-new-size": lambda: change_model(timm_vit(), "set_input_size", img_size=(48, 32)),
    "timm-distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TINY),
    "timm-no-head": lambda: timm_vit(num_classes=0, global_pool=""),
    "timm-eva02": timm_eva,
    "timm-dinov3": timm_dinov3,
    "hf-vit": lambda: make_hf_host("ViT"),
    "hf-bare-vit": lambda: make_hf_host("ViT", "Model"),
    "hf-deit-teacher": lambda: make_hf_host("DeiT", "ForImageClassificationWithTeacher"),
    "hf-dinov2": lambda: make_hf_host("Dinov2"),
    "hf-dinov2-registers": lambda: make_hf_host("Dinov2WithRegisters", num_register_tokens=2),
}  # fmt: skip


def make_images(slimmed, count=3):
    noise = torch.Generator().manual_seed(3)
    dtype = next(slimmed.host.parameters()).dtype
    shape = (count, *slimmed.plan.adapter.describe(slimmed.host).image_shape)
    return torch.randn(shape, generator=noise).to(dtype)


def logits_of(slimmed, images):
    with torch.no_grad():
        return slimmed.plan.adapter.logits(slimmed(images))


def assert_same(one, other):
    images = make_images(one)
    assert torch.equal(logits_of(one, images), logits_of(other, images))


class Scored(patchslim.Method):
    """Somebody else's method, with a parameter and a setting."""

    def __init__(self, *, sign: float = 1.0) -> None:
        super().__init__()
        self.sign = sign
        self.direction = nn.Parameter(torch.randn(32))

    def choose(self, tokens, signals, keep):
        score = tokens.x[:, tokens.prefix :] @ self.direction * self.sign
        return Keep(score.topk(keep, dim=1).indices)


class LargeScored(Scored):
    """`Scored` with so many parameters that saving takes a while."""

    def __init__(self, *, sign: float = 1.0, million: int = 8) -> None:
        super().__init__(sign=sign)
        self.million = million
        self.ballast = nn.Parameter(torch.zeros(million, 1_000_000))


@pytest.mark.parametrize("name", HOSTS)
def test_a_loaded_model_gives_the_same_answers_bit_for_bit(name, tmp_path):
    slimmed = patchslim.slim(HOSTS[name]().eval(), "tome", r=2)
    slimmed.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert_same(slimmed, loaded)
    assert loaded.counts() == slimmed.counts()
    assert method_settings(loaded.method) == method_settings(slimmed.method)
    assert not loaded.training
    beside = {CARD_FILE, "config.json"}
    assert {entry.name for entry in (tmp_path / "saved").iterdir()} - {
        "preprocessor_config.json"  # where the host says how images are prepared
    } == {WEIGHTS_FILE, RECIPE_FILE, *beside}


@pytest.mark.parametrize("build", [timm_vit, timm_eva, timm_dinov3, HOSTS["hf-dinov2"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_come_back_as_they_were(build, dtype, tmp_path):
    slimmed = patchslim.slim(build().eval().to(dtype), "topk", keep=0.5)
    slimmed.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_same(slimmed, loaded)


@pytest.mark.parametrize("build", [timm_eva, timm_dinov3])
def test_tables_that_are_not_stored_keep_their_own_type(build, tmp_path):
    """timm's own `dtype` leaves rotary tables in full precision, beside weights in half."""
    slimmed = patchslim.slim(build(dtype=torch.bfloat16).eval(), "tome", r=2)
    slimmed.save(tmp_path / "saved")
    recipe = json.loads((tmp_path / "saved" / RECIPE_FILE).read_text())
    assert recipe["dtype"] == "bfloat16"
    assert "float32" in recipe["buffers"].values()
    assert_same(slimmed, load(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        ("evit", {"keep_rate": 0.7, "at": (1, 2)}),
        ("random", {"keep": 0.5}),
        ("tome", {"r": (2, -0.5)}),
        ("tome", {"keep": [15, 13, 11]}),
        ("topk", {"macs": 0.7}),
    ],
)
def test_every_kind_of_schedule_and_tail_comes_back(method, budget, tmp_path):
    slimmed = patchslim.slim(timm_vit().eval(), method, **budget)
    slimmed.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert (loaded.schedule, loaded.plan.tail) == (slimmed.schedule, slimmed.plan.tail)
    assert_same(slimmed, loaded)


def test_settings_come_back(tmp_path):
    method = patchslim.find_method("evit")(fuse=False)
    patchslim.slim(timm_vit().eval(), method, keep_rate=0.7, at=(1,)).save(tmp_path / "saved")
    assert load(tmp_path / "saved").method.fuse is False


def test_a_timm_tag_keeps_its_mean_and_std(tmp_path):
    host = timm.create_model("vit_small_patch16_224.augreg_in21k", num_classes=3, **TINY).eval()
    host.pretrained_cfg = {**host.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    patchslim.slim(host, "tome", r=2).save(tmp_path / "saved")
    recipe = json.loads((tmp_path / "saved" / RECIPE_FILE).read_text())
    assert recipe["images"]["mean"] == [0.1, 0.2, 0.3]


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    host = timm_vit().eval()
    host.blocks[1].mlp.fc1.weight = host.blocks[0].mlp.fc1.weight
    host.blocks[2].norm1.weight.data = host.blocks[1].norm1.weight.data[:]
    slimmed = patchslim.slim(host, "tome", r=2)
    slimmed.save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert_same(slimmed, loaded)
    recipe = json.loads((tmp_path / "saved" / RECIPE_FILE).read_text())
    assert (len(recipe["shared"]), len(recipe["tied"])) == (2, 1)
    assert len([*loaded.parameters()]) == len([*slimmed.parameters()])
    blocks = loaded.host.blocks
    assert blocks[1].mlp.fc1.weight is blocks[0].mlp.fc1.weight
    with torch.no_grad():
        blocks[1].norm1.weight.add_(1)  # another parameter in the same memory
    assert torch.equal(blocks[2].norm1.weight, blocks[1].norm1.weight)


def test_overlapping_tensors_are_separated(tmp_path):
    host = timm_vit().eval()
    whole = torch.randn(64)
    host.blocks[0].norm1.weight.data = whole[:32]
    host.blocks[1].norm1.weight.data = whole[16:48]
    slimmed = patchslim.slim(host, "tome", r=2)
    slimmed.save(tmp_path / "saved")
    assert_same(slimmed, load(tmp_path / "saved"))


def test_a_method_of_ones_own_comes_back_with_its_parameters(tmp_path):
    slimmed = patchslim.slim(timm_vit().eval(), Scored(sign=-1.0), keep=0.5)
    slimmed.save(tmp_path / "saved")
    with pytest.raises(BadFile, match=r"not one of ours.*Scored.*method="):
        load(tmp_path / "saved")
    with pytest.raises(BadFile, match=r"'sign': -1\.0.*'sign': 1\.0"):
        load(tmp_path / "saved", method=Scored())
    with pytest.raises(BadFile, match="ToMe"):
        load(tmp_path / "saved", method=patchslim.find_method("tome")())
    assert_same(slimmed, load(tmp_path / "saved", method=Scored(sign=-1.0)))


def test_a_host_built_by_hand_has_to_be_given_again(tmp_path):
    from timm.models.vision_transformer import VisionTransformer

    def build():
        return VisionTransformer(**TINY, num_classes=5).eval()

    slimmed = patchslim.slim(build(), "topk", keep=0.5)
    slimmed.save(tmp_path / "saved")
    with pytest.raises(BadFile, match="model="):
        load(tmp_path / "saved")
    layers = timm_vit(norm_layer=nn.LayerNorm)
    patchslim.slim(layers.eval(), "topk", keep=0.5).save(tmp_path / "layers")
    with pytest.raises(BadFile, match="model="):
        load(tmp_path / "layers")
    assert_same(slimmed, load(tmp_path / "saved", model=build()))
    with pytest.raises(BadFile, match=r"other shapes for head\.bias, head\.weight"):
        load(tmp_path / "saved", model=VisionTransformer(**TINY, num_classes=7))
    with pytest.raises(BadFile, match=r"lacks blocks\.3.* and 9 more"):
        load(tmp_path / "saved", model=VisionTransformer(**{**TINY, "depth": 4}, num_classes=5))
    with pytest.raises(BadFile, match=r"model of timm VisionTransformer; model= is a Eva"):
        load(tmp_path / "saved", model=timm_eva())


def test_a_misfit_does_not_touch_the_given_model(tmp_path):
    patchslim.slim(timm_vit().eval(), "tome", r=2).save(tmp_path / "saved")
    other = timm_vit(img_size=40)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(BadFile):
        load(tmp_path / "saved", model=other)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_saving_again_replaces(tmp_path):
    first = patchslim.slim(timm_vit().eval(), "tome", r=2)
    second = patchslim.slim(timm_vit().eval(), "topk", keep=0.5)
    first.save(tmp_path / "deep" / "saved")
    second.save(tmp_path / "deep" / "saved")
    assert_same(second, load(tmp_path / "deep" / "saved"))
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["saved"]


def test_saving_never_deletes_what_it_did_not_write(tmp_path):
    slimmed = patchslim.slim(timm_vit().eval(), "tome", r=2)
    slimmed.save(tmp_path / "saved")
    (tmp_path / "saved" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadFile, match=r"thesis\.tex.*would delete"):
        slimmed.save(tmp_path / "saved")
    (tmp_path / "note").write_text("text")
    with pytest.raises(BadFile, match="is a file"):
        slimmed.save(tmp_path / "note")
    assert (tmp_path / "saved" / "thesis.tex").read_text() == "years of work"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    slimmed = patchslim.slim(timm_vit().eval(), "tome", r=2)
    slimmed.save(tmp_path / "v1")
    (tmp_path / "latest").symlink_to("v1")
    slimmed.save(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert_same(slimmed, load(tmp_path / "latest"))


def test_others_may_read_what_the_umask_lets_them_read(tmp_path):
    patchslim.slim(timm_vit().eval(), "tome", r=2).save(tmp_path / "saved")
    weights, recipe = (tmp_path / "saved" / name for name in (WEIGHTS_FILE, RECIPE_FILE))
    assert weights.stat().st_mode == recipe.stat().st_mode


# --- interruptions: real processes, killed


def kill_while_saving(slimmed, path):
    """Kills a process that saves as soon as a file appears; True if it was still saving."""
    fresh = path.with_name(f".{path.name}.new")
    kill_when(lambda: slimmed.save(path), when=lambda: fresh.exists() and any(fresh.iterdir()))
    return fresh.exists()


@needs_fork
def test_a_save_that_is_killed_leaves_the_old_one_whole_and_the_next_clears_up(tmp_path):
    path = tmp_path / "saved"
    old = patchslim.slim(timm_vit().eval(), LargeScored(million=1), keep=0.5)
    old.save(path)
    fat = patchslim.slim(timm_vit().eval(), LargeScored(), keep=0.5)
    assert any(kill_while_saving(fat, path) for _ in range(5)), "no kill came in time"
    assert (tmp_path / ".saved.new").exists()
    assert_same(old, load(path, method=LargeScored(million=1)))
    new = patchslim.slim(timm_vit().eval(), "tome", r=2)
    new.save(path)
    assert_same(new, load(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


@needs_fork
def test_a_first_save_that_is_killed_leaves_nothing_to_load(tmp_path):
    fat = patchslim.slim(timm_vit().eval(), LargeScored(), keep=0.5)
    assert any(kill_while_saving(fat, tmp_path / str(n)) for n in range(5))
    with pytest.raises(BadFile, match="is not there"):
        load(tmp_path / "0")


def test_a_process_that_died_between_the_two_renames_loses_nothing(tmp_path):
    """The files are made by hand: the old folder set aside, the new one not yet in its place."""
    slimmed = patchslim.slim(timm_vit().eval(), "tome", r=2)
    slimmed.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / ".saved.old")
    (tmp_path / ".saved.new").mkdir()
    assert_same(slimmed, load(tmp_path / "saved"))
    with (
        pytest.raises(RuntimeError, match="cut"),
        replace_folder(tmp_path / "saved", lambda path: [each.name for each in path.iterdir()]),
    ):
        raise RuntimeError("cut")
    assert_same(slimmed, load(tmp_path / "saved"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


@needs_fork
def test_two_processes_that_save_to_one_place_take_turns(tmp_path):
    slimmed = patchslim.slim(timm_vit().eval(), "tome", r=2)

    def save_often():
        for _ in range(3):
            slimmed.save(tmp_path / "saved")

    children = [fork_child(save_often) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert_same(slimmed, load(tmp_path / "saved"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_a_full_disk_is_reported_and_leaves_the_old_save_whole(small_disk):
    slimmed = patchslim.slim(timm_vit().eval(), "tome", r=2)
    slimmed.save(small_disk / "saved")
    fat = patchslim.slim(timm_vit().eval(), LargeScored(million=1), keep=0.5)
    with pytest.raises(BadFile, match=r"(?i)could not save.*no space left.*as it was"):
        fat.save(small_disk / "saved")
    assert_same(slimmed, load(small_disk / "saved"))
    assert [entry.name for entry in small_disk.iterdir()] == ["saved"]


# --- files that are not what they should be


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("io") / "saved"
    patchslim.slim(timm_vit().eval(), "tome", r=2).save(path)
    return path


@pytest.fixture
def saved(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "saved"))


def edit_recipe(path, **changes):
    """Changes entries by hand, as an editor does."""
    recipe = json.loads((path / RECIPE_FILE).read_text())
    (path / RECIPE_FILE).write_text(json.dumps({**recipe, **changes}, indent=1))


def forge_recipe(path, **changes):
    """Writes another recipe, with the checksums that an author would have given it."""
    recipe = json.loads((path / RECIPE_FILE).read_text())
    (path / RECIPE_FILE).write_text(json.dumps(seal_recipe({**recipe, **changes})))


def test_truncated_weights_are_noticed_by_their_size(saved):
    whole = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadFile, match=r"truncated: [\d,]+ of [\d,]+ bytes"):
        load(saved)


def test_a_flipped_bit_in_the_weights_is_found(saved):
    data = bytearray((saved / WEIGHTS_FILE).read_bytes())
    data[-5] ^= 1
    (saved / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(BadFile, match="SHA-256"):
        load(saved)


def test_a_pickle_in_place_of_the_weights_is_never_opened(saved, tmp_path):
    import hashlib
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    (saved / WEIGHTS_FILE).write_bytes(pickle.dumps(Bomb()))
    data = (saved / WEIGHTS_FILE).read_bytes()
    forge_recipe(saved, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(BadFile, match="not a safetensors file"):
        load(saved)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "topk"}, "method"),
        ({"settings": {"metric": "x"}}, "settings"),
        ({"schedule": {"kind": "constant", "r": 3, "inflect": 0.0}}, "schedule"),
        ({"library": None, "dtype": "float64"}, "dtype, library"),
        ({"images": {}}, "images"),
        ({"note": "mine"}, "note"),
        ({"checksums": {}}, "answers, beside, buffers"),
        ({"checksums": 1}, "checksums"),
    ],
)
def test_a_recipe_edited_by_hand_is_refused_and_the_entry_named(saved, changes, named):
    edit_recipe(saved, **changes)
    with pytest.raises(BadFile, match=rf"was edited.*{named}.*slim the host again"):
        load(saved)


def test_a_recipe_that_is_laid_out_in_another_way_is_the_same(saved):
    edit_recipe(saved)
    load(saved)


def test_checksums_cannot_be_taken_out_except_from_recipes_that_had_none(saved):
    recipe = json.loads((saved / RECIPE_FILE).read_text())
    del recipe["checksums"]
    (saved / RECIPE_FILE).write_text(json.dumps({**recipe, "package": "9.0.0"}))
    with pytest.raises(BadFile, match=r"checksums were taken out"):
        load(saved)
    (saved / RECIPE_FILE).write_text(json.dumps({**recipe, "package": "0.6.1"}))
    load(saved)


@pytest.mark.parametrize(
    "images",
    [
        {"std": [0, 0, 0]},
        {"std": [1, 1, -1]},
        {"mean": [0.5, 0.5]},
        {"crop_pct": -1},
        {"crop_pct": 1.5},
        {"crop_pct": 1e-9},
        {"interpolation": "cubist"},
        {"crop_mode": "cut"},
        {"image_size": [32, 32, 32]},
        {"image_size": [64, 64]},
    ],
)
def test_image_settings_without_sense_are_refused(saved, images):
    before = json.loads((saved / RECIPE_FILE).read_text())["images"]
    forge_recipe(saved, images={**before, **images})
    with pytest.raises(BadFile, match=r"Images cannot be prepared|prepares images of"):
        load(saved)


@pytest.mark.parametrize(
    "argument",
    [
        {"checkpoint_path": "weights.pth"},
        {"pretrained_cfg_overlay": {"file": "weights.pth"}},
        {"pretrained": True},
        {"device": "cuda"},
        {"depth": -1},
        {"depth": 2**40},
        {"embed_dim": 2**20},
        pytest.param({"depth": 100_000}, marks=pytest.mark.slow),
        {"norm_layer": {"_target_": "os.system"}},
    ],
)
def test_a_host_is_built_with_arguments_of_its_architecture_alone(saved, argument):
    host = json.loads((saved / RECIPE_FILE).read_text())["host"]
    forge_recipe(saved, host={**host, "args": {**host["args"], **argument}})
    with pytest.raises(
        PatchslimError, match=r"takes no setting|is not a setting|too large for its weights"
    ):
        load(saved)


def test_a_future_format_names_the_version_that_reads_it(saved):
    forge_recipe(saved, patchslim=2, package="9.1.0")
    with pytest.raises(
        BadFile, match=r"format 2, written by patchslim 9\.1\.0.*'patchslim>=9\.1\.0'"
    ):
        load(saved)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"patchslim": None}, BadFile, "no format version"),
        ({"patchslim": "1"}, BadFile, "no format version"),
        ({"method": "tone"}, UnknownName, "'tome'"),
        ({"method": "../tome"}, UnknownName, "Unknown method"),
        ({"settings": {"speed": 3}}, BadFile, "speed"),
        ({"settings": []}, BadFile, "settings"),
        ({"library": "timm_vti"}, UnknownName, "'timm_vit'"),
        ({"library": "timm_eva"}, BadFile, "timm Eva"),
        ({"host": {"architecture": "vit_tiny"}}, UnknownName, "Did you mean"),
        ({"host": {}}, BadFile, "cannot be followed"),
        ({"schedule": {"kind": "magic"}}, UnknownName, "Unknown kind of schedule"),
        ({"schedule": {"kind": "constant", "speed": 1}}, BadFile, "does not take"),
        ({"schedule": {"kind": "counts", "kept": ["a", 2, 3], "entering": 17, "prefix": 1}},
         BadSchedule, "whole numbers"),
        ({"schedule": {"kind": "counts", "kept": [9, 9], "entering": 17, "prefix": 1}},
         BadSchedule, "2 counts.*3 blocks"),
        ({"tail": "short"}, BadFile, "'exact' or 'full'"),
        ({"shared": {"host.head.bias": "host.nothing"}}, BadFile, "cannot be followed"),
        ({"sha256": "0" * 64}, BadFile, "SHA-256"),
        ({"versions": None}, BadFile, "versions"),
    ],
)  # fmt: skip
def test_another_recipe_gives_one_clear_error(saved, changes, error, message):
    forge_recipe(saved, **changes)
    with pytest.raises(error, match=message):
        load(saved)


def test_a_recipe_cannot_make_a_download_happen(saved):
    host = json.loads((saved / RECIPE_FILE).read_text())["host"]
    forge_recipe(saved, host={**host, "architecture": "hf-hub:somebody/something"})
    with pytest.raises((BadFile, UnknownName), match="hf-hub:somebody"):
        load(saved)


def test_a_host_that_takes_the_weights_but_answers_otherwise_is_refused(saved):
    """It is as if a default in the host's library had changed, which no shape of a weight shows."""
    host = json.loads((saved / RECIPE_FILE).read_text())["host"]
    forge_recipe(saved, host={**host, "args": {**host["args"], "act_layer": "relu"}})
    with pytest.raises(BadFile, match=r"answers otherwise.*timm \d.*model="):
        load(saved)


def test_foreign_and_missing_folders(saved, tmp_path):
    with pytest.raises(BadFile, match="is not there"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadFile, match=f"no {RECIPE_FILE}"):
        load(tmp_path)
    (saved / WEIGHTS_FILE).unlink()
    with pytest.raises(BadFile, match=f"has no {WEIGHTS_FILE}"):
        load(saved)
    (saved / RECIPE_FILE).write_text("{")
    with pytest.raises(BadFile, match="not readable as JSON"):
        load(saved)
    (saved / RECIPE_FILE).write_text("[1, 2]")
    with pytest.raises(BadFile, match="no format version"):
        load(saved)
    with pytest.raises(BadFile, match="is a file"):
        load(saved / RECIPE_FILE)


def test_a_host_whose_rebuilt_form_answers_otherwise_is_refused(saved):
    """The recipe is edited: the host still takes the weights, but computes something else."""
    host = json.loads((saved / RECIPE_FILE).read_text())["host"]
    forge_recipe(saved, host={**host, "args": {**host["args"], "patch_drop_rate": 0.5}})
    with pytest.raises(UnsupportedModel, match="patch_drop_rate"):
        load(saved)
