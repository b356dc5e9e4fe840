"""PEFT: low-rank updates of a slimmed model are trained, saved, loaded, merged and counted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import patchslim
from hf_hosts import random_pixels, tiny_hf
from patchslim.errors import BadFile
from patchslim.testing.counting import count_macs

peft = pytest.importorskip("peft")
# What PEFT asks of a model of transformers is called otherwise in transformers' next version.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def updates(**settings: Any) -> Any:
    """Makes the settings of low-rank updates, with a head that is trained whole."""
    return peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], r=4, **settings
    )


def wrap(model: nn.Module) -> Any:
    """Wraps a model with updates that show: PEFT's own begin with zero."""
    wrapped = peft.get_peft_model(model, updates())
    noise = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=noise)
    return wrapped.eval()


@pytest.fixture
def slimmed() -> Any:
    """Returns a slimmed classifier."""
    return patchslim.slim(tiny_hf(), "tome", r=2)


def answer(model: Any) -> torch.Tensor:
    """Asks a model for its logits of fixed images."""
    with torch.no_grad():
        logits: torch.Tensor = model(pixel_values=random_pixels(tiny_hf())).logits
    return logits


@pytest.mark.slow
def test_updates_of_a_slimmed_model_are_trained_and_loaded_again(slimmed: Any, tmp_path: Path):
    before = {name: value.clone() for name, value in slimmed.state_dict().items()}
    model = peft.get_peft_model(slimmed, updates())
    images = [{"pixel_values": torch.randn(3, 16, 16), "labels": n % 3} for n in range(8)]
    settings = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = transformers.Trainer(model, settings, train_dataset=images, eval_dataset=images)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model(str(tmp_path / "updates"))
    host = tiny_hf()
    again = patchslim.slim(host, "tome", r=2)
    again.load_state_dict(before)
    untrained = answer(again.eval())
    loaded = peft.PeftModel.from_pretrained(again, tmp_path / "updates")
    assert torch.equal(answer(loaded.eval()), answer(model.eval()))
    assert not torch.equal(answer(model), untrained)


def test_merged_updates_are_saved_and_loaded_like_any_weights(slimmed: Any, tmp_path: Path):
    model = wrap(slimmed)
    wanted = answer(model)
    merged = model.merge_and_unload()
    assert merged is slimmed
    merged.save(tmp_path / "saved")
    assert torch.allclose(answer(patchslim.load(tmp_path / "saved")), wanted, atol=1e-5)


def test_updates_that_are_not_merged_need_their_model_to_be_loaded(tmp_path: Path):
    model = wrap(tiny_hf())
    slimmed = patchslim.slim(model.base_model.model, "tome", r=2)
    model.save_pretrained(tmp_path / "updates")
    dense = peft.PeftModel.from_pretrained(tiny_hf(), tmp_path / "updates").base_model.model
    assert torch.equal(answer(patchslim.slim(dense.eval(), "tome", r=2)), answer(slimmed))
    slimmed.save(tmp_path / "saved")
    with pytest.raises(BadFile, match=r"low-rank updates.*model=.*merge_and_unload"):
        patchslim.load(tmp_path / "saved")
    loaded = patchslim.load(tmp_path / "saved", model=wrap(tiny_hf()).base_model.model)
    assert torch.equal(answer(loaded), answer(slimmed))


@pytest.mark.parametrize("state", ["active", "off", "merged", "several"])
def test_operations_are_those_that_updates_add(state: str):
    model = wrap(tiny_hf())
    dense = patchslim.macs(tiny_hf(), "random", keep=0.5).total
    if state == "several":
        model.add_adapter("other", updates())
    elif state == "merged":
        model.merge_adapter()
    elif state == "off":
        model.base_model.disable_adapter_layers()
    slimmed = patchslim.slim(model.base_model.model, "random", keep=0.5)
    images = random_pixels(slimmed.host, 1)
    assert slimmed.macs().total == count_macs(slimmed, images)
    assert (slimmed.macs().total == dense) == (state in ("off", "merged"))


def test_a_slimmed_model_with_updates_is_measured_by_its_part(slimmed: Any):
    model = wrap(slimmed)
    with pytest.raises(patchslim.PatchslimError) as caught:
        patchslim.measure(model)
    (part,) = re.findall(r"give (model\.\S+)\.", str(caught.value))
    report = patchslim.measure(eval(part, {"model": model}), batch=1, repeats=1)
    macs = {row.method: row.macs for row in report.rows}
    assert macs["tome"] == slimmed.macs().total > patchslim.macs(tiny_hf(), "tome", r=2).total
