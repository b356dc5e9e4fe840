"""`Subject`: a dense model and the images that it is compared on, with what tells them apart."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.data.images import Images
from patchslim.data.source import Source
from patchslim.errors import BadData, UnsupportedModel
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._preprocessing import Preprocessing, find_preprocessing
from patchslim.hosts._registry import find_adapter
from patchslim.measurement.sample import move_to_host, read_first
from patchslim.measurement.score import Batch, check_batch, check_batches
from patchslim.model.model import SlimModel
from patchslim.model.plan import make_plan
from patchslim.settings import check_type
from patchslim.sweep.corruption import CorruptedImages, Corruption

MOST_BYTES = 1 << 30  # of decoded images that are kept in memory between models
DIGITS = 16  # hexadecimal, of a digest

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
        cls, name: str, host: nn.Module, images: ImagesOf, calibration: ImagesOf | None
    ) -> Subject:
        """Opens the images for a host; images of moderate size are decoded once and kept."""
        check_type("model", host, nn.Module, "Give a dense torch.nn.Module.", UnsupportedModel)
        if isinstance(host, SlimModel):
            raise UnsupportedModel(
                "This model is slimmed already. Give its .host, and the methods to compare."
            )
        adapter = find_adapter(host)
        reason = adapter.unsupported_reason(host)
        if reason is not None:
            raise UnsupportedModel(f"{type(host).__name__} cannot be slimmed: {reason}")
        opened = _open("images", host, images)
        with torch.inference_mode():  # wrong images are refused before anything takes long
            untouched = untouched_model(host, adapter)
            untouched(move_to_host(read_first(opened)[0][:1], host))
        prepared = getattr(opened, "prepared", None)
        kept = _keep(opened, adapter.describe(host).image_shape)
        fitted = None if calibration is None else _open("calibration", host, calibration)
        facts = {"weights": digest_weights(host), "images": digest_images(kept)}
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


def untouched_model(host: nn.Module, adapter: Adapter) -> SlimModel:
    """Returns a host in the loop with nothing removed."""
    plan = make_plan(host, "identity", keep=1.0, tail="full", adapter=adapter)
    return SlimModel(host, plan).eval()


def digest_weights(host: nn.Module) -> str:
    """Returns a digest of all weights and buffers with their names."""
    found = hashlib.sha256()
    for name, value in host.state_dict().items():
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(_bytes(value))
    return found.hexdigest()[:DIGITS]


def digest_images(batches: Iterable[Batch]) -> str:
    """Returns a digest: of all pixels, or of the names where images are read anew each time."""
    found = hashlib.sha256()
    if isinstance(batches, Source):
        found.update(f"{batches.location()} {batches.prepared}\n".encode())
        for index in range(batches.count):
            found.update(f"{batches.name_of(index)} {batches.label_of(index)}\n".encode())
        return found.hexdigest()[:DIGITS]
    for images, labels in batches:
        found.update(_bytes(images))
        if labels is not None:
            found.update(_bytes(labels))
    return found.hexdigest()[:DIGITS]


def _bytes(value: Tensor) -> bytes:
    """Returns the bytes of a tensor of any type."""
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _open(name: str, host: nn.Module, images: ImagesOf) -> Iterable[Batch]:
    """Opens a path for the host; reads an iterator to its end, since it is needed again."""
    if isinstance(images, str | Path):
        return Images.for_host(host, images)
    if callable(images):
        images = images(host)
    check_batches(name, images)
    if isinstance(images, Source):
        return images
    batches = [check_batch(batch, number) for number, batch in enumerate(images)]
    if not batches:
        raise BadData(f"{name} holds no images. {name}= takes batches, a source, or a path.")
    return batches


def _keep(images: Iterable[Batch], shape: tuple[int, int, int]) -> Iterable[Batch]:
    """Decodes images once, where all of them fit into memory."""
    if not isinstance(images, Source) or images.count * math.prod(shape) * 4 > MOST_BYTES:
        return images
    return [*images]
