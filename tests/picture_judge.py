"""Judges what patchslim makes of one image file beside a sound one: read right, or named."""

from __future__ import annotations

import contextlib
import io
import resource
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from attacks.attack import Lost, SilentlyWrong
from image_files import RGB, png, resize
from patchslim.data.images import Images
from patchslim.errors import BadData

Floats = npt.NDArray[np.float64]
SIDE = 32  # what the host sees; images of this size are not resized
PLAIN: dict[str, Any] = {
    "image_size": (SIDE, SIDE),
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}
GREY_HOST = {"mean": (0.0,), "std": (1.0,)}
CLEAN = "clean.png"
EXACT = 0.6 / 255  # rounded to 8 bits
ROUNDED = 1.05 / 255  # Pillow cuts the lower byte of 16-bit colours off
LOSSY = 12 / 255  # JPEG
MOST_MEMORY = 600 << 20  # that one image may take


class Must(Enum):
    """What has to become of an image."""

    READ = "read"
    SKIP = "skip"
    EITHER = "either"


READ, SKIP, EITHER = Must
RNG = np.random.default_rng(16)
COLOURS = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GREYS = np.ascontiguousarray(COLOURS[..., 0])
CLEAN_PNG = png(COLOURS[::-1], RGB)


def as_floats(pixels: Any, white: float = 255) -> Floats:
    """Numbers (H, W) or (H, W, C) as three channels between 0 and 1."""
    floats: Floats = np.asarray(pixels, np.float64) / white
    return np.repeat(floats[..., None], 3, 2) if floats.ndim == 2 else floats[..., :3]


def encode(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    """What Pillow writes."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats that Pillow will give up
        picture.save(stream, kind, **settings)
    return stream.getvalue()


def read_folder(path: Path, **settings: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The pixels of each image that is read, by its name, and the reasons for all others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = Images(path, **{**PLAIN, **settings}, batch=1)
        batches = [pixels[0] for pixels, _ in images]
    reasons, names = {}, iter(images.names)
    for line in images.unreadable:  # in the order of the names
        name = next(name for name in names if line.startswith(f"{name}: "))
        reasons[name] = line[len(name) + 2 :]
    readable = [name for name in images.names if name not in reasons]
    if len(readable) != len(batches):
        raise Lost(f"{len(batches)} batches, {len(readable)} images are said to be readable")
    return dict(zip(readable, batches, strict=True)), reasons


def compare(name: str, pixels: Tensor, wanted: Floats, tolerance: float) -> None:
    """Raises where pixels (C, H, W) are not the wanted ones (H, W, C)."""
    got = pixels.double().permute(1, 2, 0).numpy()
    if got.shape[2] == 1:  # Pillow's grey
        wanted = (wanted @ np.array([0.299, 0.587, 0.114]))[..., None]
    off = np.abs(got - wanted).max() if got.shape == wanted.shape else np.inf
    if not off <= tolerance:
        raise SilentlyWrong(f"{name}: pixels differ by {off:.3f} from what is in the file")


def judge(
    folder: Path,
    name: str,
    data: bytes | None,
    wanted: Floats | None,
    must: Must,
    tolerance: float = EXACT,
    **settings: Any,
) -> None:
    """Reads a folder of this file and a sound one, through decoding and preprocessing."""
    (folder / CLEAN).write_bytes(CLEAN_PNG)
    if data is not None:
        (folder / name).write_bytes(data)
    with watch_memory(name):
        try:
            pixels, reasons = read_folder(folder, **settings)
        except BadData as error:
            raise Lost(f"a sound image is lost with a hostile one: {error}") from error
    if CLEAN not in pixels:
        raise Lost(f"the sound image is lost: {reasons.get(CLEAN)}")
    size = settings.get("image_size", PLAIN["image_size"])
    compare(CLEAN, pixels[CLEAN], reference(as_floats(COLOURS[::-1]), settings), 2 * EXACT)
    if name in reasons:
        check_reason(name, reasons[name])
        if must is READ:
            raise SilentlyWrong(f"{name} is sound, and was left out: {reasons[name]}")
    elif name not in pixels:
        raise Lost(f"{name} is neither read nor named")
    elif must is SKIP:
        raise SilentlyWrong(f"{name} cannot be read right, and was read")
    elif wanted is not None:
        compare(name, pixels[name], reference(wanted, settings), tolerance)
    elif pixels[name].shape[1:] != size or not pixels[name].isfinite().all():
        raise SilentlyWrong(f"{name}: its pixels are no numbers of the right shape")


@contextlib.contextmanager
def watch_memory(name: str) -> Iterator[None]:
    """Raises where the block took more memory than one image may."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    if taken > MOST_MEMORY:
        raise SilentlyWrong(f"{name} took {taken >> 20} MB")


def check_reason(name: str, reason: str) -> None:
    """A reason is one short line without addresses in memory."""
    if not reason or len(reason) > 300 or "\n" in reason or " at 0x" in reason:
        raise SilentlyWrong(f"{name}: no reason for a person to read: {reason!r}")


def reference(pixels: Floats, settings: dict[str, Any]) -> Floats:
    """Resizes and crops in float, for square hosts with crop_pct=1 in all three modes."""
    height, width = pixels.shape[:2]
    side = settings.get("image_size", PLAIN["image_size"])[0]
    mode = settings.get("crop_mode", "center")
    if mode == "squash":
        return resize(pixels, side, side)
    if mode == "border":
        ratio = max(height, width) / side
        small = resize(pixels, round(height / ratio), round(width / ratio))
        out = np.zeros((side, side, 3))  # filled with the mean, which is 0
        top, left = (side - small.shape[0]) // 2, (side - small.shape[1]) // 2
        out[top : top + small.shape[0], left : left + small.shape[1]] = small
        return out
    short = min(height, width)
    size = side * height // short, side * width // short
    top, left = (round((length - side) / 2) for length in size)
    return resize(pixels, *size)[top : top + side, left : left + side]
