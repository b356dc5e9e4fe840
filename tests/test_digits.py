"""The digits example: its scenes, its handwritten digits and its trained host."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from patchslim.example import digits

DATA = Path(digits.__file__).parent


def test_a_scene_depends_on_split_seed_and_index_alone() -> None:
    few, many = digits.scenes("train", 3, seed=4), digits.scenes("train", 9, seed=4)
    for name in ("images", "labels", "boxes", "sources"):
        assert np.array_equal(getattr(few, name), getattr(many, name)[:3])
    later = digits.scenes_at("train", range(7, 9), seed=4)
    assert np.array_equal(later.images, many.images[7:])


def test_splits_and_seeds_give_different_scenes() -> None:
    first = digits.scenes("test", 1, seed=0).images
    assert not np.array_equal(first, digits.scenes("test", 1, seed=1).images)
    assert not np.array_equal(first, digits.scenes("train", 1, seed=0).images)


def test_train_and_test_are_made_from_different_digits() -> None:
    train, test = digits.digit_indices("train"), digits.digit_indices("test")
    assert (len(train), len(test)) == (1297, 500)
    assert not np.intersect1d(train, test).size
    images, labels = digits.handwritten_digits()
    assert not {image.tobytes() for image in images[train]} & {
        image.tobytes() for image in images[test]
    }
    assert np.bincount(labels[test]).tolist() == [50] * 10
    assert np.isin(digits.scenes("train", 40).sources, train).all()
    assert np.isin(digits.scenes("test", 40).sources, test).all()


def test_scenes_have_the_promised_shapes_and_every_class() -> None:
    drawn = digits.scenes("test", 200)
    assert len(drawn) == 200
    assert (drawn.images.shape, drawn.images.dtype) == ((200, 96, 96, 3), np.uint8)
    assert (drawn.labels.shape, drawn.labels.dtype) == ((200,), np.int64)
    assert (drawn.boxes.shape, drawn.boxes.dtype) == ((200, 4), np.int64)
    assert set(drawn.labels.tolist()) == set(range(10))
    assert np.array_equal(drawn.labels, digits.handwritten_digits()[1][drawn.sources])


def test_boxes_lie_in_the_image_and_vary() -> None:
    boxes = digits.scenes("train", 200).boxes
    assert boxes.min() >= 0
    assert boxes.max() <= digits.SIDE
    heights = boxes[:, 3] - boxes[:, 1]
    assert ((boxes[:, 2] > boxes[:, 0]) & (heights >= 20)).all()
    assert heights.max() - heights.min() >= 12
    assert boxes[:, :2].std(axis=0).min() > 10


def test_no_scenes_and_bad_requests() -> None:
    assert digits.scenes("train", 0).images.shape == (0, 96, 96, 3)
    with pytest.raises(ValueError, match="split"):
        digits.scenes("validation", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start at 0"):
        digits.scenes_at("train", range(-1, 2))


def test_normalised_images_match_the_preprocessing_of_the_host() -> None:
    images = np.full((2, 96, 96, 3), 255, np.uint8)
    tensor = digits.normalise(images)
    assert tensor.shape == (2, 3, 96, 96)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.full_like(tensor, (1.0 - digits.MEAN[0]) / digits.STD[0]))


def test_weights_are_small_and_the_recorded_ones() -> None:
    stored = (DATA / "digits_vit.safetensors").read_bytes()
    weights = digits.host_record()["weights"]
    assert len(stored) == weights["bytes"] <= 4 * 1024 * 1024
    assert hashlib.sha256(stored).hexdigest() == weights["sha256"]


def test_the_host_is_a_plain_network_whose_input_timm_knows() -> None:
    timm_data = pytest.importorskip("timm.data")
    network = digits.host()
    assert not network.training
    assert network.patch_embed.num_patches >= 144
    assert len(network.blocks) == digits.host_record()["architecture"]["depth"]
    config = timm_data.resolve_model_data_config(network)
    assert config["input_size"] == (3, 96, 96)
    assert (config["mean"], config["std"]) == (digits.MEAN, digits.STD)


@pytest.mark.parametrize("count", [64, pytest.param(200, marks=pytest.mark.slow)])
def test_the_host_reads_test_scenes_and_needs_their_patches(count: int) -> None:
    unseen = digits.scenes("test", count)
    with torch.inference_mode():
        scores = digits.host()(digits.normalise(unseen.images))
    assert float((scores.argmax(1).numpy() == unseen.labels).mean()) >= 0.95
    test = digits.host_record()["test"]
    assert test["accuracy"] - test["accuracy_random_half_of_patch_tokens"] >= 0.05


@pytest.mark.slow
def test_handwritten_digits_are_the_ones_scikit_learn_ships() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    shipped = datasets.load_digits()
    images, labels = digits.handwritten_digits()
    assert np.array_equal(images, shipped.images)
    assert np.array_equal(labels, shipped.target)
