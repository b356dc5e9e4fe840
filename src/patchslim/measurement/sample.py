"""The images that `measure` runs on: opens the batches and draws samples from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence, Sized

import torch
from torch import Tensor, nn

from patchslim.data.source import Source
from patchslim.errors import BadData, WrongInput
from patchslim.measurement.score import Batch, check_batch
from patchslim.model.model import SlimModel

SAMPLE_SIZE = 64  # images on which the mean token counts of adaptive models are taken


def open_batches(
    images: Iterable[Batch] | None, model: SlimModel, seed: int
) -> tuple[Tensor, Iterable[Batch] | None]:
    """Returns the first images, for timing, and all batches, the first one included.

    Without images it returns noise and None.
    """
    if images is None:
        return draw_noise(model.plan.adapter.describe(model.host).image_shape, seed), None
    return read_first(images)


def draw_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """One image (1, C, H, W) of noise."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def read_first(images: Iterable[Batch]) -> tuple[Tensor, Iterable[Batch]]:
    """Returns the images of the first batch, and all batches, the first one included."""
    if isinstance(images, Tensor):
        raise WrongInput(
            "Got one tensor of images; give batches: [(images, labels)], or [(images, None)]."
        )
    batches = iter(images)
    first = next(batches, None)
    if first is None:
        raise BadData("There are no images to measure on: the iterable of batches is empty.")
    return check_batch(first, 0)[0], itertools.chain([first], batches)


def count_images(images: Iterable[Batch] | None) -> int | None:
    """Returns how many images there are; None if neither a list nor a loader's dataset says so."""
    if isinstance(images, Sequence):
        return sum(len(batch[0]) for batch in images if isinstance(batch, Sequence) and batch)
    dataset = getattr(images, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def draw_sample(images: Iterable[Batch] | None) -> Tensor | None:
    """Draws images from all over the data; None if the data can be read only once."""
    if isinstance(images, Source):
        return torch.cat([batch for batch, _ in images.sample_batches(SAMPLE_SIZE)])
    if isinstance(images, Sequence) and len(images) > 1:
        share = max(1, SAMPLE_SIZE // len(images))
        parts = [check_batch(batch, number)[0][:share] for number, batch in enumerate(images)]
        if len({part.shape[1:] for part in parts}) == 1:
            return torch.cat(parts)
    return None


def fill_batch(images: Tensor, batch: int) -> Tensor:
    """Returns `batch` images: the first ones, repeated if there are fewer."""
    return images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]


def move_to_host(images: Tensor, host: nn.Module) -> Tensor:
    """Returns the images on the host's device and, if they are floats, in its data type."""
    parameter = next(host.parameters())
    dtype = parameter.dtype if images.is_floating_point() else images.dtype
    return images.to(parameter.device, dtype)
