"""Hosts with quantised layers: counted right, run right, and refused where they cannot be held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchslim
from hf_hosts import tiny_hf
from patchslim.errors import UnsupportedModel
from small_hosts import HOSTS, small_variant
from timm_variants import tiny_vit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]
BUILT = {
    "timm": tiny_vit,
    "timm, distilled": HOSTS["distilled"].build,
    "timm, pooled by a query": HOSTS["query"].build,
    "timm EVA": small_variant("eva", use_rot_pos_emb=True, qkv_fused=False).build,
    "Hugging Face": tiny_hf,
}


def quantise_dynamically(model: nn.Module) -> Any:
    """Quantises the linear layers as PyTorch has always done."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def quantise_by_torchao(model: nn.Module) -> Any:
    """Quantises the linear layers in place, as torchao does."""
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


class LowRank(nn.Module):
    """A linear layer with a low-rank update, as PEFT puts in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


every_quantiser = pytest.mark.parametrize("quantise", [quantise_dynamically, quantise_by_torchao])


@every_quantiser
@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
def test_operations_are_those_of_the_plain_model(build: Any, quantise: Any):
    host = build()
    wanted = patchslim.macs(host), patchslim.macs(host, "tome", r=2)
    host = quantise(host)
    assert (patchslim.macs(host), patchslim.macs(host, "tome", r=2)) == wanted
    slimmed = patchslim.slim(host, "tome", r=2)
    assert (slimmed.dense_macs(), slimmed.macs()) == wanted


def test_a_low_rank_update_costs_what_it_adds(vit: Any):
    before, attention = patchslim.macs(vit), vit.blocks[1].attn
    attention.qkv = LowRank(attention.qkv)
    added = sum(each.weight.numel() for each in (attention.qkv.down, attention.qkv.up))
    assert patchslim.macs(vit).total == before.total + 21 * added
    assert patchslim.slim(vit, "tome", r=2).dense_macs().total == before.total + 21 * added


def test_rows_that_are_quantised_together_need_the_full_tail(vit: Any):
    """In dynamic quantisation one scale holds for all rows, so that none can be left out."""
    host = quantise_dynamically(vit)
    with pytest.raises(UnsupportedModel, match=r"With tail='full' it does not differ"):
        patchslim.slim(host, "tome", macs=0.8)
    slimmed = patchslim.slim(host, "tome", macs=0.8, tail="full")
    assert slimmed.macs().total <= 0.8 * patchslim.macs(host).total


@every_quantiser
def test_what_needs_plain_weights_refuses_quantised_ones(vit: Any, quantise: Any, tmp_path: Path):
    slimmed, path = patchslim.slim(quantise(vit), "tome", r=2), tmp_path / "model"
    batch = [(torch.randn(2, 3, 16, 20), torch.tensor([0, 1]))]
    for verb, call in (
        ("saved", lambda: slimmed.save(path)),
        ("trained", lambda: patchslim.train(slimmed, batch, out=path)),
        ("exported", lambda: patchslim.export(slimmed, tmp_path / "model.onnx")),
    ):
        with pytest.raises(UnsupportedModel, match=rf"is quantised.*cannot be {verb}.*Quantise"):
            call()
    assert not list(tmp_path.iterdir())
