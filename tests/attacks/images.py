"""Image files: sound ones of every kind, which must be read right, and hostile ones of every kind.

Each lies in a folder beside a sound image, which must be read whatever the other one is.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import patchslim
from attacks.attack import Attack, Lost, SilentlyWrong
from image_files import (
    CHANNELS,
    GREY,
    GREY_ALPHA,
    PALETTE,
    PNG_START,
    RGB,
    RGBA,
    bmp,
    chunk,
    exif,
    gif_header,
    jpeg_of_size,
    png,
    png_header,
    pnm,
    tiff,
    webp_header,
)
from patchslim.example import digits
from patchslim.hosts._preprocessing import Preprocessing
from picture_judge import (
    CLEAN_PNG,
    COLOURS,
    EITHER,
    GREY_HOST,
    GREYS,
    LOSSY,
    READ,
    ROUNDED,
    SIDE,
    SKIP,
    Floats,
    Must,
    as_floats,
    compare,
    encode,
    judge,
    read_folder,
)

ALPHA = np.random.default_rng(17).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:SIDE, 0:SIDE], 16), 2).astype(np.uint8) * 7
CONTROL = {  # sound files of every format
    "a.png": png(COLOURS, RGB),
    "a.gif": encode(Image.fromarray(GREYS), "GIF"),
    "a.bmp": bmp(COLOURS),
    "a.jpg": encode(Image.fromarray(SMOOTH), "JPEG", quality=95, subsampling=0),
    "p.jpg": encode(Image.fromarray(SMOOTH), "JPEG", quality=95, progressive=True, subsampling=0),
    "a.webp": encode(Image.fromarray(COLOURS), "WEBP", lossless=True),
    "l.webp": encode(Image.fromarray(SMOOTH), "WEBP", quality=95),
    "a.tif": tiff(COLOURS, photometric=2),
    "z.tiff": tiff(COLOURS, photometric=2, deflated=True),
    "a.ppm": pnm(COLOURS, 255),
}
SEEN = {
    **dict.fromkeys(CONTROL, as_floats(COLOURS)),
    **dict.fromkeys(("a.jpg", "p.jpg", "l.webp"), as_floats(SMOOTH)),
    "a.gif": as_floats(GREYS),
}


def attacks() -> Iterator[Attack]:
    Preprocessing(image_size=(SIDE, SIDE)).transform()  # imports timm here, and not in each child
    yield from png_attacks()
    yield from tiff_attacks()
    yield from deep_attacks()
    yield from plain_attacks()
    yield from turned_attacks()
    yield from see_through_attacks()
    yield from frame_attacks()
    yield from size_attacks()
    yield from shape_attacks()
    yield from damaged_attacks()
    yield from disguised_attacks()
    yield from stuffed_attacks()
    for kind, run in FILE_ATTACKS.items():
        yield Attack(f"file/{kind}", run)
    for kind, run in MEASURED.items():
        yield Attack(f"measure/{kind}", run)


def case(
    name: str,
    file: str,
    data: bytes | Callable[[], bytes],
    wanted: Floats | None,
    must: Must = READ,
    tolerance: float = 0.6 / 255,
    **settings: Any,
) -> Attack:
    """An attack by one file; data that is large is made when it is needed."""

    def run(folder: Path) -> None:
        made = data() if callable(data) else data
        judge(folder, file, made, wanted, must, tolerance, **settings)

    return Attack(f"{name}/{file}", run)


def png_attacks() -> Iterator[Attack]:
    """Every colour type, depth, filter and interlacing of PNG."""
    rng = np.random.default_rng(18)
    for colour, depths in {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8),
                           GREY_ALPHA: (8, 16), RGBA: (8, 16)}.items():  # fmt: skip
        for bits in depths:
            white = 2**bits - 1
            pixels = rng.integers(0, white + 1, (SIDE, SIDE, CHANNELS[colour]))
            if colour in (GREY_ALPHA, RGBA):
                pixels[..., -1] = white
            seen = as_floats(pixels[..., :3] if colour in (RGB, RGBA) else pixels[..., 0], white)
            more = b""
            if colour == PALETTE:
                table = rng.integers(0, 256, (white + 1, 3))
                more, seen = chunk(b"PLTE", table.astype(np.uint8).tobytes()), table / 255
                seen = seen[pixels[..., 0]]
            tolerance = ROUNDED if bits == 16 else 0.6 / 255
            for filtered in (0, 5):
                for interlaced in (False, True):
                    data = png(
                        pixels, colour, bits, filtered=filtered, interlaced=interlaced, more=more
                    )
                    name = f"png/{colour}-{bits}-{filtered}-{interlaced:d}"
                    yield case(name, "a.png", data, seen, READ, tolerance)


def tiff_attacks() -> Iterator[Attack]:
    """Grey TIFFs of 8 and 16 bits and of floats, in both orders of bytes, white or black at 0."""
    rng = np.random.default_rng(19)
    for big, photometric, deflated in itertools.product((False, True), (0, 1), (False, True)):
        made = partial(tiff, big=big, photometric=photometric, deflated=deflated)
        name = f"tiff/{'MM' if big else 'II'}-{photometric}-{deflated:d}"
        for white, most in ((255, 255), (255, 51), (65535, 65535), (65535, 13107)):
            kind = np.uint8 if white == 255 else np.uint16
            grey = rng.integers(0, most + 1, (SIDE, SIDE)).astype(kind)
            seen = as_floats(grey, white)
            seen = seen if photometric else 1 - seen
            yield case(f"{name}-{most}", "a.tif", made(grey), seen, EITHER)
        for low, high in ((0.0, 1.0), (0.2, 0.3), (0.0, 0.0)):
            floats = rng.uniform(low, high, (SIDE, SIDE)).astype(np.float32)
            seen = as_floats(floats, 1)
            seen = seen if photometric else 1 - seen
            yield case(f"{name}-{low}-{high}", "f.tif", made(floats), seen, EITHER)


def deep_attacks() -> Iterator[Attack]:
    """16 bits, 32 bits and float: scaled right, or named and left out."""
    rng = np.random.default_rng(24)
    for white in (255, 65535):
        colours = rng.integers(0, white + 1, (SIDE, SIDE, 3))
        colours = colours.astype(np.uint8 if white == 255 else np.uint16)
        for big in (False, True):
            data = tiff(colours, big=big, photometric=2)
            yield case(f"tiff/rgb-{big:d}-{white}", "a.tif", data, as_floats(colours, white),
                READ, ROUNDED)  # fmt: skip
    floats = rng.uniform(0, 1, (SIDE, SIDE)).astype(np.float32)
    yield case("float/sound", "a.tif", tiff(floats), as_floats(floats, 1))
    for value in (np.nan, np.inf, -np.inf, -0.5, 1.5, 255.0, 1e30, -1e-3):
        spoilt = floats.copy()
        spoilt[3, 4] = value
        yield case(f"float/{value}", "a.tif", tiff(spoilt), None, SKIP)
    yield case("float/all-nan", "a.tif", tiff(floats * np.nan), None, SKIP)
    yield case("float/bytes", "a.tif", tiff(floats * 255), None, SKIP)
    for kind in (np.int16, np.int32, np.uint32, np.float64, np.int8):
        pixels = rng.integers(0, 100, (SIDE, SIDE)).astype(kind)
        yield case(f"deep/{kind.__name__}", "a.tif", tiff(pixels), None, SKIP)
    twelve = np.full((SIDE, SIDE), 0x8, np.uint16)
    for bits in (12, 14, 24):
        yield case(f"deep/{bits}", "a.tif", tiff(twelve, bits=bits), None, EITHER)
    ramp = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 64
    yield case("deep/grey-host", "a.png", png(ramp, GREY, 16), as_floats(ramp, 65535), READ,
        ROUNDED, **GREY_HOST)  # fmt: skip


def plain_attacks() -> Iterator[Attack]:
    """BMP, PGM, PPM, JPEG and WebP of many settings."""
    yield case("bmp/24", "a.bmp", bmp(COLOURS), as_floats(COLOURS))
    yield case("bmp/down", "a.bmp", bmp(COLOURS, upside_down=True), as_floats(COLOURS))
    yield case("bmp/8", "a.bmp", bmp(GREYS), as_floats(GREYS))
    yield case("bmp/huge", "a.bmp", bmp(COLOURS, size=(2**31 - 1, 2**31 - 1)), None, SKIP)
    rng = np.random.default_rng(20)
    for white in (1, 15, 100, 255, 256, 1023, 4095, 65535):
        for shape in ((SIDE, SIDE), (SIDE, SIDE, 3)):
            for plain in (False, True):
                pixels = rng.integers(0, white + 1, shape)
                name = f"pnm/{white}-{len(shape)}-{plain:d}"
                data = pnm(pixels, white, plain=plain)
                yield case(name, "a.ppm", data, as_floats(pixels, white), READ, ROUNDED)
    for name in CONTROL:
        lossy = LOSSY if name in ("a.jpg", "p.jpg", "l.webp") else 0.6 / 255
        yield case("sound", name, CONTROL[name], SEEN[name], READ, lossy)
        yield case("sound-grey-host", name, CONTROL[name], SEEN[name], READ, lossy + 0.01,
            **GREY_HOST)  # fmt: skip
    smooth = Image.fromarray(SMOOTH)
    for mode in ("L", "CMYK", "YCbCr"):
        seen = as_floats(SMOOTH if mode != "L" else np.asarray(smooth.convert("L")))
        yield case(f"jpeg/{mode}", "a.jpg", encode(smooth.convert(mode), "JPEG", quality=98,
            subsampling=0), seen, READ, LOSSY)  # fmt: skip
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "LAB"):
        try:
            picture = smooth.convert("L").convert(mode) if mode == "I;16" else smooth.convert(mode)
        except ValueError:
            picture = Image.new(mode, (SIDE, SIDE))
        yield case(f"tiff/mode-{mode}", "a.tif", encode(picture, "TIFF"), None, EITHER)


def turned_attacks() -> Iterator[Attack]:
    """A camera's EXIF tag is not followed, as in torchvision and timm; Pillow turns TIFFs."""
    for turn in (1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 65535):
        tag = exif(turn)
        for kind, file, pixels in (("JPEG", "a.jpg", SMOOTH), ("WEBP", "a.webp", COLOURS)):
            more = {"lossless": True} if kind == "WEBP" else {"quality": 98, "subsampling": 0}
            data = encode(Image.fromarray(pixels), kind, exif=b"Exif\0\0" + tag, **more)
            yield case(f"exif/{turn}", file, data, as_floats(pixels), READ, LOSSY)
        data = png(COLOURS, RGB, more=chunk(b"eXIf", tag))
        yield case(f"exif/{turn}", "a.png", data, as_floats(COLOURS))
        turned = {2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1],
            5: COLOURS.transpose(1, 0, 2), 6: np.rot90(COLOURS, -1), 8: np.rot90(COLOURS),
            7: np.rot90(COLOURS, 2).transpose(1, 0, 2)}.get(turn, COLOURS)  # fmt: skip
        data = tiff(COLOURS, photometric=2, more=[(274, 3, turn)])
        yield case(f"exif/{turn}", "a.tif", data, as_floats(turned))


def see_through_attacks() -> Iterator[Attack]:
    """Transparent pixels show the colour that is stored beneath, as in torchvision and timm."""
    for part, alpha in (("some", ALPHA), ("all", ALPHA * 0), ("none", ALPHA * 0 + 255)):
        mixed = np.dstack([COLOURS, alpha])
        yield case(f"alpha/{part}", "a.png", png(mixed, RGBA), as_floats(COLOURS))
        grey = np.dstack([GREYS, alpha])
        yield case(f"alpha/{part}-grey", "a.png", png(grey, GREY_ALPHA), as_floats(GREYS))
        data = encode(Image.fromarray(mixed), "WEBP", lossless=True, exact=True)
        yield case(f"alpha/{part}", "a.webp", data, as_floats(COLOURS))
        data = tiff(mixed, photometric=2)
        yield case(f"alpha/{part}", "a.tif", data, as_floats(COLOURS))
    for colour, key in ((GREY, struct.pack(">H", 7)), (RGB, struct.pack(">HHH", 1, 2, 3))):
        pixels = GREYS if colour == GREY else COLOURS
        data = png(pixels, colour, more=chunk(b"tRNS", key))
        yield case(f"alpha/key-{colour}", "a.png", data, as_floats(pixels))
    for count in (0, 1, 100, 256, 1000):
        table = chunk(b"PLTE", bytes(range(256)) * 3) + chunk(b"tRNS", bytes(count))
        seen = np.frombuffer(bytes(range(256)) * 3, np.uint8).reshape(256, 3)[GREYS] / 255
        must = READ if count <= 256 else EITHER
        yield case(f"alpha/palette-{count}", "a.png", png(GREYS, PALETTE, more=table), seen, must)
    data = encode(Image.fromarray(GREYS), "GIF", transparency=3)
    yield case("alpha/gif", "a.gif", data, as_floats(GREYS))
    short = png(GREYS, PALETTE, more=chunk(b"PLTE", bytes(6)))
    yield case("palette/short", "a.png", short, None, EITHER)
    yield case("palette/none", "a.png", png(GREYS, PALETTE), None, EITHER)


def frame_attacks() -> Iterator[Attack]:
    """Of several frames or pages the first is read."""
    others = [Image.fromarray(np.roll(COLOURS, turn, 0)) for turn in range(5)]
    greys = [Image.fromarray(np.roll(GREYS, turn, 0)) for turn in range(5)]
    for kind, file, frames, more in (
        ("PNG", "a.png", others, {}),
        ("WEBP", "a.webp", others, {"lossless": True}),
        ("TIFF", "a.tif", others, {}),
        ("MPO", "a.jpg", [Image.fromarray(np.roll(SMOOTH, t, 0)) for t in range(3)], {}),
        ("GIF", "a.gif", greys, {}),
    ):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **more)
        wanted = as_floats(np.asarray(frames[0].convert("RGB")))
        tolerance = 25 / 255 if kind == "MPO" else 0.6 / 255
        yield case("frames", file, data, wanted, READ, tolerance)


def size_attacks() -> Iterator[Attack]:
    """Small files that are huge images, before or after resizing."""
    sizes = [(1, 30_000), (30_000, 1), (1, 1_000_000), (1_000_000, 1), (1, 40_000_000),
        (6_000, 6_000),
        (9_000, 9_900), (13_000, 13_500), (50_000, 50_000), (65_535, 65_535), (0, 5),
        (2**31 - 1, 2**31 - 1)]  # fmt: skip
    jpeg = CONTROL["a.jpg"]
    for width, height in sizes:
        name = f"size/{width}x{height}"
        data: bytes | Callable[[], bytes] = png_header(width, height) + chunk(b"IDAT", b"")
        if 0 < width * height < 200_000_000:
            data = partial(zeros_png, width, height)
        yield case(name, "a.png", data, None, SKIP, image_size=(256, 256))
        yield case(name, "a.bmp", bmp(COLOURS, size=(width, height)), None, SKIP)
        white = f"P6 {width} {height} 255\n".encode()
        yield case(name, "a.ppm", white + bytes(99), None, SKIP)
        data = tiff(COLOURS, photometric=2, size=(width, height))
        yield case(name, "a.tif", data, None, SKIP)
        if max(width, height) < 65536:
            yield case(name, "a.gif", gif_header(width, height), None, SKIP,
                image_size=(256, 256))  # fmt: skip
            yield case(name, "a.jpg", jpeg_of_size(jpeg, width, height), None, SKIP,
                image_size=(256, 256))  # fmt: skip
        if 0 < max(width, height) <= 16384:
            yield case(name, "a.webp", webp_header(width, height), None, SKIP)
    big = partial(zeros_png, 5_000, 5_000)  # 25 megapixels
    yield case("size/largest", "a.png", big, np.zeros((SIDE, SIDE, 3)), READ, crop_mode="squash")
    yield Attack("size/file", partial(_sparse_file, size=1 << 40))
    yield Attack("size/file-of-300-MB", partial(_sparse_file, size=300 << 20))
    yield case("size/scans", "a.jpg", partial(endless_jpeg, 5_000), None, SKIP)


def zeros_png(width: int, height: int) -> bytes:
    """A sound and black PNG, which is small however large it is."""
    packer, row = zlib.compressobj(9), bytes(3 * width + 1)
    rows = max(1, (1 << 20) // len(row))
    parts = [packer.compress(row * min(rows, height - at)) for at in range(0, height, rows)]
    return png_header(width, height) + chunk(b"IDAT", b"".join(parts) + packer.flush()) + chunk(
        b"IEND", b"")  # fmt: skip


def endless_jpeg(scans: int) -> bytes:
    """A progressive JPEG that repeats its last scan again and again."""
    picture = Image.new("RGB", (5_000, 5_000))
    data = encode(picture, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    tables = data.rindex(b"\xff\xc4", 0, last)
    return data[:-2] + data[tables:-2] * scans + data[-2:]


def _sparse_file(folder: Path, size: int) -> None:
    (folder / "a.png").write_bytes(CLEAN_PNG)
    os.truncate(folder / "a.png", size)
    judge(folder, "a.png", None, None, SKIP)


def shape_attacks() -> Iterator[Attack]:
    """Long and narrow images in each way to crop: as the float reference, or left out."""
    rng = np.random.default_rng(21)
    for mode in ("center", "squash", "border"):
        for height, width in ((1, 1), (2, 3), (5, 33), (100, 31), (31, 100), (1, 50), (50, 1),
                              (64, 64), (257, 40), (3, 90), (300, 299), (7, 400)):  # fmt: skip
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            name = f"shape/{mode}-{height}x{width}"
            must = EITHER if max(height, width) / min(height, width) > 16 else READ
            yield case(name, "a.png", png(pixels, RGB), as_floats(pixels), must, 10 / 255,
                crop_mode=mode)  # fmt: skip


def damaged_attacks() -> Iterator[Attack]:
    """Cut and flipped files: named and left out, or read right where the format can tell."""
    rng = np.random.default_rng(22)
    for file, data in CONTROL.items():
        for part in (0.02, 0.2, 0.5, 0.8, 0.97):
            cut = data[: int(len(data) * part)]
            yield case(f"cut/{part}", file, cut, None, SKIP)
        for number in range(9):
            flipped = bytearray(data)
            reach = len(data) if number % 2 else min(len(data), 80)  # half of them in the header
            for place in rng.integers(0, reach, 1 + number % 4):
                flipped[place] ^= 1 << int(rng.integers(8))
            yield case(f"flip/{number}", file, bytes(flipped), None, EITHER)
    for place in range(60, len(CONTROL["a.png"]) - 20, 400):  # a PNG knows its own sum
        flipped = bytearray(CONTROL["a.png"])
        flipped[place] ^= 16
        yield case(f"flip/data-{place}", "a.png", bytes(flipped), as_floats(COLOURS), EITHER)


def disguised_attacks() -> Iterator[Attack]:
    """Other files under the name of an image."""
    files = {
        "empty": b"", "one": b"\xff", "zeros": bytes(1 << 20), "text": b"hello\n" * 99,
        "html": b"<html><img src=x></html>", "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "elf": b"\x7fELF" + bytes(99), "zip": b"PK\x03\x04" + bytes(99), "gzip": b"\x1f\x8b\x08",
        "pdf": b"%PDF-1.4\n", "json": b"[" * 5000, "lfs": b"version https://git-lfs...\n",
        "random": np.random.default_rng(23).bytes(5000), "png": PNG_START, "bom": b"\xef\xbb\xbf",
        "gif": b"GIF89a", "tiff": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 99, "P": b"P6",
        "tiff-loop": b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "bmp": b"BM" + bytes(52),
        "webp": b"RIFF\xff\xff\xff\xffWEBPVP8X", "ppm": b"P6 " + b"9" * 99 + b" 1 255\n",
        "jpeg": b"\xff\xd8\xff\xe0", "avif": b"\0\0\0\x20ftypavif" + bytes(40),
    }  # fmt: skip
    for kind, data in files.items():
        for file in ("a.jpg", "a.tif"):
            yield case(f"not/{kind}", file, data, None, SKIP)
    picture = Image.fromarray(COLOURS)
    for kind in ("ICO", "ICNS", "PCX", "TGA", "SGI", "PDF", "IM", "EPS", "DDS", "MSP", "XBM"):
        with_mode = picture.convert("1") if kind in ("MSP", "XBM") else picture
        yield case(f"other/{kind}", "a.png", encode(with_mode, kind), None, EITHER)
    for kind, seen in (("PNG", COLOURS), ("BMP", COLOURS), ("TIFF", COLOURS)):
        yield case(f"named/{kind}", "a.jpg", encode(picture, kind), as_floats(seen))
    yield Attack("other/ghostscript", _postscript)


def _postscript(folder: Path) -> None:
    """No program may be run to read an image."""
    tools = folder.parent / f"{folder.name}-tools"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {tools}/ran\n")
    (tools / "gs").chmod(0o755)
    os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"
    try:
        judge(folder, "a.jpg", encode(Image.fromarray(COLOURS), "EPS"), None, SKIP)
        if (tools / "ran").exists():
            raise SilentlyWrong("a program was run")
    finally:
        subprocess.run(["rm", "-r", str(tools)], check=True)


def stuffed_attacks() -> Iterator[Attack]:
    """Metadata that is large, broken or packed."""
    bomb = zlib.compress(bytes(100 << 20), 9)
    seen = as_floats(COLOURS)
    chunks = {
        "zTXt": chunk(b"zTXt", b"k\0\0" + bomb), "iCCP": chunk(b"iCCP", b"k\0\0" + bomb),
        "iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + bomb), "many": chunk(b"tEXt", b"k\0v") * 9000,
        "exif": chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + bytes(50)),
        "exif-loop": chunk(b"eXIf", b"II*\0\x08\0\0\0\x01\0i\x87\x04\0\x01\0\0\0\x08\0\0\0"),
        "gAMA": chunk(b"gAMA", bytes(4)), "pHYs": chunk(b"pHYs", bytes(9)),
        "acTL": chunk(b"acTL", b"\xff" * 8), "unknown": chunk(b"abCd", bytes(9)),
        "critical": chunk(b"ABCD", bytes(9)), "IHDR": chunk(b"IHDR", bytes(13)),
        "zeros": struct.pack(">I", 0xFFFFFFFF) + b"tEXt", "sRGB": chunk(b"sRGB", b"\xff"),
    }  # fmt: skip
    for kind, more in chunks.items():
        yield case(f"stuffed/{kind}", "a.png", png(COLOURS, RGB, more=more), seen, EITHER)
    jpeg = CONTROL["a.jpg"]
    for kind, marker in {
        "exif": b"\xff\xe1\xff\xffExif\0\0" + b"\xff" * 65527, "empty": b"\xff\xe1\0\2",
        "icc": b"\xff\xe2\0\x12ICC_PROFILE\0\x01\xff\0\0", "comment": b"\xff\xfe\xff\xff" +
        bytes(65533), "many": b"\xff\xee\0\x04ab" * 20_000, "adobe": b"\xff\xee\0\x0eAdobe" +
        b"\xff" * 7, "mpf": b"\xff\xe2\0\x20MPF\0II*\0\xff\xff\xff\xff" + bytes(18),
        "exif-orientation": b"\xff\xe1\0\x22Exif\0\0" + exif(6),
    }.items():  # fmt: skip
        seen_here = None if kind == "adobe" else as_floats(SMOOTH)
        yield case(f"stuffed/{kind}", "a.jpg", jpeg[:2] + marker + jpeg[2:], seen_here, EITHER,
            LOSSY)  # fmt: skip
    lies = [(273, 4, 2**32 - 1), (279, 4, 2**32 - 1), (278, 4, 0), (277, 3, 0), (258, 3, 0),
        (322, 4, 2**31), (259, 3, 7), (259, 3, 65535), (262, 3, 9), (339, 3, 99), (274, 3, 99),
        (34665, 4, 8), (34675, 4, 2**31), (330, 4, 8), (320, 3, 1), (317, 3, 3)]  # fmt: skip
    for number, kind, value in lies:
        data = tiff(GREYS, more=[(number, kind, value)])
        yield case(f"stuffed/tag-{number}-{value}", "a.tif", data, None, EITHER)
    yield case("stuffed/after", "a.png", CONTROL["a.png"] + bytes(1 << 20), seen, EITHER)


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "a.jpg")
    judge(folder, "a.jpg", None, None, SKIP)


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a.jpg")
        judge(folder, "a.jpg", None, None, SKIP)


def _link(folder: Path, target: str) -> None:
    (folder / "a.jpg").symlink_to(target)
    judge(folder, "a.jpg", None, None, SKIP)


def _good_link(folder: Path) -> None:
    other = folder / "elsewhere.bin"
    other.write_bytes(CONTROL["a.png"])
    (folder / "a.jpg").symlink_to(other)
    judge(folder, "a.jpg", None, as_floats(COLOURS), READ)


def _named(folder: Path, name: bytes) -> None:
    (folder / os.fsdecode(name)).write_bytes(CONTROL["a.png"])
    judge(folder, os.fsdecode(name), None, as_floats(COLOURS), READ)


def _class_links(folder: Path) -> None:
    """Class folders that are links are scored like others."""
    (folder / "real").mkdir()
    (folder / "data" / "bee").mkdir(parents=True)
    (folder / "real" / "1.png").write_bytes(CLEAN_PNG)
    (folder / "data" / "bee" / "2.png").write_bytes(CONTROL["a.png"])
    (folder / "data" / "ant").symlink_to(folder / "real")
    pixels, _ = read_folder(folder / "data")
    if set(pixels) != {"ant/1.png", "bee/2.png"}:
        raise Lost(f"only {sorted(pixels)} are scored")
    compare("ant/1.png", pixels["ant/1.png"], as_floats(COLOURS[::-1]), 0.6 / 255)


def _loops(folder: Path) -> None:
    """A folder that links to itself and to those above it is read once."""
    (folder / "ant").mkdir()
    (folder / "ant" / "1.png").write_bytes(CLEAN_PNG)
    for name in ("again", "ant/up", "ant/self"):
        (folder / name).symlink_to(folder)
    pixels, _ = read_folder(folder)
    if set(pixels) != {"ant/1.png"}:
        raise SilentlyWrong(f"{len(pixels)} images of one")


def _many_links(folder: Path) -> None:
    """Folders in which each has two links to the next have 2 to the 24 paths."""
    for depth in range(24):
        (folder / f"d{depth}").mkdir()
        for name in "ab":
            (folder / f"d{depth}" / name).symlink_to(folder / f"d{depth + 1}")
    (folder / "d24").mkdir()
    (folder / "d24" / "1.png").write_bytes(CLEAN_PNG)
    read_folder(folder / "d0")


def _image_alone(folder: Path, make: Callable[[Path], object]) -> None:
    """A path that is no file at all, where the only image is wanted."""
    make(folder / "a.png")
    read_folder(folder / "a.png")
    raise SilentlyWrong("it was read")


FILE_ATTACKS: dict[str, Callable[[Path], object]] = {
    "fifo": _fifo, "socket": _socket, "good-link": _good_link, "class-links": _class_links,
    "loops": _loops, "many-links": _many_links,
    **{f"link-{to.replace('/', '_')}": partial(_link, target=to) for to in
        ("/dev/zero", "/dev/null", "/dev/tty", "/dev/urandom", "nowhere", "a.jpg", "/proc/self/mem",
         "/proc/self/environ", "/etc/passwd", "/proc/kmsg", "/dev/stdin")},
    **{f"name-{number}": partial(_named, name=name) for number, name in enumerate(
        (b"new\nline.png", b"\xff\xfe.png", b"a" * 250 + b".png", b"\x1b[31mred.png", b"-x.png",
         "\N{SNOWMAN}\N{RIGHT-TO-LEFT OVERRIDE}.PNG".encode(), b" .png", b"a: b.png", b"%s{}.png",
         b"a.png.jpg", b"..png.png"[1:].replace(b".", b"x", 1)))},
    "alone-fifo": partial(_image_alone, make=os.mkfifo),
    "alone-zero": partial(_image_alone, make=lambda path: path.symlink_to("/dev/zero")),
    "alone-empty": partial(_image_alone, make=lambda path: path.touch()),
}  # fmt: skip


def _measure(folder: Path, spoil: Callable[[Path], object]) -> None:
    """`measure` on a hostile folder gives what it gives on the sound images alone."""
    scenes = digits.scenes("test", 4)
    data = folder / "data"
    for number, (image, label) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
        file = data / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image, RGB))
    slimmed = patchslim.slim(digits.host(), "evit", keep=0.5)
    spoilt = data / str(scenes.labels[0])
    spoil(spoilt)
    (folder / "classes").write_text("\n".join(map(str, range(10))) + "\n")
    images = patchslim.Images.for_host(slimmed, data, classes=folder / "classes")
    report = patchslim.measure(slimmed, images, repeats=0)
    files = sorted(data.glob("*/[0-9]*.png"))
    chosen = [int(file.stem) for file in files]
    wanted = [(digits.normalise(scenes.images[chosen]), torch.as_tensor(scenes.labels[chosen]))]
    known = patchslim.measure(slimmed, wanted, repeats=0)
    for one, other in zip(report.rows, known.rows, strict=True):
        if one.accuracy is None or one.accuracy != other.accuracy:
            raise SilentlyWrong(f"accuracy {one.accuracy} instead of {other.accuracy}")
    if len(images.unreadable) != 1:
        raise Lost(f"of one hostile file these are named: {images.unreadable}")


def _spoil(folder: Path, file: str, data: Callable[[], bytes]) -> None:
    (folder / file).write_bytes(data())


MEASURED: dict[str, Callable[[Path], object]] = {
    kind: partial(_measure, spoil=spoil)
    for kind, spoil in {
        "narrow": partial(_spoil, file="x.png", data=partial(zeros_png, 1, 1_000_000)),
        "huge": partial(_spoil, file="x.png", data=partial(zeros_png, 13_000, 13_400)),
        "fifo": lambda folder: os.mkfifo(folder / "x.jpg"),
        "zero": lambda folder: (folder / "x.jpg").symlink_to("/dev/zero"),
        "text": partial(_spoil, file="x.jpg", data=lambda: b"text"),
        "nan": partial(_spoil, file="x.tif", data=lambda: tiff(np.full((9, 9), np.nan, "f4"))),
        "cut": partial(_spoil, file="x.jpg", data=lambda: CONTROL["a.jpg"][:300]),
        "sparse": lambda folder: ((folder / "x.png").touch(),
            os.truncate(folder / "x.png", 1 << 42)),
    }.items()
}  # fmt: skip
