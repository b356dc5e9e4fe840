"""Zips that are sound, hostile or damaged, each with what must become of it."""

from __future__ import annotations

import gzip
import io
import struct
import warnings
import zipfile
import zlib

import numpy as np

from archive_judge import NAMES, PNGS, SOUND, SPECIAL, Runs, made

GIGA = 1 << 30


def zips() -> Runs:
    yield from zip_methods()
    yield from zip_names()
    yield from zip_bombs()
    yield from zip_fields()
    yield from damaged_zips()
    yield from other_zips()
    for suffix in (".zip", ".tar", ".tar.gz", ".png"):
        for kind, make in SPECIAL.items():
            yield f"special/{kind}{suffix}", made(f"a{suffix}", make, refuse=True)


def make_zip(
    members: dict[str, bytes] | None = None, method: int = 0, again: int = 0, **more: bytes
) -> bytes:
    """A zip of the sound images and more, some of them `again` and again."""
    found = [*SOUND.items(), *(members or {}).items(), *more.items()]
    return zip_of([*found, *((NAMES[0], PNGS[turn % 2]) for turn in range(again))], method)


def zip_of(members: list[tuple[str, bytes]], method: int = 0) -> bytes:
    """A zip of nothing but these."""
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return stream.getvalue()


def patch_zip(data: bytes, name: str, **fields: int) -> bytes:
    """Changes fields of a member in both of its headers."""
    places = {"flags": (6, 8, "H"), "method": (8, 10, "H"), "crc": (14, 16, "I"),
        "packed": (18, 20, "I"), "size": (22, 24, "I"), "mode": (None, 38, "I"),
        "at": (None, 42, "I"), "system": (None, 5, "B")}  # fmt: skip
    local = data.rindex(name.encode(), 0, data.index(b"PK\x01\x02")) - 30
    central = data.rindex(name.encode()) - 46
    changed = bytearray(data)
    for field, value in fields.items():
        near, far, kind = places[field]
        if near is not None:
            struct.pack_into("<" + kind, changed, local + near, value)
        struct.pack_into("<" + kind, changed, central + far, value)
    return bytes(changed)


def packed_zeros(size: int) -> bytes:
    """So many zeros (whole megabytes) as deflate packs them, made in no time."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * (size >> 20) + packer.flush()


def zip_methods() -> Runs:
    for method in (0, 8):
        yield f"zip/sound-{method}", made("a.zip", make_zip(method=method))
    for method in (12, 14):
        whole = make_zip(method=method)
        yield f"zip/method-{method}-all", made("a.zip", whole, refuse=None, bad=None)
    one = make_zip({"x.png": PNGS[0]})
    for method in (1, 6, 9, 10, 12, 14, 19, 20, 93, 95, 97, 98, 99, 65535):
        yield f"zip/method-{method}", made("a.zip", patch_zip(one, "x.png", method=method), bad=1)


def zip_names() -> Runs:
    for again in (1, 2, 3, 50):
        last = {NAMES[0]: PNGS[(again - 1) % 2]}
        yield f"zip/twice-{again}", made("a.zip", make_zip(again=again), others=last)
    for other in ("./ant/0.png", "ant//0.png", "ant/./0.png"):
        same = make_zip({other: PNGS[0]})
        yield f"zip/spelled-{other.replace('/', '_')}", made("a.zip", same)
    for other in ("../up.png", "../../../tmp/up.png", "/tmp/root.png", "C:\\up.png",
                  "ant/../../x.png", "bee/../ant/0.png"):  # fmt: skip
        data = make_zip({other: PNGS[0]})
        yield f"zip/escape-{other.replace('/', '_')}", made("a.zip", data, bad=1)
    windows = patch_zip(make_zip({"dog\\4.png": PNGS[0]}), "dog\\4.png", system=0)
    yield "zip/windows", made("a.zip", windows, others={"dog/4.png": PNGS[0]})
    for kind, name in {"newline": "a\nb.png", "escape-code": "\x1b[2J.png", "dots": "x...png",
                       "long": "x" * 9000 + ".png", "utf8": "\N{SNOWMAN}.png"}.items():  # fmt: skip
        name = f"ant/{name}"
        yield f"zip/name-{kind}", made("a.zip", make_zip({name: PNGS[0]}), others={name: PNGS[0]})


def zip_bombs() -> Runs:
    big = make_zip({"x.png": bytes(1 << 20)}, 8)
    for size in (0xFFFFFFF0, 300 << 20):
        lie = patch_zip(big, "x.png", size=size)
        yield f"zip/says-{size}", made("a.zip", lie, refuse=None, bad=1)
    zeros = packed_zeros(GIGA)
    honest = patch_zip(make_zip({"x.png": zeros}), "x.png", method=8, size=GIGA)
    yield "zip/bomb", made("a.zip", honest, refuse=None, bad=1)
    yield "zip/says-little", made("a.zip", patch_zip(honest, "x.png", size=100), bad=1)
    many = make_zip({f"x{number}.png": packed_zeros(60 << 20) for number in range(12)})
    for number in range(12):
        many = patch_zip(many, f"x{number}.png", method=8, size=60 << 20)
    yield "zip/many-bombs", made("a.zip", many, refuse=True)
    yield "zip/overlapping", made("a.zip", overlapping_zip(3_000), refuse=True)
    empty = make_zip({f"{number}.png": b"" for number in range(2_000)})
    yield "zip/empty-members", made("a.zip", empty, bad=2_000)


def overlapping_zip(count: int) -> bytes:
    """Many members that are the same packed bytes, so that a small file holds much."""
    data = make_zip({"x.png": bytes(8 << 20)}, 8)
    start, end = data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    last = data[data.rindex(b"PK\x01\x02", 0, end) :]
    before, after = last[:28] + struct.pack("<H", 9), last[30:46]
    copies = b"".join(before + after + f"{number:05}.png".encode() for number in range(count))
    directory = data[start:end] + copies
    total = len(SOUND) + 1 + count
    fields = (0, 0, total, total, len(directory), start, 0)
    return data[:start] + directory + struct.pack("<4sHHHHIIH", b"PK\x05\x06", *fields)


def zip_fields() -> Runs:
    data = make_zip({"x.png": PNGS[0]})
    for kind, fields in {
        "encrypted": {"flags": 1}, "strongly": {"flags": 0x41}, "patched": {"flags": 0x20},
        "crc": {"crc": 7}, "short": {"size": 50, "packed": 50}, "elsewhere": {"at": 5},
        "fifo": {"mode": 0o010644 << 16}, "device": {"mode": 0o020644 << 16},
    }.items():  # fmt: skip
        yield f"zip/{kind}", made("a.zip", patch_zip(data, "x.png", **fields), bad=1)
    yield "zip/far", made("a.zip", patch_zip(data, "x.png", at=2**31), refuse=None, bad=1)
    link = patch_zip(make_zip({"x.png": b"/etc/passwd"}), "x.png", mode=0o120777 << 16)
    yield "zip/link", made("a.zip", link, bad=1)


def damaged_zips() -> Runs:
    whole = make_zip(method=8)
    for part in range(1, 12):
        yield f"zip/cut-{part}", made("a.zip", whole[: len(whole) * part // 12], refuse=True)
    rng = np.random.default_rng(31)
    start = whole.index(b"PK\x01\x02")
    for number in range(24):
        flipped = bytearray(whole)
        for place in rng.integers(start if number % 2 else 0, len(whole), 1 + number % 3):
            flipped[place] ^= 1 << int(rng.integers(8))
        yield f"zip/flip-{number}", made("a.zip", bytes(flipped), refuse=None, bad=None)


def other_zips() -> Runs:
    whole = make_zip(method=8)
    yield "zip/before", made("a.zip", b"#!/bin/sh\n" * 50 + whole)
    lies = whole[:-2] + struct.pack("<H", 9) + b"PK\x05\x06 lies"
    yield "zip/comment", made("a.zip", lies, refuse=None)
    yield "zip/nested", made("a.zip", make_zip({"inner.zip": whole}))
    yield "zip/only-nested", made("a.zip", zip_of([("inner.zip", whole)]), refuse=True)
    yield "zip/empty", made("a.zip", zip_of([]), refuse=True)
    end = b"PK\x05\x06"
    others = {"text": b"hello", "none": b"", "end": end + bytes(18), "lies": end + b"\xff" * 18}
    for kind, data in {**others, "gzip": gzip.compress(b"x")}.items():
        yield f"zip/no-zip-{kind}", made("a.zip", data, refuse=True)
