"""Tars that are sound, hostile or damaged, packed or not, each with what must become of it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from archive_judge import NAMES, PNGS, SOUND, Runs, made
from hostile_zips import make_zip
from patchslim.data.limits import Limits

Members = Sequence[tuple[tarfile.TarInfo, bytes]]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
SPARSE_SIZES, SPARSE_REAL_SIZE, CHECKSUM = slice(386, 410), slice(483, 495), slice(148, 156)


def tars() -> Runs:
    yield from packed_tars()
    yield from tar_names()
    yield from tar_types()
    yield from tar_sizes()
    yield from tar_headers()
    yield from damaged_tars()


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: Any) -> Any:
    """A member of a tar and its data."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    for field, value in more.items():
        setattr(info, field, value)
    return info, data


def tar_of(members: Members, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of exactly these, byte by byte: sizes may be lies."""
    parts = [info.tobuf(form) + data + bytes(-len(data) % 512) for info, data in members]
    return b"".join(parts) + bytes(1024)


def make_tar(members: Members = (), form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of the sound images and others."""
    return tar_of([*(member(name, data) for name, data in SOUND.items()), *members], form)


def both(kind: str, data: bytes, **more: Any) -> Runs:
    """The tar as it is, and packed."""
    for suffix in ("", ".gz"):
        yield f"tar{suffix}/{kind}", made(f"a.tar{suffix}", PACKERS[suffix](data), **more)


def packed_tars() -> Runs:
    long = "ant/" + "x" * 150 + ".png"
    for suffix, pack in PACKERS.items():
        for name, form in (("ustar", 0), ("gnu", 1), ("pax", 2)):
            more = [member(long, PNGS[0])] if form else []
            data = pack(make_tar(more, form))
            run = made(f"a.tar{suffix}", data, others={long: PNGS[0]})
            yield f"tar{suffix}/sound-{name}", run
        whole = pack(make_tar())
        other = "a.tar.gz" if suffix != ".gz" else "a.tar"
        yield f"tar{suffix}/misnamed", made(other, whole)
        for part in range(1, 9):
            cut = whole[: len(whole) * part // 9]
            yield f"tar{suffix}/cut-{part}", made(f"a.tar{suffix}", cut, refuse=True)
    yield "tar/zstd", made("a.tar", b"\x28\xb5\x2f\xfd" + bytes(99), refuse=True)


def tar_names() -> Runs:
    for turn in (1, 3):
        copies = [member(NAMES[0], PNGS[number % 2]) for number in range(turn)]
        yield from both(f"twice-{turn}", make_tar(copies), others={NAMES[0]: PNGS[0]})
    for other in ("./ant/0.png", "ant//0.png", "ant/./0.png"):
        yield from both(f"spelled-{other.replace('/', '_')}", make_tar([member(other, PNGS[0])]))
    for other in ("../up.png", "/tmp/root.png", "ant/../../../x.png", "bee/../ant/0.png"):
        data = make_tar([member(other, PNGS[0])])
        yield from both(f"escape-{other.replace('/', '_')}", data, bad=1)


def tar_types() -> Runs:
    """Links, pipes and devices are named; a hard link is the file that it is."""
    link = member("dog/4.png", kind=tarfile.LNKTYPE, linkname=NAMES[1])
    yield from both("hard-link", make_tar([link]), others={"dog/4.png": PNGS[1]})
    for name, target in {"up": "../0.png", "out": "/etc/passwd", "self": "dog/4.png",
                         "none": ""}.items():  # fmt: skip
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            data = make_tar([member("dog/4.png", kind=kind, linkname=target)])
            yield from both(f"link-{kind.decode()}-{name}", data, bad=1)
    for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE, b"Z"):
        data = make_tar([member("dog/4.png", kind=kind)])
        yield from both(f"type-{kind.decode()}", data, bad=1)
    yield from both("directory", make_tar([member("dog/4.png", kind=tarfile.DIRTYPE)]))
    yield from both("nested", make_tar([member("inner.tar", make_tar())]))


def sparse_header(size: int) -> bytes:
    """A member of GNU's sparse kind, which is `size` zeros that are not in the archive."""
    header = bytearray(tarfile.TarInfo("x.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[SPARSE_SIZES] = b"00000000000\0" * 2
    header[SPARSE_REAL_SIZE] = f"{size:011o}\0".encode()
    header[CHECKSUM] = b" " * 8
    header[CHECKSUM] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def tar_sizes() -> Runs:
    """Members that are, or say that they are, larger than memory."""
    body = make_tar()[:-1024]
    yield from both("sparse", body + sparse_header(1 << 32) + bytes(1024), bad=1)
    for size in (1 << 20, 300 << 20, 1 << 40, 2**62, 2**64):
        lie = body + member("x.png", size=size)[0].tobuf(tarfile.GNU_FORMAT) + bytes(1024)
        yield from both(f"says-{size}", lie, refuse=True)
    big = body + member("x.png", size=2 << 30)[0].tobuf(tarfile.GNU_FORMAT)
    yield "tar.gz/bomb", made("a.tar.gz", partial(gzip_of, start=big, zeros=2 << 30), refuse=True)
    many, few = partial(many_members, count=30_000), Limits(members=10_000)
    yield "tar.gz/many", made("a.tar.gz", many, refuse=True, limits=few)
    on_disk = partial(long_file, start=big)
    yield "tar/large-member", made("a.tar", on_disk, bad=1)


def tar_headers() -> Runs:
    """Names and extended headers that are longer than memory, or hold nonsense."""
    body = make_tar()[:-1024]
    for kind in (b"L", b"K", b"x", b"g"):
        start = body + member("x.png", kind=kind, size=2 << 30)[0].tobuf(tarfile.GNU_FORMAT)
        on_disk, packed = partial(long_file, start=start), partial(gzip_of, start=start)
        yield f"tar/long-{kind.decode()}", made("a.tar", on_disk, refuse=True)
        yield f"tar.gz/long-{kind.decode()}", made("a.tar.gz", packed, refuse=True)
    for key, value in {"size": "99999999999", "path": "../../x.png", "GNU.sparse.major": "1",
                       "GNU.sparse.realsize": "9" * 30, "mtime": "nan", "hdrcharset": "BINARY",
                       "linkpath": "x" * 5000, "GNU.sparse.map": "0,0,1,-1"}.items():  # fmt: skip
        other = [member("x.png", PNGS[0], pax_headers={key: value})]
        data = body + tar_of(other, tarfile.PAX_FORMAT)
        run = made("a.tar", data, refuse=None, bad=None, others={"x.png": PNGS[0]})
        yield f"tar/pax-{key}", run


def damaged_tars() -> Runs:
    rng = np.random.default_rng(32)
    whole = make_tar()
    for number in range(16):
        flipped = bytearray(whole)
        for place in rng.integers(0, 512, 1 + number % 3):  # in a header, which knows its sum
            flipped[place] ^= 1 << int(rng.integers(8))
        yield f"tar/flip-{number}", made("a.tar", bytes(flipped), refuse=True)
    for kind, data in {"none": b"", "zeros": bytes(10240), "text": b"hello" * 999,
                       "zip": make_zip(), "block": b"x" * 512}.items():  # fmt: skip
        yield f"tar/no-tar-{kind}", made("a.tar", data, refuse=True)


def long_file(path: Path, start: bytes) -> None:
    """A file that goes on with gigabytes of zeros, of which none lie on the disk."""
    path.write_bytes(start)
    os.truncate(path, len(start) + (3 << 30))


def gzip_of(path: Path, start: bytes, zeros: int = 1 << 30) -> None:
    """A small gzip of very many zeros."""
    part = gzip.compress(bytes(64 << 20), 6)
    path.write_bytes(gzip.compress(start) + part * (zeros // (64 << 20) + 1))


def many_members(path: Path, count: int) -> None:
    """A small gzip of very many empty members."""
    ten = b"".join(member(f"{i}.png")[0].tobuf(tarfile.USTAR_FORMAT) for i in range(10))
    path.write_bytes(gzip.compress(make_tar()[:-1024]) + gzip.compress(ten * (count // 10), 1))
