"""The numbers that the official ToMe and EViT gave, in float64 (see tests/reference/README.md)."""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.errors import DeepCut, ShortSchedule
from patchslim.reducers.evit import EViT
from patchslim.reducers.tome import ToMe

FOLDER = Path(__file__).parent / "reference"
TINY = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
TOME = {"r7": 7, "r7dec": (7, -1), "list": [3, 9, 0, 5], "cap20": 20}
RATES = {"fuse": (0.7, (1, 2)), "nofuse": (0.7, (1, 2)), "fuse_05": (0.5, (1, 2, 3))}


@cache
def numbers(name):
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def host(prefix):
    weights = {
        name.partition(".")[2]: value
        for start in ("model.", "distmodel.")[: 2 if prefix else 1]
        for name, value in numbers("tiny_host").items()
        if name.startswith(start)
    }
    model = (VisionTransformerDistilled if prefix else VisionTransformer)(**TINY)
    model.load_state_dict(weights, strict=True)
    return model.double().eval()


def images():
    return numbers("tiny_host")["images"].double()


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


class Recording(EViT):
    """EViT that remembers which rows it kept."""

    def __init__(self, *, fuse):
        super().__init__(fuse=fuse)
        self.kept = []

    def choose(self, tokens, signals, keep):
        reduction = super().choose(tokens, signals, keep)
        self.kept.append(reduction.kept)
        return reduction


@pytest.mark.parametrize("prefix", ["", "dist_"])
def test_the_hosts_are_the_ones_that_the_numbers_were_made_with(prefix):
    with torch.no_grad():
        same(host(prefix)(images()), numbers("tiny_host")[f"{prefix}dense.logits"])


@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
@pytest.mark.filterwarnings("ignore::patchslim.errors.ShortSchedule")
@pytest.mark.parametrize("setting", TOME)
@pytest.mark.parametrize("prefix", ["", "dist_"])
def test_tome_gives_the_official_numbers(prefix, setting):
    wanted = {
        name.rpartition(".")[2]: value
        for name, value in numbers("tome_golden").items()
        if name.startswith(f"{prefix}{setting}.")
    }
    slimmed = patchslim.slim(host(prefix), "tome", r=TOME[setting])
    with torch.no_grad():
        same(slimmed(images()), wanted["logits"])
        traced = slimmed.trace(images())
    last = traced[-1]
    assert [tokens.x.shape[1] for tokens in traced] == wanted["counts"].tolist()
    assert list(slimmed.counts()) == wanted["counts"].tolist()
    same(last.x, wanted["features"])
    assert torch.equal(last.sizes().double(), wanted["size"][:, last.prefix :, 0])
    source = wanted["source"].long()
    assert torch.equal(last.origin + last.prefix, source[:, last.prefix :])


def test_tome_without_proportional_attention_gives_the_official_numbers():
    wanted = numbers("tome_golden")
    slimmed = patchslim.slim(host(""), ToMe(proportional=False), r=7)
    with torch.no_grad():
        same(slimmed(images()), wanted["r7_noprop.logits"])
        last = slimmed.trace(images())[-1]
    assert torch.equal(last.sizes().double(), wanted["r7_noprop.size"][:, 1:, 0])


def test_tome_says_where_the_official_code_silently_merges_fewer():
    with pytest.warns(ShortSchedule, match="block 2"), pytest.warns(DeepCut):
        patchslim.slim(host(""), "tome", r=20)


@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
@pytest.mark.parametrize("setting", RATES)
def test_evit_gives_the_official_numbers(setting):
    wanted = numbers("evit_golden")
    rate, at = RATES[setting]
    reducer = Recording(fuse=setting != "nofuse")
    slimmed = patchslim.slim(host(""), reducer, keep_rate=rate, at=at)
    with torch.no_grad():
        same(slimmed(images()), wanted[f"{setting}.logits"])
        reducer.kept.clear()
        traced = slimmed.trace(images())
    assert [tokens.x.shape[1] for tokens in traced] == wanted[f"{setting}.counts"].tolist()
    same(traced[-1].x, wanted[f"{setting}.features"])
    assert len(reducer.kept) == len(at)
    for block, kept in zip(at, reducer.kept, strict=True):
        assert torch.equal(kept, wanted[f"{setting}.idx_block{block}"])
