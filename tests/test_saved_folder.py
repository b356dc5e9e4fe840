"""What stands beside a saved model: a card for people, and files for other libraries."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
from PIL import Image

import patchslim
from patchslim.cli.main import main
from patchslim.errors import BadFile, WrongInput
from patchslim.example import digits
from patchslim.hosts._library import WHOM_TO_ASK
from patchslim.hosts._preprocessing import find_preprocessing
from patchslim.saving.folder import CARD_FILE, RECIPE_FILE
from patchslim.saving.seal import seal_recipe

MEAN = (0.1, 0.2, 0.3)


def make_hf_host() -> transformers.ViTForImageClassification:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


def make_processor() -> transformers.ViTImageProcessor:
    side = {"height": 32, "width": 32}
    return transformers.ViTImageProcessor(size=side, image_mean=list(MEAN), resample=2)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    make_hf_host().save_pretrained(tmp_path / "hf")
    make_processor().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def hf_slimmed(hf_folder: Path) -> patchslim.SlimModel:
    host = transformers.AutoModelForImageClassification.from_pretrained(hf_folder).eval()
    return patchslim.slim(host, "topk", keep=0.5)


def make_timm_slimmed() -> patchslim.SlimModel:
    torch.manual_seed(0)
    return patchslim.slim(timm.create_model("test_vit", num_classes=3).eval(), "tome", r=2)


def make_photo(width: int = 97, height: int = 61) -> Image.Image:
    noise = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (8, 12, 3), generator=noise, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.BICUBIC)


# --- how images are prepared


def test_how_images_are_prepared_survives_loading_and_saving_again(hf_slimmed, tmp_path):
    """transformers keeps it beside the weights, and a loaded host comes from no such folder."""
    hf_slimmed.save(tmp_path / "a")
    loaded = patchslim.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    first, second = (json.loads((tmp_path / n / RECIPE_FILE).read_text())["images"] for n in "ab")
    assert (tuple(first["mean"]), first["stated"]) == (MEAN, True)
    assert second == first
    again = patchslim.slim(loaded.host, "tome", r=1)
    assert find_preprocessing(again.host, again.plan.adapter).mean == MEAN


def test_the_recipe_counts_and_not_a_processor_that_was_edited(hf_slimmed, tmp_path):
    hf_slimmed.save(tmp_path / "a")
    processor = tmp_path / "a" / "preprocessor_config.json"
    entries = json.loads(processor.read_text())
    processor.write_text(json.dumps({**entries, "image_mean": [0.9, 0.9, 0.9]}))
    loaded = patchslim.load(tmp_path / "a")
    assert find_preprocessing(loaded.host, loaded.plan.adapter).mean == MEAN


def test_the_hosts_own_processor_stays_beside_it_and_names_no_code(hf_folder, tmp_path):
    file = hf_folder / "preprocessor_config.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps({**entries, "auto_map": {"AutoImageProcessor": "a--b.C"}}))
    host = transformers.AutoModelForImageClassification.from_pretrained(hf_folder).eval()
    patchslim.slim(host, "topk", keep=0.5).save(tmp_path / "a")
    patchslim.load(tmp_path / "a").save(tmp_path / "b")
    for name in "ab":
        assert json.loads((tmp_path / name / file.name).read_text()) == entries


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_processor_beside_a_loaded_model_stops_no_save(text, hf_slimmed, tmp_path):
    """Else a training of it would end without a model."""
    hf_slimmed.save(tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").write_text(text)
    patchslim.load(tmp_path / "a").save(tmp_path / "b")
    made = transformers.AutoImageProcessor.from_pretrained(tmp_path / "b")
    assert tuple(made.image_mean) == MEAN


def test_a_host_that_is_handed_over_is_prepared_as_was_saved(hf_slimmed, tmp_path):
    hf_slimmed.save(tmp_path / "a")
    loaded = patchslim.load(tmp_path / "a", model=make_hf_host())
    assert find_preprocessing(loaded.host, loaded.plan.adapter).mean == MEAN


def test_a_processor_in_the_working_directory_is_not_taken_for_that_of_a_host(
    tmp_path, monkeypatch
):
    make_processor().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    host = make_hf_host().eval()
    assert not find_preprocessing(host, patchslim.find_adapter(host)).stated


def test_a_processor_in_the_cache_of_the_hubs_client_is_found(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    make_hf_host().save_pretrained(repository / "snapshots" / commit)
    make_processor().save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    host = transformers.AutoModelForImageClassification.from_pretrained("someone/vit").eval()
    found = find_preprocessing(host, patchslim.find_adapter(host))
    assert (found.mean, found.stated) == (MEAN, True)


# --- what other libraries make of the folder


def test_transformers_says_whom_to_ask(hf_slimmed, tmp_path):
    hf_slimmed.save(tmp_path / "vit-topk")
    for opened in (
        transformers.AutoModelForImageClassification,
        transformers.AutoModel,
        transformers.AutoConfig,
    ):
        with pytest.raises(ValueError, match=re.escape(WHOM_TO_ASK)):
            opened.from_pretrained(tmp_path / "vit-topk")


def test_timm_says_whom_to_ask(tmp_path):
    make_timm_slimmed().save(tmp_path / "vit-tome")
    with pytest.raises(RuntimeError, match=re.escape(WHOM_TO_ASK)):
        timm.create_model(f"local-dir:{tmp_path / 'vit-tome'}")


def test_the_command_line_says_where_it_needs_a_dense_model(tmp_path, capsys):
    make_timm_slimmed().save(tmp_path / "saved")
    folder, out = str(tmp_path / "saved"), str(tmp_path / "out")
    for command in (
        ["slim", folder, "--method", "tome", "--r", "2"],
        ["macs", folder],
        ["bench", folder, "--data", "digits", "--out", out],
        ["plan", folder, "--data", "digits", "--macs", "0.5"],
    ):
        assert main(command) == 2
        assert "is slimmed already" in " ".join(capsys.readouterr().err.split())


def test_the_pipeline_of_transformers_takes_the_loaded_model_and_the_folder(hf_slimmed, tmp_path):
    hf_slimmed.save(tmp_path / "saved")
    classify = transformers.pipeline(
        "image-classification",
        model=patchslim.load(tmp_path / "saved"),
        image_processor=str(tmp_path / "saved"),
    )
    best = classify(make_photo())[0]
    with torch.no_grad():
        pixels = make_processor()(make_photo(), return_tensors="pt")["pixel_values"]
        expected = hf_slimmed(pixels).logits.softmax(-1)[0]
    assert best["label"] == hf_slimmed.host.config.id2label[int(expected.argmax())]
    assert best["score"] == pytest.approx(float(expected.max()), abs=1e-6)


@pytest.mark.parametrize(
    "said",
    [
        {"crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "center"},
        {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "center"},
        {"crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "squash"},
    ],
)
def test_the_processor_in_the_folder_prepares_images_as_the_host_says(said, tmp_path):
    host = timm.create_model("test_vit", num_classes=3).eval()
    host.pretrained_cfg = {**host.pretrained_cfg, **said}
    slimmed = patchslim.slim(host, "tome", r=2)
    slimmed.save(tmp_path / "saved")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    pixels = processor(make_photo(), return_tensors="pt")["pixel_values"][0]
    prepared = find_preprocessing(host, slimmed.plan.adapter)
    expected = prepared.transform()(make_photo())
    # Pillow resizes in whole numbers, and transformers in floats or in other whole numbers.
    assert (pixels - expected).abs().max() < 3 / 255 / min(prepared.std)
    assert pixels.shape == expected.shape


@pytest.mark.parametrize("said", [{"crop_mode": "border"}, {"mean": None}])
def test_no_processor_is_written_where_none_does_the_same(said, tmp_path):
    host = timm.create_model("test_vit", num_classes=3).eval()
    host.pretrained_cfg = {**host.pretrained_cfg, **said}
    patchslim.slim(host, "tome", r=2).save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "preprocessor_config.json").exists()
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == {
        "model_type": WHOM_TO_ASK,
        "architecture": WHOM_TO_ASK,
    }


# --- the card


def test_the_card_tells_what_was_done_and_has_the_results(tmp_path):
    host = digits.host()
    slimmed = patchslim.slim(host, "topk", macs=0.6)
    slimmed.save(tmp_path / "saved")
    card = (tmp_path / "saved" / CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: patchslim\n")
    for fact in ("`topk`", str(slimmed.macs()), " ".join(map(str, slimmed.counts())), "timm "):
        assert fact in card
    assert "patchslim measure FOLDER" in card
    report = patchslim.measure(slimmed, dense=host, repeats=0)
    slimmed.save(tmp_path / "saved", results=report)
    card = (tmp_path / "saved" / CARD_FILE).read_text()
    assert report.markdown().strip() in card
    assert "Not measured" not in card
    assert patchslim.load(tmp_path / "saved").counts() == slimmed.counts()
    with pytest.raises(WrongInput, match="give the Report that `measure` returns"):
        slimmed.save(tmp_path / "saved", results="very fast")


def test_measure_puts_its_results_into_the_card(tmp_path, capsys):
    folder = str(tmp_path / "saved")
    assert main(["slim", "digits", "--method", "topk", "--macs", "0.6", "--out", folder]) == 0
    options = ["--data", "digits", "--limit", "16", "--repeats", "0"]
    assert main(["measure", folder, *options, "--card"]) == 0
    assert f"Put into the card of {folder}" in capsys.readouterr().out
    card = (tmp_path / "saved" / CARD_FILE).read_text()
    assert "| topk" in card
    assert "dense" in card
    assert main(["measure", folder, *options]) == 0
    assert main(["measure", "digits", "--method", "topk", "--macs", "0.6", "--card"]) == 2
    assert "has no model card" in " ".join(capsys.readouterr().err.split())


def test_an_edited_card_is_refused_before_anything_is_measured_or_trained(tmp_path, capsys):
    slimmed = patchslim.slim(digits.host(), "topk", macs=0.6)
    slimmed.save(tmp_path / "run" / "model")
    card = tmp_path / "run" / "model" / CARD_FILE
    card.write_text("mine")
    folder = str(card.parent)
    assert main(["measure", folder, "--data", "digits", "--card"]) == 2
    said = capsys.readouterr()
    assert "holds other things (README.md)" in " ".join(said.err.split())
    assert "images" not in said.err  # nothing was scored
    plan = ["plan", "digits", "--data", "digits", "--macs", "0.5", "--out", folder]
    assert main(plan) == 2
    assert "holds other things (README.md)" in " ".join(capsys.readouterr().err.split())
    scenes = digits.scenes("train", 4)
    images = [(digits.normalise(scenes.images), torch.from_numpy(scenes.labels))]
    lines = []
    with pytest.raises(BadFile, match=r"holds other things \(README.md\)"):
        patchslim.train(
            slimmed, images, patchslim.TrainConfig(steps=1), out=tmp_path / "run",
            resume=True, progress=lines.append,
        )  # fmt: skip
    assert not lines
    assert card.read_text() == "mine"


def test_a_training_run_puts_its_results_into_the_card(tmp_path):
    scenes = digits.scenes("train", 32)
    images = [(digits.normalise(scenes.images), torch.from_numpy(scenes.labels))]
    slimmed = patchslim.slim(digits.host(), "topk", macs=0.6)
    config = patchslim.TrainConfig(steps=1)
    trained = patchslim.train(slimmed, images, config, validation=images, out=tmp_path / "run")
    card = (tmp_path / "run" / "model" / CARD_FILE).read_text()
    assert trained.report.markdown().strip() in card
    assert "trained with fewer patches" in card


# --- nothing of somebody else is replaced


def test_a_card_that_was_edited_is_not_deleted(tmp_path):
    slimmed = make_timm_slimmed()
    slimmed.save(tmp_path / "saved")
    slimmed.save(tmp_path / "saved")
    card = tmp_path / "saved" / CARD_FILE
    card.write_text(card.read_text() + "\nOur licence.\n")
    with pytest.raises(BadFile, match=r"holds other things \(README.md\)"):
        slimmed.save(tmp_path / "saved")
    assert card.read_text().endswith("Our licence.\n")
    assert patchslim.load(tmp_path / "saved").counts() == slimmed.counts()


def test_a_folder_of_hugging_face_is_not_replaced(hf_slimmed, hf_folder):
    before = sorted(hf_folder.iterdir())
    with pytest.raises(BadFile, match=r"holds other things \(config.json"):
        hf_slimmed.save(hf_folder)
    assert sorted(hf_folder.iterdir()) == before


@pytest.mark.parametrize("beside", [None, {}, [], "README.md", {"notes.txt": 3}, {"notes.txt": ""}])
def test_a_recipe_that_tells_nothing_of_other_files_lets_none_be_deleted(beside, tmp_path):
    slimmed = make_timm_slimmed()
    slimmed.save(tmp_path / "saved")
    folder = tmp_path / "saved"
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    recipe = {name: value for name, value in recipe.items() if name != "beside"}
    recipe |= {} if beside is None else {"beside": beside}
    (folder / RECIPE_FILE).write_text(json.dumps(seal_recipe(recipe)))
    for name in (CARD_FILE, "config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(BadFile, match="holds other things"):
        slimmed.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    slimmed.save(folder)  # as an older version left it
    assert (folder / CARD_FILE).is_file()
