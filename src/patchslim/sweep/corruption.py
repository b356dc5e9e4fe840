"""Corrupted copies of images, to see what fewer patches do where images are poor.

Kinds and strengths are those of ImageNet-C at severities 1, 3 and 5 (Hendrycks and Dietterich,
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", 2019).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from patchslim.hosts._preprocessing import Preprocessing
from patchslim.measurement.score import Batch, check_batch

Pixels = npt.NDArray[np.uint8]  # of one image, (H, W) or (H, W, 3)
USUAL_SIDE = 224  # pixels, for which the widths of blurs are given


@dataclass(frozen=True)
class Corruption:
    """A kind of corruption at a strength.

    Attributes:
        name: the kind and the severity, such as "blur 3".
        change: what it does to the pixels of an image, with random numbers where it needs some.
    """

    name: str
    change: Callable[[Pixels, np.random.Generator], Pixels]


@dataclass(frozen=True)
class CorruptedImages:
    """Batches of corrupted copies; the same ones in each pass.

    Attributes:
        images: the batches to corrupt.
        corruption: what is done to each image.
        prepared: how the images were normalised, which is undone and done again.
    """

    images: Iterable[Batch]
    corruption: Corruption
    prepared: Preprocessing

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        for index, batch in enumerate(self.images):
            images, labels = check_batch(batch, index)
            changed = []
            for image in images:
                draw = np.random.default_rng(number)
                changed.append(self._corrupt(image, draw))
                number += 1
            yield torch.stack(changed).to(images.dtype), labels

    def _corrupt(self, image: Tensor, draw: np.random.Generator) -> Tensor:
        """Corrupts one normalised image (C, H, W)."""
        mean, std = (
            torch.tensor(each)[:, None, None] for each in (self.prepared.mean, self.prepared.std)
        )
        bytes_of = ((image.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte()
        pixels = bytes_of[0].numpy() if len(image) == 1 else bytes_of.permute(1, 2, 0).numpy()
        changed = torch.from_numpy(self.corruption.change(pixels, draw).copy())
        channels = changed[None] if changed.ndim == 2 else changed.permute(2, 0, 1)
        return (channels.float() / 255 - mean) / std


def _blur(width: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    def change(pixels: Pixels, _draw: np.random.Generator) -> Pixels:
        from PIL import Image, ImageFilter  # here, since importing patchslim stays quick

        radius = width * min(pixels.shape[:2]) / USUAL_SIDE
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))

    return change


def _noise(deviation: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    def change(pixels: Pixels, draw: np.random.Generator) -> Pixels:
        noisy = pixels / 255 + draw.normal(0, deviation, pixels.shape)
        return _to_bytes(noisy)

    return change


def _jpeg(quality: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    def change(pixels: Pixels, _draw: np.random.Generator) -> Pixels:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
        return np.asarray(Image.open(file))

    return change


def _contrast(share: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    def change(pixels: Pixels, _draw: np.random.Generator) -> Pixels:
        values = pixels / 255
        middle = values.mean(axis=(0, 1), keepdims=True)
        return _to_bytes((values - middle) * share + middle)

    return change


def _to_bytes(values: npt.NDArray[np.float64]) -> Pixels:
    """Rounds values from 0 to 1 to bytes; what is beyond is cut off, as in a camera."""
    found: Pixels = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    return found


CORRUPTIONS = tuple(
    Corruption(f"{kind} {severity}", make(strength))
    for kind, make, strengths in (
        ("blur", _blur, (1, 3, 6)),
        ("noise", _noise, (0.08, 0.18, 0.38)),
        ("JPEG", _jpeg, (25, 15, 7)),
        ("contrast", _contrast, (0.4, 0.2, 0.05)),
    )
    for severity, strength in zip((1, 3, 5), strengths, strict=True)
)
