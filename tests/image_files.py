"""Writes image files byte by byte, the sound ones and the hostile ones, without an image library.

So what a decoder makes of a file can be compared with the numbers that were put into it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's types of colour
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
    (1, 0, 2, 1))  # fmt: skip
PNG_START = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(
    width: int, height: int, bits: int = 8, colour: int = RGB, interlaced: int = 0
) -> bytes:
    """The start of a PNG, which says its size."""
    fields = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return PNG_START + chunk(b"IHDR", fields)


def png(
    pixels: Array,
    colour: int,
    bits: int = 8,
    *,
    filtered: int = 0,
    interlaced: bool = False,
    more: bytes = b"",
    end: bytes = b"",
) -> bytes:
    """A PNG of the numbers in `pixels` (H, W) or (H, W, C), with other chunks before the data."""
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width = pixels.shape[:2]
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    data = b"".join(
        filter_rows(pixels[top::down, left::right], bits, filtered)
        for top, left, down, right in passes
        if pixels[top::down, left::right].size
    )
    start = png_header(width, height, bits, colour, int(interlaced))
    return start + more + chunk(b"IDAT", zlib.compress(data)) + end + chunk(b"IEND", b"")


def filter_rows(pixels: Array, bits: int, kind: int) -> bytes:
    """The rows of one pass, packed and filtered; kind 5 takes another filter for each row."""
    step = max(1, pixels.shape[2] * bits // 8)
    above = b""
    rows = []
    for number, row in enumerate(pack_rows(pixels, bits)):
        use = number % 5 if kind == 5 else kind
        above = above or bytes(len(row))
        rows.append(bytes([use]) + filter_row(row, above, step, use))
        above = row
    return b"".join(rows)


def filter_row(row: bytes, above: bytes, step: int, kind: int) -> bytes:
    """One row, by one of PNG's five filters."""
    left, corner = bytes(step) + row[:-step], bytes(step) + above[:-step]
    guesses: Iterable[int]
    if kind == 0:
        return row
    if kind == 1:
        guesses = left
    elif kind == 2:
        guesses = above
    elif kind == 3:
        guesses = [(a + b) // 2 for a, b in zip(left, above, strict=True)]
    else:
        guesses = [
            min((a, b, c), key=lambda value: abs(a + b - c - value))
            for a, b, c in zip(left, above, corner, strict=True)
        ]
    return bytes((value - guess) & 255 for value, guess in zip(row, guesses, strict=True))


def pack_rows(pixels: Array, bits: int) -> list[bytes]:
    """Each row as bytes, the first pixel in the highest bits."""
    rows = pixels.reshape(len(pixels), -1)
    if bits == 16:
        return [row.astype(">u2").tobytes() for row in rows]
    if bits == 8:
        return [row.astype(np.uint8).tobytes() for row in rows]
    split = rows.astype(np.uint8)[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8) & 1
    return [np.packbits(row).tobytes() for row in split.reshape(len(rows), -1)]


def tiff(
    pixels: Array,
    *,
    big: bool = False,
    photometric: int = 1,
    deflated: bool = False,
    bits: int | None = None,
    more: Sequence[tuple[int, int, int]] = (),
    size: tuple[int, int] | None = None,
) -> bytes:
    """A TIFF of one strip; `more` are tags of (number, type, value), `size` is a lie about it."""
    order = ">" if big else "<"
    height, width = pixels.shape[:2]
    width, height = size or (width, height)
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if deflated else data
    bits = bits or pixels.dtype.itemsize * 8
    lists = struct.pack(f"{order}{channels}H", *[bits] * channels)
    kinds = struct.pack(f"{order}{channels}H", *[kind] * channels)
    at = 8 + len(data)
    several = channels > 1
    tags = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, channels, at if several else bits),
        259: (3, 1, 8 if deflated else 1),
        262: (3, 1, photometric),
        273: (4, 1, 8),
        277: (3, 1, channels),
        278: (4, 1, height),
        279: (4, 1, len(data)),
        339: (3, channels, at + len(lists) if several else kind),
    }
    if channels in (2, 4) and photometric < 5:
        tags[338] = (3, 1, 2)
    tags |= {number: (type_, 1, value) for number, type_, value in more}
    start = (b"MM" if big else b"II") + struct.pack(order + "HI", 42, at + len(lists + kinds))
    return start + data + lists + kinds + tiff_tags(tags, order)


def tiff_tags(tags: dict[int, tuple[int, int, int]], order: str) -> bytes:
    """A TIFF's directory: number, type, count and value of each tag."""
    entries = struct.pack(order + "H", len(tags))
    for number, (type_, count, value) in sorted(tags.items()):
        short = type_ == 3 and count <= 2
        field = struct.pack(order + "HH", value, 0) if short else struct.pack(order + "I", value)
        entries += struct.pack(order + "HHI", number, type_, count) + field
    return entries + bytes(4)


def bmp(pixels: Array, *, upside_down: bool = False, size: tuple[int, int] | None = None) -> bytes:
    """A BMP of 24 bits (H, W, 3), or of 8 bits with a grey palette (H, W)."""
    height, width = pixels.shape[:2]
    palette = b"" if pixels.ndim == 3 else bytes(v for i in range(256) for v in (i, i, i, 0))
    rows = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    rows = rows if upside_down else rows[::-1]
    lines = [row.astype(np.uint8).tobytes() for row in rows]
    data = b"".join(line + bytes(-len(line) % 4) for line in lines)
    width, height = size or (width, height)
    at = 54 + len(palette)
    fields = (40, width, -height if upside_down else height, 1, 24 if pixels.ndim == 3 else 8)
    info = struct.pack("<IiiHH", *fields) + struct.pack("<IIiiII", 0, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + info + palette + data


def pnm(pixels: Array, white: int, *, plain: bool = False) -> bytes:
    """A PGM or PPM whose brightest number is `white`."""
    height, width = pixels.shape[:2]
    colour = pixels.ndim == 3
    magic = (b"P3" if colour else b"P2") if plain else (b"P6" if colour else b"P5")
    start = magic + f"\n# made by hand\n{width} {height}\n{white}\n".encode()
    if plain:
        return start + b" ".join(str(int(value)).encode() for value in pixels.ravel()) + b"\n"
    return start + pixels.astype(">u2" if white > 255 else np.uint8).tobytes()


def gif_header(width: int, height: int) -> bytes:
    """A GIF of one empty frame as large as it says."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0;"


def webp_header(width: int, height: int) -> bytes:
    """A lossless WebP that says its size and holds next to nothing."""
    fields = (width - 1 & 0x3FFF) | (height - 1 & 0x3FFF) << 14
    data = b"/" + struct.pack("<I", fields) + bytes(16)
    body = b"WEBPVP8L" + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_size(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header says another size."""
    at = next(jpeg.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in jpeg)
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def exif(orientation: int) -> bytes:
    """The EXIF block that says how a camera was held."""
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x112, 3, 1, orientation, 0, 0)


def resize(pixels: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.float64]:
    """Resizes (H, W, C) as Pillow's bicubic filter does, in float."""
    for axis, size in ((1, width), (0, height)):  # in Pillow's order, which clips in between
        weights = _weights(pixels.shape[axis], size)
        pixels = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
        pixels = np.clip(pixels, 0, 1)
    return pixels


def _weights(before: int, after: int) -> npt.NDArray[np.float64]:
    """What each of the pixels before gives to each of those after."""
    scale = before / after
    reach = max(scale, 1.0)
    centres = (np.arange(after) + 0.5) * scale
    x = np.abs((np.arange(before)[None] + 0.5 - centres[:, None]) / reach)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights: npt.NDArray[np.float64] = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)
