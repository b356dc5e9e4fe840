"""`transformers.Trainer` trains and evaluates a slimmed classifier with its default settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import patchslim
from comparison import is_close
from hf_hosts import random_pixels
from patchslim.errors import BadFile, WrongInput
from patchslim.hosts._catalog import find_host

IMAGES = 12


def make_dataset(host: Any) -> Any:
    """Makes a data set with the columns of a real one, of which a model takes two."""
    datasets = pytest.importorskip("datasets")
    rows = {
        "pixel_values": random_pixels(host, IMAGES).numpy(),
        "labels": [index % 7 for index in range(IMAGES)],
        "file_name": [f"{index}.png" for index in range(IMAGES)],
    }
    return datasets.Dataset.from_dict(rows).with_format("torch", columns=["pixel_values", "labels"])


def make_trainer(model: Any, dataset: Any, folder: Path, **settings: Any) -> Any:
    """Makes a Trainer with its defaults, but for what keeps a test short and silent."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    usual = {"num_train_epochs": 1, "per_device_train_batch_size": 2, **settings}
    arguments = transformers.TrainingArguments(str(folder), **quiet, **usual)
    return transformers.Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset)


@pytest.mark.slow
def test_trainer_trains_evaluates_and_predicts_with_its_defaults(hf_vit: Any, tmp_path: Path):
    before = copy.deepcopy(hf_vit.state_dict())
    slimmed = patchslim.slim(hf_vit, "tome", r=3)
    trainer = make_trainer(slimmed, make_dataset(hf_vit), tmp_path)
    assert trainer.label_names == ["labels"]
    lost = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < lost
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (IMAGES, 7)
    changed = [name for name, each in hf_vit.state_dict().items() if not each.equal(before[name])]
    assert "classifier.weight" in changed


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_with_nothing_removed_it_learns_what_the_dense_model_learns(
    hf_vit: Any, tmp_path: Path, smoothing: float
):
    """Losses of accumulated batches are averaged as for the host itself."""
    dense = copy.deepcopy(hf_vit)
    settings = {"gradient_accumulation_steps": 3, "label_smoothing_factor": smoothing}
    dataset = make_dataset(hf_vit)
    for model in (dense, patchslim.slim(hf_vit, "identity")):
        trainer = make_trainer(model, dataset, tmp_path, **settings, optim="sgd", learning_rate=0.1)
        trainer.train()
    for name, wanted in dense.state_dict().items():
        assert is_close(hf_vit.state_dict()[name], wanted, factor=30), name


@pytest.mark.slow
def test_trainer_resumes_and_its_folder_says_what_to_call(hf_vit: Any, tmp_path: Path):
    slimmed = patchslim.slim(hf_vit, "tome", r=3)
    trainer = make_trainer(
        slimmed,
        make_dataset(hf_vit),
        tmp_path,
        save_steps=3,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()
    assert trainer.train(resume_from_checkpoint=True).global_step == 6
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        with pytest.raises(BadFile, match=r"saves a slimmed model\. Call slimmed\.save\(path\)"):
            patchslim.load(folder)
        with pytest.raises(BadFile, match=r"holds no model.*Call slimmed\.save\(path\)"):
            find_host(str(folder))
    slimmed.save(tmp_path / "slimmed")
    again, pixels = patchslim.load(tmp_path / "slimmed"), random_pixels(hf_vit)
    with torch.no_grad():
        assert is_close(again(pixels).logits, slimmed.eval()(pixels).logits)


def test_loss_is_a_share_of_the_items_that_the_host_is_told(hf_vit: Any):
    slimmed, pixels = patchslim.slim(hf_vit, "identity"), random_pixels(hf_vit)
    told = {"labels": torch.tensor([1, 4]), "num_items_in_batch": torch.tensor(10)}
    wanted = hf_vit(pixels, **told).loss
    assert is_close(slimmed(pixel_values=pixels, **told).loss, wanted)
    assert not is_close(slimmed(pixel_values=pixels, labels=told["labels"]).loss, wanted)


def test_labels_are_refused_by_hosts_that_take_none(vit: Any):
    images = torch.randn(2, 3, 16, 20)
    with pytest.raises(WrongInput, match="takes images alone, not \\['labels'\\]"):
        patchslim.slim(vit, "tome", r=2)(images, labels=torch.tensor([1, 4]))


def test_images_are_given_once(hf_vit: Any):
    pixels = random_pixels(hf_vit)
    with pytest.raises(WrongInput, match="pixel_values"):
        patchslim.slim(hf_vit, "tome", r=2)(pixels, pixel_values=pixels)


@pytest.mark.slow
def test_a_slimmed_timm_model_inside_of_a_wrapper_is_trained(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(architecture="test_vit", num_labels=7)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    host = model.timm_model
    model.timm_model = patchslim.slim(host, "tome", r=9)
    images, before = torch.randn(IMAGES, 3, 160, 160), host.head.weight.clone()
    dataset = [{"pixel_values": each, "labels": n % 7} for n, each in enumerate(images)]
    trainer = make_trainer(model, dataset, tmp_path)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    assert not host.head.weight.equal(before)
    with torch.no_grad():
        wanted = model(images[:2]).logits
    model.timm_model.save(tmp_path / "part")
    model.timm_model = host
    model.save_pretrained(tmp_path / "whole")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
    again.timm_model = patchslim.slim(again.timm_model, "tome", r=9)
    loaded = patchslim.load(tmp_path / "part")
    with torch.no_grad():
        assert is_close(again(images[:2]).logits, wanted)
        assert is_close(loaded(images[:2]), wanted)
