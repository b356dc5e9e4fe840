"""Models in wrappers: the error names the model inside, which is slimmed and wrapped again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

import patchslim
from comparison import is_close
from patchslim.errors import UnsupportedModel
from small_hosts import slim_host
from timm_variants import random_images


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Makes this process a group of one, since DDP wants a group."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compile_eagerly(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def distribute(model: nn.Module) -> Any:
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS = {
    "torch.compile": (compile_eagerly, "model._orig_mod"),
    "DataParallel": (nn.DataParallel, "model.module"),
    "DDP": (distribute, "model.module"),
    "compiled DDP": (lambda model: compile_eagerly(distribute(model)), "model._orig_mod.module"),
    "averaged by torch": (AveragedModel, "model.module"),
    "averaged by timm": (timm.utils.ModelEmaV3, "model.module"),
}
every_wrapper = pytest.mark.parametrize(
    ("wrap", "inner"),
    [
        pytest.param(*each, id=name, marks=[pytest.mark.slow] if "compile" in name else [])
        for name, each in WRAPPERS.items()
    ],
)


@every_wrapper
def test_the_model_inside_is_named_slimmed_and_wrapped_again(
    vit: Any, wrap: Any, inner: str, one_process: None
):
    model, images = wrap(vit), random_images(vit)
    with pytest.raises(UnsupportedModel, match="It wraps a VisionTransformer") as caught:
        patchslim.slim(model, "tome", r=3)
    assert "put that back" not in str(caught.value)
    (call,) = re.findall(r"patchslim\.slim\((model\.\S+), \.\.\.\)", str(caught.value))
    assert call == inner
    slimmed = slim_host(eval(call, {"model": model}))
    assert is_close(wrap(slimmed).eval()(images), slimmed(images))


@every_wrapper
def test_a_slimmed_model_in_a_wrapper_is_named(
    vit: Any, wrap: Any, inner: str, one_process: None, tmp_path: Path
):
    model, named = wrap(slim_host(vit)), re.escape(inner)
    with pytest.raises(UnsupportedModel, match=rf"slimmed already, {named}\. Slim its \.host"):
        patchslim.slim(model, "tome", r=3)
    with pytest.raises(UnsupportedModel, match=rf"give {named}\."):
        patchslim.train(model, [], out=tmp_path / "trained")
    with pytest.raises(UnsupportedModel, match=rf"[gG]ive {named}\."):
        patchslim.measure(model)
    with pytest.raises(UnsupportedModel, match=rf"give {named}\."):
        patchslim.export(model, tmp_path / "model.onnx")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_a_model_with_low_rank_updates_is_named_or_merged(hf_vit: Any):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(hf_vit, config)
    with pytest.raises(UnsupportedModel, match=r"slim\(model\.base_model\.model, \.\.\.\).*merge_"):
        patchslim.slim(model, "tome", r=2)
    patchslim.slim(model.base_model.model, "tome", r=2)
    patchslim.slim(model.merge_and_unload(), "tome", r=2)
