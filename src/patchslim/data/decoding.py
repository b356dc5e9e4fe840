"""Decodes one image file to eight bits, grey or RGB, or says why it cannot be decoded right.

The size is read from the header before anything is unpacked. What the pixels mean is decided as in
torchvision and timm, except where that would destroy them: 16 bits are scaled, not cut off.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from patchslim.data.files import shorten
from patchslim.data.limits import USUAL_LIMITS, Limits

# Pillow knows more formats. One of them, EPS, runs a program on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MOST_SCANS = 64  # a JPEG has about ten; each costs as much time as the whole image
SCAN_MARK = b"\xff\xda"
EXIF_ORIENTATION, TIFF_PHOTOMETRIC, TIFF_BITS, TIFF_SAMPLES = 0x112, 262, 258, 339
WHITE_IS_ZERO, SIGNED = 0, 2
PIXELS_AT_ONCE = 1 << 20  # about so many are scaled at once, to spare memory
OPAQUE = 255

TURNED = "are turned by an EXIF tag, which is not followed (as in torchvision and timm)"
TRANSPARENT = "have transparent parts, of which the colours beneath are read (as in torchvision)"
ANIMATED = "have several frames, of which the first is read"


class Decoded(NamedTuple):
    """A picture, and what a reader should be told of how it was read."""

    picture: Any
    remarks: tuple[str, ...]


def decode_image(
    data: bytes,
    *,
    grey: bool,
    limits: Limits = USUAL_LIMITS,
    resized_size: Callable[[int, int], tuple[int, int]] | None = None,
) -> Decoded:
    """Decodes an image file to a Pillow image, grey or RGB; raises a ValueError if it cannot.

    `resized_size` says how wide and high an image is after resizing, which has limits too.
    """
    limits.check_file(len(data))
    _check_webp(data, limits)
    if data.startswith(b"\xff\xd8") and data.count(SCAN_MARK) > MOST_SCANS:
        raise ValueError(f"it is a JPEG of more than {MOST_SCANS} scans")
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and palettes; the image can be read all the same.
            warnings.simplefilter("ignore")
            opened = Image.open(io.BytesIO(data), formats=_known_formats())
            _check_size(opened, limits, resized_size)
            remarks = _remarks(opened, data)
            opened.load()
            if _is_transparent(opened):
                remarks = (*remarks, TRANSPARENT)
            return Decoded(_to_eight_bits(opened, "L" if grey else "RGB"), remarks)
    except UnidentifiedImageError as error:
        # Pillow's message holds the address of an object in memory, which differs each time.
        raise ValueError("this is no image that Pillow knows") from error
    except MemoryError as error:
        raise ValueError("there is not enough memory for it") from error
    except Exception as error:
        raise ValueError(shorten(error) or type(error).__name__) from error


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """The formats that this Pillow was built with."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_webp(data: bytes, limits: Limits) -> None:
    """Checks the size of a WebP, for which Pillow takes memory as soon as it is opened."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    limits.check_pixels(width, height, " as a WebP, which counts twice", times=2)


def _check_size(
    opened: Any, limits: Limits, resized_size: Callable[[int, int], tuple[int, int]] | None
) -> None:
    """Checks the size in the header, and that after resizing."""
    limits.check_pixels(*opened.size)
    if resized_size is not None:
        limits.check_pixels(*resized_size(*opened.size), " after resizing")


def _remarks(opened: Any, data: bytes) -> tuple[str, ...]:
    """What of an image is not followed or not read, as far as its header tells."""
    found = []
    if "exif" in opened.info and opened.format != "TIFF":  # Pillow turns a TIFF itself
        try:
            if opened.getexif().get(EXIF_ORIENTATION) in range(2, 9):
                found.append(TURNED)
        except Exception:  # noqa: BLE001 (metadata that cannot be read turns nothing)
            return tuple(found)
    if opened.format != "TIFF" and _is_animated(opened, data):
        found.append(ANIMATED)
    return tuple(found)


def _is_transparent(loaded: Any) -> bool:
    """Whether any pixel of an image may be transparent."""
    if loaded.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        return bool(loaded.getchannel(len(loaded.getbands()) - 1).getextrema()[0] < OPAQUE)
    return "transparency" in loaded.info


def _is_animated(opened: Any, data: bytes) -> bool:
    """Whether an image has several frames. To tell, Pillow has to go on to the second of a GIF."""
    if opened.format != "GIF":
        return bool(getattr(opened, "is_animated", False))
    from PIL import Image

    try:
        return bool(getattr(Image.open(io.BytesIO(data), formats=("GIF",)), "is_animated", False))
    except Exception:  # noqa: BLE001 (a second frame that cannot be read is none)
        return False


def _to_eight_bits(opened: Any, mode: str) -> Any:
    """Scales an image's numbers to 0..255; raises a ValueError if their white is not known."""
    if _tag(opened, TIFF_SAMPLES, 1) == SIGNED:
        raise ValueError("it holds signed numbers, and no file says which of them is white")
    if opened.mode.startswith("I") or opened.mode == "F":
        from PIL import Image

        scale = _scale_floats if opened.mode == "F" else _scaling_of_whole_numbers(opened)
        width, height = opened.size
        rows = max(1, PIXELS_AT_ONCE // width)
        pixels = np.empty((height, width), np.uint8)
        for top in range(0, height, rows):
            part = opened.crop((0, top, width, min(height, top + rows)))
            pixels[top : top + rows] = scale(np.asarray(part))
        if _tag(opened, TIFF_PHOTOMETRIC, 1) == WHITE_IS_ZERO:  # Pillow inverts only 8 bits
            np.subtract(255, pixels, out=pixels)
        opened.close()  # its memory is needed for the next step
        opened = Image.fromarray(pixels)
    return opened if opened.mode == mode else opened.convert(mode)


def _tag(opened: Any, number: int, usual: int) -> int:
    """The value of a TIFF's tag; of several values the first."""
    if opened.format != "TIFF":
        return usual
    value = opened.tag_v2.get(number, usual)
    return int(value[0] if isinstance(value, tuple) else value)


def _scale_floats(values: Any) -> Any:
    """Scales floats from 0 to 1. Of others nobody knows what is black and white in them."""
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        raise ValueError(
            f"it holds floats from {low:g} to {high:g}; only those from 0 to 1 are sure to be "
            "pixels. Save it with 8 or 16 bits"
        )
    return np.rint(values * 255)


def _scaling_of_whole_numbers(opened: Any) -> Callable[[Any], Any]:
    """A function that scales grey of 9 to 16 bits; 32 bits have no white that is known."""
    if opened.mode == "I" and opened.format not in ("PNG", "PPM"):
        raise ValueError("it holds numbers of 32 bits, of which none is white. Save it with 16")
    white = 2 ** _tag(opened, TIFF_BITS, 16) - 1
    table = ((np.arange(white + 1) * 255 + white // 2) // white).astype(np.uint8)
    return lambda values: table.take(values, mode="clip")
