"""Lightning: a module that holds a model names it, trains with it slimmed, and saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import patchslim
from patchslim.errors import UnsupportedModel
from timm_variants import random_images

lightning = pytest.importorskip("lightning", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def make_module(model: Any) -> Any:
    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Classifier()


def test_its_trainer_trains_and_saves_a_slimmed_model(vit: Any, tmp_path: Path) -> None:
    module = make_module(vit)
    with pytest.raises(UnsupportedModel, match=r"model\.model = patchslim\.slim\(model\.model"):
        patchslim.slim(module, "tome", macs=0.7)
    module.model = patchslim.slim(module.model, "tome", macs=0.7)
    images = random_images(vit, 4)
    before = module.model(images).detach()
    loader = torch.utils.data.DataLoader([(image, 1) for image in images], batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    after = module.model.eval()(images).detach()
    assert not torch.equal(after, before)
    (saved,) = tmp_path.glob("checkpoints/*.ckpt")
    # Written by Lightning just now, and holding tensors and plain data.
    state = torch.load(saved, weights_only=True)["state_dict"]
    twin = make_module(patchslim.slim(vit, "tome", macs=0.7))
    twin.load_state_dict(state)
    assert torch.equal(twin.model.eval()(images), after)
