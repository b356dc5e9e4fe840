"""transformers' pipelines take a slimmed model as they take its host: three more tasks.

Image classification is in test_host_api_laws.py, and zero-shot classification in test_towers.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import patchslim
from hf_hosts import tiny_hf
from hf_towers import tiny_tower


def picture() -> Image.Image:
    """Makes a picture of noise."""
    return Image.effect_noise((20, 16), 90).convert("RGB")


def test_features_are_those_of_the_host() -> None:
    host = tiny_hf("ViTModel without pooler")
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    image = picture()

    def run(model: Any) -> Any:
        pipe = transformers.pipeline(
            "image-feature-extraction", model=model, image_processor=processor
        )
        return torch.tensor(pipe(image))

    wanted, got = run(host), run(patchslim.slim(host, "identity"))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert run(patchslim.slim(host, "tome", r=3)).shape == wanted.shape


def test_detections_are_those_of_the_host() -> None:
    host = tiny_tower("YolosForObjectDetection")
    processor = transformers.YolosImageProcessor(size={"height": 16, "width": 20}, do_pad=False)
    image = picture()

    def run(model: Any) -> Any:
        pipe = transformers.pipeline("object-detection", model=model, image_processor=processor)
        return pipe(image, threshold=0.0)

    wanted, got = run(host), run(patchslim.slim(host, "identity"))
    assert [each["label"] for each in got] == [each["label"] for each in wanted]
    for mine, its in zip(got, wanted, strict=True):
        assert mine["score"] == pytest.approx(its["score"], rel=1e-3)
        assert mine["box"] == its["box"]
    assert run(patchslim.slim(host, "tome", r=3)) != wanted


def test_sounds_are_classified_as_by_the_host() -> None:
    host = tiny_tower("ASTForAudioClassification")
    config = host.config
    extractor = transformers.ASTFeatureExtractor(
        max_length=config.max_length, num_mel_bins=config.num_mel_bins
    )
    sound = np.random.default_rng(0).standard_normal(4000).astype(np.float32)

    def run(model: Any) -> Any:
        pipe = transformers.pipeline(
            "audio-classification", model=model, feature_extractor=extractor
        )
        return {each["label"]: each["score"] for each in pipe(sound.copy(), top_k=2)}

    wanted = run(host)
    assert run(patchslim.slim(host, "identity")) == pytest.approx(wanted, rel=1e-3)
    assert run(patchslim.slim(host, "tome", r=3)) != pytest.approx(wanted, rel=1e-5)
