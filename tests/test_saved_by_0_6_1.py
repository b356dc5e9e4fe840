"""Files that patchslim 0.6.1 wrote still load: models, stopped runs, a report, a recipe."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import patchslim
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.report.report import Report
from patchslim.saving.folder import read_recipe
from patchslim.training.config import TrainConfig

SAVED = Path(__file__).parent / "reference" / "saved_0_6_1"
LOGITS = load_file(SAVED / "logits.safetensors")
MODELS = sorted(folder.name for folder in (SAVED / "models").iterdir())
# Double precision agrees between machines; steps of an optimiser in single precision do nearly.
EXACT = {"rtol": 0, "atol": 1e-12}
TRAINED = {"rtol": 0, "atol": 1e-3}


def draw_images(count, size=16, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator).half().float()


def labelled_images():
    return [(draw_images(8, seed=3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))]


def logits_of(model, size=16):
    with torch.inference_mode():
        out = model.double()(draw_images(4, size).double())
    return getattr(out, "logits", out)


def test_every_family_and_kind_of_method_is_here():
    recipes = [read_recipe(SAVED / "models" / name) for name in MODELS]
    assert {recipe["package"] for recipe in recipes} == {"0.6.1"}
    families = {recipe["library"] for recipe in recipes}
    assert families == {"timm_vit", "timm_eva", "timm_levit", "transformers_vit"}
    assert {"tome", "evit", "similarity", "dynamicvit", "evo"} == {
        recipe["method"] for recipe in recipes
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_the_same_logits(name):
    model = patchslim.load(SAVED / "models" / name)
    torch.testing.assert_close(
        logits_of(model, 64 if "levit" in name else 16), LOGITS[name], **EXACT
    )


def test_a_saved_model_is_saved_again_with_the_same_recipe(tmp_path):
    one = patchslim.load(SAVED / "models" / "dynamicvit")
    one.save(tmp_path / "again")
    old, new = (
        read_recipe(folder) for folder in (SAVED / "models" / "dynamicvit", tmp_path / "again")
    )
    # The weights of a method have a new name since then, so the file is another. There was no card.
    changed = {"package", "method_class", "versions", "answers", "bytes", "sha256", "beside"}
    for name in old.keys() - changed:
        assert new[name] == old[name], name


def test_a_stopped_training_can_be_resumed(tmp_path):
    out = shutil.copytree(SAVED / "training", tmp_path / "run")
    lines = []
    config = TrainConfig(steps=4, batch=4, lr=1e-3, checkpoint=1, validate=2, workers=0)
    done = patchslim.train(
        patchslim.load(SAVED / "models" / "dynamicvit"),
        labelled_images(),
        config,
        out=out,
        validation=labelled_images(),
        resume=True,
        progress=lines.append,
    )
    assert not any(line.startswith(("step 1/", "step 2/")) for line in lines)
    assert done.step == 2  # the best weights, which are in the checkpoint
    assert [line for line in lines if line.startswith("step 4/")]
    torch.testing.assert_close(logits_of(done.model), LOGITS["training"], **TRAINED)
    torch.testing.assert_close(
        logits_of(patchslim.load(out / "model")), LOGITS["training"], **TRAINED
    )


def test_a_stopped_calibration_can_be_resumed(tmp_path):
    out = shutil.copytree(SAVED / "calibration", tmp_path / "run")
    lines = []
    done = patchslim.calibrate(
        patchslim.load(SAVED / "models" / "tome").host,
        labelled_images(),
        "patch_slimming_dynamic",
        tolerance=0.05,
        config=PatchSlimmingConfig(images=8, probe=4, batch=4, lr=1e-3, epochs=1, step=4),
        out=out,
        resume=True,
        progress=lines.append,
    )
    assert any("block 0" in line for line in lines)
    assert not any("block 2" in line for line in lines)
    torch.testing.assert_close(logits_of(done.model), LOGITS["calibration"], **TRAINED)


def test_a_report_is_read_and_written_again_word_for_word(tmp_path):
    report = Report.load(SAVED / "report.json")
    assert [row.name for row in report.rows] == [
        "dense",
        "untrained",
        "random/untrained",
        "trained",
    ]
    assert "trained" in report.table()
    assert "trained" in report.csv()
    report.save(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == (SAVED / "report.json").read_bytes()
