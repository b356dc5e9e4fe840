"""The host of Evo-LeViT: the official weights and answers, its sizes, and how it is built."""

import pickle
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.levit import Attention

from patchslim.architectures.evo_levit import EvoLevit, convert_official_weights
from patchslim.errors import UnsupportedModel

GOLDEN = Path(__file__).parent / "reference" / "evo_levit_golden.safetensors"
TINY = {
    "img_size": 128,
    "embed_dim": (16, 24, 32),
    "key_dim": 8,
    "num_heads": (2, 3, 4),
    "depth": (4, 2, 3),
    "num_classes": 7,
}
# Counted on the official models without heads on the class token and learned trade-offs.
COUNTS = {
    "evo_levit_128s": 7_835_104,
    "evo_levit_128": 9_269_472,
    "evo_levit_192": 11_031_976,
    "evo_levit_256": 19_007_216,
    "evo_levit_384": 39_295_744,
}


@cache
def golden():
    return load_file(GOLDEN)


def official():
    start = "weights."
    return {
        name.removeprefix(start): value
        for name, value in golden().items()
        if name.startswith(start)
    }


def host(**changes):
    return EvoLevit(**{**TINY, **changes}).eval()


def loaded():
    model = host()
    model.load_state_dict(convert_official_weights(official()), strict=True)
    return model.double()


def images():
    return golden()["images"].double()


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@torch.no_grad()
def test_it_gives_the_official_answers():
    same(loaded()(images()), golden()["logits.dense"])


def test_what_only_training_or_the_method_uses_is_left_out():
    state = official()
    assert {"head_cls.l.weight", "blocks.0.m1.m.learn_tradeoff"} <= set(state)
    twice = {f"stage_{name}": value for name, value in state.items() if name.startswith("blocks.")}
    assert convert_official_weights(state | twice).keys() == host().state_dict().keys()


@torch.no_grad()
def test_its_parts_are_its_forward_pass():
    model = loaded()
    rows = model.forward_features(images())
    assert rows.shape == (2, 1 + 2 * 2, 32)
    same(model.forward_head(rows), golden()["logits.dense"])
    same(model.forward_head(rows, pre_logits=True), rows[:, 1:].mean(dim=1))


@torch.no_grad()
def test_the_class_row_stays_first_after_a_downsampling():
    down = host().stages[1].downsample.attn_downsample.q.down
    rows = torch.arange(65.0).reshape(1, 65, 1)
    assert down(rows).flatten().tolist()[:6] == [0, 1, 3, 5, 7, 17]


def test_training_answers_as_timms_distilled_levit_does():
    model = host().train()
    assert model(images().float()).shape == (2, 7)
    model.set_distilled_training()
    both = model(images().float())
    assert [each.shape for each in both] == [(2, 7), (2, 7)]
    sum(each.square().mean() for each in both).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_checkpointing_gives_the_same_gradients():
    model = loaded()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model(images()).square().mean().backward()
        gradients.append(model.pos_embed.grad.clone())
        model.zero_grad()
    same(*gradients)


@pytest.mark.parametrize("name", COUNTS)
def test_the_sizes_are_the_published_ones(name):
    model = timm.create_model(name, device="meta")
    assert sum(weight.numel() for weight in model.parameters()) == COUNTS[name]
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    rates = {getattr(block.drop_path1, "drop_prob", 0.0) for block in model.stages[0].blocks}
    assert rates == {0.1 if name == "evo_levit_384" else 0.0}


@torch.no_grad()
def test_another_image_size_and_number_of_classes():
    model = timm.create_model("evo_levit_128s", num_classes=10, img_size=(64, 96)).eval()
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 10)
    downs = [stage.downsample.pos_embed.shape[1] for stage in model.stages[1:]]
    assert (model.pos_embed.shape[1], *downs) == (25, 25, 7)


@torch.no_grad()
def test_it_begins_with_a_class_token_of_zeros_and_small_positions():
    model = host()
    assert not model.cls_token.any()
    downs = [stage.downsample for stage in model.stages[1:]]
    for owner in (model, *downs):
        assert 0 < owner.pos_embed.std() < 0.03
    model.pos_embed.fill_(9)
    model.init_weights()
    assert model.pos_embed.abs().max() < 0.2


def test_it_owns_no_biases():
    model = host()
    assert not [name for name in model.state_dict() if "bias" in name and "attention" in name]
    assert not [name for name, _ in model.named_buffers() if "attention" in name]
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(attentions) == 9
    assert attentions[0](torch.zeros(1, 5, 16)).shape == (1, 5, 16)


def test_positions_are_named_for_the_optimizer():
    model = host()
    names = {"pos_embed"} | {f"stages.{stage}.downsample.pos_embed" for stage in (1, 2)}
    assert model.no_weight_decay() == names
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert {"cls_token", "pos_embed", "stem.conv1.linear.weight"} <= set(groups[0])


@torch.no_grad()
def test_it_pickles():
    model = loaded()
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), model(images()))


def test_maps_are_refused():
    with pytest.raises(UnsupportedModel, match="use_conv=False"):
        host(use_conv=True)
    maps = timm.create_model("evo_levit_128s", img_size=32, features_only=True)
    with pytest.raises(UnsupportedModel, match="forward_features"):
        maps(torch.zeros(1, 3, 32, 32))
