"""The numbers that the official code of a dozen methods gave, in float64.

See tests/reference/README.md.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.architectures.evo_levit import (
    EvoLevit,
    convert_official_weights,
    read_official_tradeoffs,
)
from patchslim.errors import DeepCut, ShortSchedule
from patchslim.methods import Decision
from patchslim.methods.dynamicvit import DynamicViT
from patchslim.methods.evit import EViT
from patchslim.methods.tome import ToMe
from patchslim.model.training_pass import forward_training
from patchslim.schedules.schedule import Rate
from patchslim.tokens.attention import attention_bias, attention_map
from patchslim.tokens.reduction import Mask
from patchslim.tokens.tokens import Tokens
from patchslim.training.losses import answer_loss, label_loss, token_loss
from toy_methods import slim_unchecked

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
    """EViT that notes which rows it kept."""

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
    method = Recording(fuse=setting != "nofuse")
    slimmed = patchslim.slim(host(""), method, keep_rate=rate, at=at)
    with torch.no_grad():
        same(slimmed(images()), wanted[f"{setting}.logits"])
        method.kept.clear()
        traced = slimmed.trace(images())
    assert [tokens.x.shape[1] for tokens in traced] == wanted[f"{setting}.counts"].tolist()
    same(traced[-1].x, wanted[f"{setting}.features"])
    assert len(method.kept) == len(at)
    for block, kept in zip(at, method.kept, strict=True):
        assert torch.equal(kept, wanted[f"{setting}.idx_block{block}"])


# How to ask for what `field_golden` holds. Two are compared to what constants of the official code
# leave: 1e-6 in the divisor of means, and in a softmax.
FIELD = {
    "mctf.every": ("mctf", {"r": 9, "at": range(1, 4)}),
    "mctf.fast": ("mctf", {"r": [0, 19, 13, 9]}),
    "pitome.0.9": ("pitome", {"keep_rate": 0.9, "at": range(4)}),
    "pitome.0.75": ("pitome", {"keep_rate": 0.75, "at": range(4)}),
    "diffrate": ("diffrate", {"r": [0, 12, 18, 12], "pruned": 0.5}),
    "atc.average": ("atc", {"keep_rate": 0.7, "at": (1, 2, 3)}),
    "atc.complete": ("atc", {"keep_rate": 0.7, "at": (1, 2, 3), "linkage": "complete"}),
    "atc.single": ("atc", {"keep_rate": 0.7, "at": (1, 2, 3), "linkage": "single"}),
    "ats.1": ("ats", {"at": (1,)}),
    "ats.2": ("ats", {"at": (2,)}),
    "gtp.spatial": ("gtp", {"r": 9, "alpha": 0.2}),
    "gtp.mixed": ("gtp", {"r": 9, "alpha": 0.2, "neighbours": 8}),
    "dpcknn": ("dpcknn", {"keep_rate": 0.7, "at": (1, 2, 3)}),
    "ppt": ("ppt", {"r": 9, "at": (1, 2, 3), "threshold": 1.2e-4}),
    "tofu": ("tofu", {"r": 9}),
    "cubistmerge": ("cubistmerge", {"keep": [65, 50, 50, 50]}),
    "dct": ("dct", {"r": 9, "at": (1, 2, 3)}),
    "idlevit": ("idlevit", {"keep_rate": 0.7, "at": (1, 2, 3)}),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
@pytest.mark.parametrize("setting", FIELD)
def test_the_field_gives_the_official_numbers(setting):
    method, settings = FIELD[setting]
    got = patchslim.slim(host(""), method, **settings)(images())
    within = 2e-6 if method in {"ats", "dpcknn"} else 1e-9
    torch.testing.assert_close(got, numbers("field_golden")[setting], rtol=0, atol=within)


PARTS = {"in_conv.0": "norm", "in_conv.1": "features.0", "out_conv": "verdict"}
STAGES = Rate(0.7, (1, 2, 3))


def dynamicvit(method):
    """Makes a host of 196 patches with the predictors that the numbers were made with."""
    golden = numbers("dynamicvit_golden")
    model = VisionTransformer(**TINY | {"img_size": 56}).double().eval()
    weights = host("").state_dict() | {"pos_embed": golden["pos_embed"].double()}
    model.load_state_dict(weights, strict=True)
    made = slim_unchecked(model, method, STAGES)
    own = {}
    for name, value in golden.items():
        kind, _, rest = name.partition(".")
        if kind == "predictor":
            stage, _, rest = rest.partition(".")
            part = next(each for each in PARTS if rest.startswith(each))
            own[f"{int(stage) + 1}.{PARTS[part]}{rest.removeprefix(part)}"] = value
    method.predictors.load_state_dict(own, strict=True)
    return made.double(), golden["images"].double()


class Drawn(DynamicViT):
    """DynamicViT that gets the draws of its three blocks."""

    def __init__(self, draws):
        super().__init__()
        self.draws, self.scores = draws, []

    def choose(self, tokens, signals, keep):
        patches = tokens.x[:, tokens.prefix :]
        self.scores.append(self.predictors[str(signals.block)](patches, tokens.alive))
        return Mask(self.draws[signals.block - 1])


def near(got, wanted):
    """Asserts equality, except for the faint weight of masked tokens: float32, evenly shared."""
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dynamicvit_predictors_give_the_official_scores():
    golden = numbers("dynamicvit_golden")
    model, _ = dynamicvit(DynamicViT())
    alive = golden["alone.alive"].double()
    scores = model.method.predictors["1"](golden["alone.x"].double(), alive)
    same(scores, golden["alone.scores"])


@torch.no_grad()
def test_attention_under_a_mask_gives_the_official_weights():
    golden = numbers("dynamicvit_golden")
    alive = golden["softmax.alive"].double()[:, 1:]
    assert golden["softmax.alive"][:, 0].all()
    bias = attention_bias(
        Tokens(x=torch.zeros(2, 8, 4).double(), prefix=1, grid=(1, 7), alive=alive),
        proportional=False,
    )
    logits = golden["softmax.logits"].double()
    keys = torch.eye(8).double().expand(2, 2, -1, -1)
    near(attention_map(logits, keys, scale=1.0, bias=bias), golden["softmax.weights"])


@torch.no_grad()
def test_dynamicvit_gives_the_official_numbers_at_inference():
    golden = numbers("dynamicvit_golden")
    model, x = dynamicvit(DynamicViT())
    same(model(x), golden["eval.logits"])
    traced = model.trace(x)
    cells = torch.arange(196).expand(2, -1)
    for stage, tokens in enumerate(traced[1:]):
        cells = cells.gather(1, golden[f"eval.kept{stage}"].long())
        assert torch.equal(tokens.cells(), cells)
    assert [tokens.patches for tokens in traced] == [196, 137, 96, 67]
    same(traced[-1].x, golden["eval.features"])


def train_dynamicvit():
    """Runs a training pass with the draws that the official code got; returns these draws too."""
    draws = list(numbers("dynamicvit_golden")["train.draws"].double().requires_grad_().unbind())
    for each in draws:
        each.retain_grad()
    model, x = dynamicvit(Drawn(draws))
    return model, forward_training(model.train(), x, tail="full"), draws


def terms_of_dynamicvit(model, run):
    """Computes the four official terms of the loss: labels, shares, answers, and patch tokens."""
    golden = numbers("dynamicvit_golden")
    with torch.no_grad():
        host = model.host.eval()
        taught = host.forward_features(golden["images"].double())
        answers = host.forward_head(taught)
    decisions = [
        Decision(each.block, 0.7**stage, each.alive)
        for stage, each in enumerate(run.decisions, start=1)
    ]
    patches = Tokens(x=run.tokens.x[:, 1:], prefix=0, grid=(14, 14), alive=run.tokens.alive)
    return (
        label_loss(run.output, golden["labels"], 0.0),
        DynamicViT(ratio=1).loss(decisions),
        answer_loss(run.output, answers, "soft", 1.0),
        token_loss(patches, taught[:, 1:]),
    )


def test_dynamicvit_gives_the_official_numbers_in_training():
    golden = numbers("dynamicvit_golden")
    model, run, _ = train_dynamicvit()
    near(run.output, golden["train.logits"])
    near(torch.stack(model.method.scores), golden["train.scores"])
    near(run.tokens.x[:, 1:], golden["train.features"])
    for each, alive in zip(run.decisions, golden["train.alive"], strict=True):
        assert torch.equal(each.alive.to(torch.uint8), alive)
    wanted = golden["train.parts"] / torch.tensor([1, 3, 1, 1])  # theirs is a sum over the stages
    near(torch.stack(terms_of_dynamicvit(model, run)), wanted)


def test_dynamicvit_gives_the_official_gradients():
    """Gradients of the draws show that the straight-through estimate agrees; so do the host's."""
    golden = numbers("dynamicvit_golden")
    model, run, draws = train_dynamicvit()
    labels, shares, answers, tokens = terms_of_dynamicvit(model, run)
    loss = labels + 2 * shares + 0.5 * answers + 0.5 * tokens
    near(loss[None], golden["train.loss"])
    loss.backward()
    host = model.host
    gradients = {
        "draws": torch.stack([each.grad for each in draws]),
        "head": host.head.weight.grad,
        "qkv": host.blocks[0].attn.qkv.weight.grad,
    }
    for name, got in gradients.items():
        wanted = golden[f"train.{name}.grad"].double()
        assert wanted.abs().max() > 1e-3
        assert (got - wanted).norm() < 1e-5 * wanted.norm(), name


STAGED = {"stage": (4, 8), "block": tuple(range(4, 12))}
PYRAMID = {"stage": (2, 5, 8), "block": (2, 3, 5, 6, 8, 9, 10)}


def official(name):
    """Reads the weights in a file of Evo-ViT, with its own names."""
    start = "weights."
    return {
        each.removeprefix(start): value
        for each, value in numbers(name).items()
        if each.startswith(start)
    }


def evo_host(name, dtype):
    """Makes the dense host of a file of Evo-ViT, and its images."""
    weights, shown = official(name), numbers(name)["images"].to(dtype)
    if name == "evo_levit_golden":
        shape = {"img_size": 128, "embed_dim": (16, 24, 32), "num_heads": (2, 3, 4)}
        model = EvoLevit(**shape, key_dim=8, depth=(4, 2, 3), num_classes=7)
        weights = convert_official_weights(weights)
    else:
        deit = {"embed_dim": 24, "depth": 12, "num_heads": 3, "mlp_ratio": 2, "num_classes": 7}
        model = VisionTransformer(**TINY | deit, global_pool="avg")
    model.load_state_dict(weights, strict=True)
    return model.to(dtype).eval(), shown


def as_published(got, wanted, dtype):
    """Asserts equality to rounding, relative to the largest value."""
    within = 1e-10 if dtype == torch.float64 else 1e-5
    assert (got.double() - wanted).abs().max() <= within * wanted.abs().max()


both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@both_types
@pytest.mark.parametrize("name", ["evo_deit_golden", "evo_levit_golden"])
def test_the_hosts_of_evo_are_the_ones_that_the_numbers_were_made_with(name, dtype):
    model, shown = evo_host(name, dtype)
    with torch.no_grad():
        as_published(model(shown), numbers(name)["logits.dense"], dtype)


@both_types
@pytest.mark.parametrize("mode", STAGED)
def test_evo_gives_the_official_numbers_on_deit(mode, dtype):
    model, shown = evo_host("evo_deit_golden", dtype)
    slimmed = patchslim.slim(model, "evo", keep_rate=0.5, at=STAGED[mode], representative=False)
    with torch.no_grad():
        as_published(slimmed(shown), numbers("evo_deit_golden")[f"logits.{mode}"], dtype)


@both_types
@pytest.mark.filterwarnings("ignore::patchslim.errors.Untrained")
@pytest.mark.parametrize("learned", [False, True], ids=["half", "learned"])
@pytest.mark.parametrize("mode", PYRAMID)
def test_evo_gives_the_official_numbers_on_levit(mode, learned, dtype):
    model, shown = evo_host("evo_levit_golden", dtype)
    at = PYRAMID[mode]
    slimmed = patchslim.slim(model, "evo", keep_rate=0.5, at=at, early=0.5, learned=learned)
    if learned:
        tradeoffs = read_official_tradeoffs(official("evo_levit_golden"))
        missing = slimmed.method.load_state_dict(tradeoffs, strict=False).missing_keys
        assert not missing
        assert len(tradeoffs) == 11
    wanted = numbers("evo_levit_golden")[f"logits.{mode}" + ".learned" * learned]
    with torch.no_grad():
        as_published(slimmed(shown), wanted, dtype)


@torch.no_grad()
def test_the_official_numbers_distinguish_the_ways_of_selecting():
    """Our numbers would not pass by chance: the modes are far from each other."""
    for name in ("evo_deit_golden", "evo_levit_golden"):
        answers = [value for key, value in numbers(name).items() if key.startswith("logits.")]
        apart = torch.cdist(*[torch.stack(answers).flatten(1)] * 2)
        apart.fill_diagonal_(torch.inf)
        assert apart.min() > 1e-2, name
