"""Hosts whose input is no image: videos, whose grid has three axes, and spectrograms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import patchslim
from hf_hosts import SMALL_CONFIG
from hf_towers import VJEPA, tiny_tower
from patchslim.errors import UnsupportedModel, WrongInput
from patchslim.tokens.tokens import Tokens
from timm_variants import randomise


def draw(*shape: int) -> torch.Tensor:
    """Makes a random input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_dropped_cell_gets_the_nearest_row_across_frames() -> None:
    x = torch.tensor([[[0.0], [1.0]]])
    # Two frames of 3 x 1 cells; left are the first cell of the first frame and of the second.
    tokens = Tokens(
        x=x,
        prefix=0,
        grid=(6, 1),
        frames=2,
        position=torch.tensor([[0, 3]]),
        origin=torch.tensor([[0, -1, -1, 1, -1, -1]]),
    )
    assert tokens.axes == (2, 3, 1)
    assert tokens.dense_features().flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_features_of_a_video_have_its_three_axes() -> None:
    slimmed = patchslim.slim(tiny_tower("VideoMAEModel"), "tome", keep=0.5)
    assert slimmed.trace(draw(1, 4, 3, 16, 16))[-1].axes == (2, 4, 4)
    features = slimmed.forward_intermediates(draw(1, 4, 3, 16, 16), [1], intermediates_only=True)
    assert features[0].shape == (1, 32, 2, 4, 4)


def test_the_encoder_of_v_jepa_is_put_back_in_its_models() -> None:
    config = transformers.VJEPA2Config(
        **{**SMALL_CONFIG, **VJEPA, "pred_num_hidden_layers": 1, "pred_hidden_size": 24},
        pred_num_attention_heads=2,
        num_pooler_layers=1,
    )
    model: Any = transformers.VJEPA2ForVideoClassification(config).eval()
    randomise(model)
    video = draw(2, 4, 3, 16, 16)
    with torch.no_grad():
        wanted, features = model(video).logits, model.vjepa2.get_vision_features(video)
        with pytest.raises(UnsupportedModel, match=r"model\.vjepa2\.encoder = patchslim\.slim"):
            patchslim.slim(model, "tome", keep=0.5)
        model.vjepa2.encoder = patchslim.slim(model.vjepa2.encoder, "identity")
        assert torch.allclose(model(pixel_values_videos=video).logits, wanted, atol=1e-4)
        model.vjepa2.encoder = patchslim.slim(model.vjepa2.encoder.host, "tome", keep=0.5)
        assert model(video).logits.shape == wanted.shape
        assert model.vjepa2.get_vision_features(video).shape == features.shape


def test_a_classifier_that_reads_the_first_patch_is_refused() -> None:
    host = tiny_tower("VideoMAEForVideoClassification", use_mean_pooling=False)
    with pytest.raises(UnsupportedModel, match="reads the first patch alone"):
        patchslim.slim(host, "tome", keep=0.5)


def test_a_spectrogram_is_given_by_its_own_name_and_with_labels() -> None:
    host = tiny_tower("ASTForAudioClassification")
    slimmed = patchslim.slim(host, "identity")
    sound, labels = draw(2, 20, 12), torch.tensor([1, 0])
    with torch.no_grad():
        wanted = host(input_values=sound, labels=labels)
        got = slimmed(input_values=sound, labels=labels)
    assert type(got) is type(wanted)
    assert torch.allclose(got.logits, wanted.logits, atol=1e-5)
    assert torch.allclose(got.loss, wanted.loss, atol=1e-5)


@pytest.mark.parametrize(
    ("label", "shape", "said"),
    [
        ("ASTModel", (2, 18, 12), "20 frames and 12 bins; pad or cut them"),
        ("ASTModel", (2, 1, 20, 12), r"shape \(batch, 20, 12\)"),
        ("VideoMAEModel", (2, 2, 3, 16, 16), r"shape \(batch, 4, 3, 16, 16\)"),
        ("VideoMAEModel", (2, 3, 16, 16), r"shape \(batch, 4, 3, 16, 16\)"),
        ("VideoMAEModel", (2, 4, 3, 16, 12), "16x16 pixels"),
    ],
)
def test_inputs_of_other_shapes_are_refused(label: str, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(WrongInput, match=said):
        patchslim.slim(tiny_tower(label), "random", keep=0.5)(draw(*shape))


def test_pixels_of_a_video_are_not_compared() -> None:
    slimmed = patchslim.slim(tiny_tower("VideoMAEModel"), "duplicates", keep=0.5)
    with pytest.raises(WrongInput, match="in images alone"):
        slimmed(draw(1, 4, 3, 16, 16))
