"""Judges what patchslim makes of an archive in which four sound images lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from attacks.attack import Lost, SilentlyWrong
from image_files import RGB, png
from patchslim.errors import BadData
from picture_judge import EXACT, SIDE, as_floats, check_reason, compare, read_folder, watch_memory

Make = Callable[[Path], object]
Run = Callable[[Path], object]
Runs = Iterator[tuple[str, Run]]
PIXELS = [np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3)) for seed in range(4)]
PNGS = [png(pixels, RGB) for pixels in PIXELS]
NAMES = ["ant/0.png", "ant/1.png", "bee/2.png", "cat/3.png"]
SOUND = dict(zip(NAMES, PNGS, strict=True))


def check(
    folder: Path,
    file: str,
    make: Make,
    *,
    refuse: bool | None = False,
    bad: int | None = 0,
    others: dict[str, bytes] | None = None,
    **settings: Any,
) -> None:
    """Reads an archive in which the four sound images lie beside `bad` members that are named.

    `refuse` says whether it is to be refused; None leaves that open. With `bad` None any number of
    members may be named, and sound ones may be among them. `others` are further right answers.
    """
    path = folder / "inside" / file
    path.parent.mkdir()
    made = make(path)
    if isinstance(made, bytes):
        path.write_bytes(made)
    with watch_memory(file):
        try:
            pixels, reasons = read_folder(path, **settings)
        except BadData as error:
            check_reason(file, str(error))
            if refuse is False:
                raise Lost(f"sound images are refused: {error}") from error
            raise
    if refuse:
        raise SilentlyWrong(f"it was read: {sorted(pixels)[:9]}")
    right = {**SOUND, **(others or {})}
    for name, got in pixels.items():
        known = right.get(name)
        if known is None:
            raise SilentlyWrong(f"{name} is no image that was put into it")
        compare(name, got, as_floats(PIXELS[PNGS.index(known)]), EXACT)
    for name, reason in reasons.items():
        check_reason(name, reason)
    if bad is not None and (len(reasons) != bad or not pixels.keys() >= SOUND.keys()):
        raise Lost(f"read {sorted(pixels)}, named {reasons}")
    if sorted(folder.iterdir()) != [path.parent] or sorted(path.parent.iterdir()) != [path]:
        raise SilentlyWrong("something was written")


def made(file: str, data: bytes | Make, **more: Any) -> Run:
    """An attack by an archive of these bytes, or by one that is made when it is needed."""
    return partial(check, file=file, make=data if callable(data) else lambda _: data, **more)


SPECIAL: dict[str, Make] = {
    "fifo": os.mkfifo,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "tty": lambda path: path.symlink_to("/dev/null"),
    "broken": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "sparse": lambda path: (path.touch(), os.truncate(path, 1 << 42))[1],
}
