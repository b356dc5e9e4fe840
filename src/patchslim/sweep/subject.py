"""`Subject`: a dense model and the images that it is compared on, with what tells them apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchslim.data.images import Images
from patchslim.data.source import Source
from patchslim.errors import BadData, UnsupportedModel
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._preprocessing import Preprocessing, find_preprocessing
from patchslim.measurement.sample import move_to_host, read_first
from patchslim.measurement.score import Batch, check_batch, check_batches
from patchslim.model.model import SlimModel
from patchslim.model.slim import untouched_model
from patchslim.sweep.corruption import CorruptedImages, Corruption
from patchslim.sweep.digests import digest_host, digest_images

MOST_BYTES = 1 << 30  # of decoded images that are kept in memory between models

ImagesOf = str | Path | Iterable[Batch] | Callable[[nn.Module], Iterable[Batch]]


@dataclass(frozen=True)
class Subject:
    """A dense model with its images.

    Attributes:
        name: what it is called in the rows.
        host: the model, on the CPU or another device.
        adapter: what knows how the host is built.
        images: batches that can be read again and again.
        calibration: unlabelled batches for methods that are calibrated; None without.
        prepared: how the images were prepared; None if they do not say.
        facts: digests of weights and images: what was measured holds for these.
    """

    name: str
    host: nn.Module
    adapter: Adapter
    images: Iterable[Batch]
    calibration: Iterable[Batch] | None
    prepared: Preprocessing | None
    facts: dict[str, Any]

    @classmethod
    def open(
        cls,
        name: str,
        host: nn.Module,
        images: ImagesOf,
        calibration: ImagesOf | None,
        adapter: Adapter | None,
    ) -> Subject:
        """Opens the images for a host; images of moderate size are decoded once and kept."""
        if isinstance(host, SlimModel):
            raise UnsupportedModel(
                "This model is slimmed already. Give its .host, and the methods to compare."
            )
        untouched = untouched_model(host, adapter)
        adapter = untouched.plan.adapter
        opened = _open("images", host, images)
        with torch.inference_mode():  # wrong images are refused before anything takes long
            untouched(move_to_host(read_first(opened)[0][:1], host))
        prepared = getattr(opened, "prepared", None)
        kept = _keep(opened, adapter.describe(host).image_shape)
        fitted = None if calibration is None else _open("calibration", host, calibration)
        facts = {"weights": digest_host(host, adapter), "images": digest_images(kept)}
        if fitted is not None:
            facts["calibration"] = digest_images(fitted)
        known = prepared if isinstance(prepared, Preprocessing) else None
        return cls(name, host, adapter, kept, fitted, known, facts)

    def corrupt(self, corruption: Corruption) -> Subject:
        """Returns the same model with corrupted copies of the images."""
        prepared = self.prepared or find_preprocessing(self.host, self.adapter)
        copies = CorruptedImages(self.images, corruption, prepared)
        facts = {**self.facts, "images": f"{self.facts['images']} with {corruption.name}"}
        return replace(self, images=copies, facts=facts)


def _open(name: str, host: nn.Module, images: ImagesOf) -> Iterable[Batch]:
    """Opens a path for the host; reads an iterator to its end, since it is needed again."""
    if isinstance(images, str | Path):
        return Images.for_host(host, images)
    is_function = callable(images) and not isinstance(images, nn.Module)
    given: Any = images
    opened = given(host) if is_function else given
    check_batches(name, opened)
    if isinstance(opened, Source):
        return opened
    batches = [check_batch(batch, number) for number, batch in enumerate(opened)]
    if not batches:
        raise BadData(f"{name} holds no images. {name}= takes batches, a source, or a path.")
    return batches


def _keep(images: Iterable[Batch], shape: tuple[int, ...]) -> Iterable[Batch]:
    """Decodes images once, where all of them fit into memory."""
    if not isinstance(images, Source) or images.count * math.prod(shape) * 4 > MOST_BYTES:
        return images
    return [*images]
