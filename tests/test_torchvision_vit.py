"""torchvision's ViT on the command line: named, counted, slimmed, trained, measured, drawn."""

import json
from typing import Optional

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models import _api
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.transforms._presets import ImageClassification

import patchslim
from comparison import assert_same_gradients, gradients, is_close
from patchslim.cli.main import main
from patchslim.errors import BadFile, PatchslimError, UnknownName, UnsupportedModel, WrongInput
from patchslim.hosts import _catalog
from patchslim.hosts._preprocessing import find_preprocessing
from patchslim.hosts.torchvision_vit import TorchvisionVit
from patchslim.model.load import load
from variants_torchvision import SMALL, VARIANTS, random_images

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
WEIGHTS = [
    str(weights).replace("_Weights", "")
    for name in ("ViT_B_16", "ViT_B_32", "ViT_L_16", "ViT_L_32", "ViT_H_14")
    for weights in getattr(torchvision.models, f"{name}_Weights")
]


def torch_names(state):
    """Renames weights as torchvision's own files have them."""
    places = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}
    renamed = {}
    for name, value in state.items():
        for new, old in places.items():
            name = name.replace(new, old)
        renamed[name] = value
    return renamed


class TinyWeights(_api.WeightsEnum):
    """Weights of the tiny model below: they are drawn, and nothing is fetched."""

    V1 = _api.Weights(
        url="",
        transforms=lambda: ImageClassification(crop_size=32, resize_size=40, mean=(0.4, 0.5, 0.6)),
        meta={"categories": list("abcdefg"), "min_size": (32, 32)},
    )
    LARGE = _api.Weights(
        url="",
        transforms=lambda: ImageClassification(crop_size=48, resize_size=48),
        meta={"categories": list("abcdefg"), "min_size": (48, 48)},
    )
    DEFAULT = V1

    def get_state_dict(self, *_, **__):
        side = self.meta["min_size"][0]
        with torch.random.fork_rng():
            torch.manual_seed(side)
            host = VisionTransformer(**{**SMALL, "image_size": side, "patch_size": 8})
            nn.init.normal_(host.heads.head.weight)
        return host.state_dict()


def vit_tiny(*, weights: Optional[TinyWeights] = None, progress=True, **settings):  # noqa: UP045
    """Makes a tiny model, as torchvision makes its own."""
    sizes = {**SMALL, "patch_size": 8, "image_size": 32, **settings}
    if weights is not None:
        sizes["image_size"] = weights.meta["min_size"][0]
    host = VisionTransformer(**sizes)
    if weights is not None:
        host.load_state_dict(weights.get_state_dict())
    return host


vit_tiny.__module__ = "torchvision.models.vision_transformer"


@pytest.fixture
def tiny(monkeypatch):
    """Registers a tiny model in torchvision, with two sets of weights."""
    monkeypatch.setitem(_api.BUILTIN_MODELS, "vit_tiny", vit_tiny)
    monkeypatch.setattr(_api, "get_weight", lambda name: TinyWeights[name.partition(".")[2]])
    monkeypatch.setattr(torchvision.models, "get_weight", _api.get_weight)


@pytest.fixture
def photos(tmp_path):
    noise = np.random.default_rng(0)
    for number in range(7):
        folder = tmp_path / "photos" / "abcdefg"[number]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "photos"


def run(capsys, *arguments):
    code = main([str(each) for each in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


# ---------------------------------------------------------------------------- beside the host


@every_variant
def test_training_equals_the_host(variant):
    """The same random draws give the same gradient for every parameter."""
    host = variant.build()
    x = random_images(host)
    slimmed = patchslim.slim(host, "identity").train()
    assert_same_gradients(gradients(slimmed, host, x), gradients(host.train(), host, x))


@every_variant
def test_a_saved_model_is_loaded_from_its_recipe_alone(variant, tmp_path):
    host = variant.build()
    slimmed = patchslim.slim(host, "tome", r=3)
    slimmed.save(tmp_path)
    x = random_images(host)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(x), slimmed(x))
    assert json.loads((tmp_path / "recipe.json").read_text())["library"] == "torchvision_vit"


def test_a_classifier_that_was_replaced_is_saved_as_it_is(tmp_path):
    host = VARIANTS[0].build()
    host.heads.head = nn.Linear(32, 3)
    patchslim.slim(host, "tome", r=3).save(tmp_path)
    assert load(tmp_path)(random_images(host)).shape == (2, 3)


def test_what_a_recipe_cannot_say_needs_the_model(tmp_path):
    host = VisionTransformer(**SMALL, norm_layer=nn.Identity).eval()
    nn.init.normal_(host.heads.head.weight)
    slimmed = patchslim.slim(host, "tome", r=3)
    slimmed.save(tmp_path)
    with pytest.raises(BadFile, match="pass it: load"):
        load(tmp_path)
    x = random_images(host)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, host)(x), slimmed(x))


def test_the_output_layer_is_read_as_torch_reads_it():
    """torch takes its weights and never calls it, so a hook on it changes nothing in either."""
    host = VARIANTS[0].build()
    host.encoder.layers[0].self_attention.out_proj.register_forward_hook(lambda *_: 1 / 0)
    x = random_images(host)
    with torch.no_grad():
        assert is_close(patchslim.slim(host, "identity")(x), host(x))


class Own(VisionTransformer):
    def forward(self, x):
        return 2 * super().forward(x)


class Attention(nn.MultiheadAttention):
    """Attention of another class."""


def replace_attention(host):
    host.encoder.layers[1].self_attention.__class__ = Attention


def add_keys(host):
    host.encoder.layers[1].self_attention = nn.MultiheadAttention(
        32, 4, batch_first=True, add_bias_kv=True
    )


def replace_block(host):
    host.encoder.layers[2] = nn.Identity()


def replace_encoder(host):
    host.encoder.__class__ = type("Encoder", (type(host.encoder),), {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace_attention, "attention is a Attention"),
        (add_keys, "add_bias_kv"),
        (replace_block, "a block of Identity"),
        (replace_encoder, "its encoder is a Encoder"),
        (lambda host: setattr(host, "__class__", Own), "overrides forward"),
    ],
)
def test_a_changed_host_is_refused(change, reason):
    host = VARIANTS[0].build()
    change(host)
    with pytest.raises(UnsupportedModel, match=reason):
        patchslim.slim(host, "tome", r=2)


def test_other_sizes_and_arguments_are_refused():
    host = VARIANTS[0].build()
    slimmed = patchslim.slim(host, "tome", r=2)
    with pytest.raises(WrongInput, match="takes 20x20 pixels"):
        slimmed(torch.zeros(1, 3, 24, 24))
    with pytest.raises(WrongInput, match="images alone"):
        slimmed(random_images(host), mask=None)


# ------------------------------------------------------------------------ how images are prepared


@pytest.mark.parametrize("name", WEIGHTS)
def test_images_are_prepared_as_the_weights_say(name, recwarn):
    """They are equal to the pixel, for every set of weights of torchvision's five models."""
    model, _, entry = name.partition(".")
    name = f"{model.lower()}.{entry}"
    host = _catalog.build_without_weights(name)
    preprocessing = find_preprocessing(host, TorchvisionVit())
    assert preprocessing.stated
    weights = torchvision.models.get_model_weights(model.lower())[entry]
    noise = np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((610, 430))
    assert torch.equal(preprocessing.transform()(picture), weights.transforms()(picture))


def test_weights_that_are_not_named_are_not_known():
    host = _catalog.build_without_weights("vit_b_32")
    assert not find_preprocessing(host, TorchvisionVit()).stated


def test_a_host_that_torchvision_made_may_say_its_weights():
    with torch.device("meta"):
        host = torchvision.models.vit_l_16()
    host.pretrained_weights = str(torchvision.models.ViT_L_16_Weights.IMAGENET1K_V1)
    preprocessing = find_preprocessing(host, TorchvisionVit())
    assert (preprocessing.stated, round(224 / preprocessing.crop_pct)) == (True, 242)


def test_pretrained_weights_are_fetched_and_known(tiny, tmp_path):
    host = _catalog.find_host("vit_tiny", pretrained=True)
    assert torch.equal(host.class_token, TinyWeights.V1.get_state_dict()["class_token"])
    assert find_preprocessing(host, TorchvisionVit()).mean == (0.4, 0.5, 0.6)
    large = _catalog.find_host("vit_tiny.LARGE", pretrained=True)
    assert large.image_size == 48
    patchslim.slim(large, "tome", r=2).save(tmp_path)
    again = find_preprocessing(load(tmp_path).host, TorchvisionVit())
    assert (again.image_size, again.crop_pct, again.stated) == ((48, 48), 1.0, True)


def test_weights_of_another_name_and_settings_are_refused(tiny):
    with pytest.raises(UnknownName, match=r"vit_tiny\.LARG.*'vit_tiny\.LARGE'"):
        _catalog.find_host("vit_tiny.LARG")
    with pytest.raises(UnknownName, match=r"setting of vit_tiny 'drop_out'.*'dropout'"):
        _catalog.find_host("vit_tiny", settings={"drop_out": 0.1})
    with pytest.raises(PatchslimError, match=r"vit_tiny takes no setting 'weights'.*--pretrained"):
        _catalog.find_host("vit_tiny", settings={"weights": "V1"})
    with pytest.raises(PatchslimError, match="torchvision could not make vit_tiny: Input shape"):
        _catalog.find_host("vit_tiny", image_size=33)


# ------------------------------------------------------------------------------ the command line


def test_names_are_listed_and_counted(capsys):
    family = json.loads(run(capsys, "models", "--json"))["torchvision_vit"]
    assert family["names"] == ["vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"]
    run(capsys, "macs", "vit_b_16", "--method", "evit", "--keep-rate", 0.7)
    dense = json.loads(run(capsys, "macs", "torchvision:vit_b_16", "--json"))
    like = json.loads(run(capsys, "macs", "vit_base_patch16_224", "--json"))
    assert dense["gmacs"] == like["gmacs"]
    swag = json.loads(run(capsys, "macs", "vit_b_16.IMAGENET1K_SWAG_E2E_V1", "--json"))
    assert swag["image_size"] == [384, 384]


def test_every_command_serves_it(tiny, photos, tmp_path, capsys):
    file, saved, trained = (tmp_path / name for name in ("vit.pth", "saved", "trained"))
    torch.save(torch_names(TinyWeights.V1.get_state_dict()), file)  # as torchvision publishes it
    given = ["vit_tiny.V1", "--weights", file]
    run(capsys, "slim", *given, "--macs", 0.7, "--method", "evit", "--out", saved)
    images = json.loads((saved / "recipe.json").read_text())["images"]
    assert (images["mean"], images["stated"]) == ([0.4, 0.5, 0.6], True)
    measured = run(capsys, "measure", saved, "--data", photos, "--repeats", 1)
    assert "torchvision " in measured
    picture = next(photos.rglob("*.png"))
    run(capsys, "show", saved, picture, "--out", tmp_path / "kept.png")
    run(capsys, "train", saved, "--data", photos, "--validation", photos, "--batch", 2,
        "--steps", 2, "--workers", 0, "--out", trained)  # fmt: skip
    run(capsys, "measure", trained / "model", "--data", photos, "--dense", file, "--repeats", 0)
    run(capsys, "measure", *given, "--keep", 0.5, "--data", photos, "--repeats", 1)


def test_a_file_of_other_weights_is_refused(tiny, tmp_path, capsys):
    file = tmp_path / "vit.pth"
    torch.save(TinyWeights.LARGE.get_state_dict(), file)
    assert main(["slim", "vit_tiny.V1", "--weights", str(file), "--macs", "0.7"]) == 2
    assert "encoder.pos_embedding has shape" in capsys.readouterr().err
