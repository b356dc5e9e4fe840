"""Attacks on the folders of runs: checkpoints and logs that were damaged, forged or exchanged."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import patchslim
from attacks import _saved_models as models
from attacks._mutations import DELETED, get_value, list_paths, replaced
from attacks.attack import SilentlyWrong
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.runs import checkpoint
from patchslim.training.config import TrainConfig

CHECKPOINT = "checkpoint.pt"
LOG = "log.csv"
RUNS = ("training", "calibration")


def run_attacks() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for kind in RUNS:
        data = (models.REFERENCE / kind / CHECKPOINT).read_bytes()
        for name, spoiled in spoiled_checkpoints(data):
            yield f"{kind} goes on from {name}", partial(go_on, kind, CHECKPOINT, spoiled)
        state = checkpoint.read(models.REFERENCE / kind / CHECKPOINT)
        for name, forged in forged_states(state):
            yield f"{kind} goes on from a forged {name}", partial(go_on_forged, kind, forged)
        other = RUNS[1 - RUNS.index(kind)]
        data = (models.REFERENCE / other / CHECKPOINT).read_bytes()
        yield f"{kind} goes on from {other}", partial(go_on, kind, CHECKPOINT, data)
        yield f"{kind} goes on from a pipe", partial(go_on_pipe, kind)
    for name, text in {
        "nothing": b"",
        "no log": b"a,b\n1,2\n",
        "bytes": bytes(range(256)) * 40,
        "a step of 10,000 digits": b"9" * 10_000,
        "80 MB": b"1,1\n" * 20_000_000,
        "one long line": b"1," * 4_000_000,
    }.items():
        yield f"a log of {name}", partial(go_on, "training", LOG, text)


def spoiled_checkpoints(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that are no checkpoints any more."""
    size = len(data)
    for part in range(8):
        cut = size * part // 8
        yield f"a checkpoint cut at {cut}", data[:cut]
        yield f"a bit changed at {cut}", data[:cut] + bytes([data[cut] ^ 4]) + data[cut + 1 :]
    yield "a checkpoint less its last byte", data[:-1]
    yield "a checkpoint and a byte", data + b"\n"
    yield "two checkpoints", data + data
    yield "a pickle", pickle.dumps({"step": 1})
    yield "a sealed pickle that runs code", seal(bomb())
    yield "a sealed list", seal(pickled([1, 2]))
    yield "a sealed nothing", seal(b"")
    yield "a sealed text", seal(b"hello")
    yield "a sealed recursion", seal(recursive())
    yield "a sealed archive that grows", seal(growing())
    yield "a newer format", data.replace(b"checkpoint 0001", b"checkpoint 0009")


class Bomb:
    """Runs code where it is unpickled without care."""

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(Path.cwd() / models.MARKER),))


def bomb() -> bytes:
    return pickled({"run": {}, "calibration": {}, "step": 1, "bomb": Bomb()})


def pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def recursive() -> bytes:
    """A pickle of lists in lists, deeper than any stack."""
    return b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."


def growing() -> bytes:
    """A file of torch's whose members are compressed, a thousandfold."""
    plain = io.BytesIO(pickled({"run": {}, "calibration": {}, "x": torch.zeros(25_000_000)}))
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(plain) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return stream.getvalue()


def seal(data: bytes) -> bytes:
    """The bytes with the line that `checkpoint.write` puts behind them."""
    digest = hashlib.sha256(data).hexdigest()
    return data + f"\npatchslim checkpoint 0001 {digest}\n".encode()


def forged_states(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """States of a run with one entry that is missing or is something else."""
    known: set[str] = set()
    for path in list_paths(state):
        # Of weights and layers that are alike, the first stands for all.
        kind = "tensor" if isinstance(get_value(state, path), torch.Tensor) else str(path[-1])
        pattern = re.sub(r"\d+", "0", f"{'.'.join(map(str, path[:-1]))} {kind}")
        if pattern in known or len(path) > 6:
            continue
        known.add(pattern)
        now = get_value(state, path)
        changes = (("nothing", None), ("text", "x"), ("number", -7), ("gone", DELETED))
        name, value = changes[len(known) % 4]  # each place gets one of them
        if now is not value:
            yield f"{'.'.join(map(str, path))} {name}", replaced(state, path, value)
        if isinstance(now, torch.Tensor) and now.is_floating_point() and now.numel():
            nan = torch.full_like(now, torch.nan)
            yield f"{'.'.join(map(str, path))} NaN", replaced(state, path, nan)


def go_on(kind: str, file: str, data: bytes, folder: Path) -> None:
    path = models.copied(models.REFERENCE / kind, folder)
    (path / file).write_bytes(data)
    resume(kind, path)


def go_on_forged(kind: str, state: dict[str, Any], folder: Path) -> None:
    path = models.copied(models.REFERENCE / kind, folder)
    checkpoint.write(path / CHECKPOINT, state)
    model = train(path) if kind == "training" else calibrate(path)
    with torch.inference_mode():
        if not model(draw_images(4)).isfinite().all():
            raise SilentlyWrong("a forged run was gone on with, and answers with no numbers")


def go_on_pipe(kind: str, folder: Path) -> None:
    path = models.copied(models.REFERENCE / kind, folder)
    (path / CHECKPOINT).unlink()
    os.mkfifo(path / CHECKPOINT)
    resume(kind, path)


def resume(kind: str, path: Path) -> None:
    """Goes on to the end; what was accepted gives the logits of a run that was never stopped."""
    model = train(path) if kind == "training" else calibrate(path)
    with torch.inference_mode():
        got = model.double()(draw_images(4).double())
    wanted = load_file(models.REFERENCE / "logits.safetensors")[kind]
    if not torch.allclose(got, wanted, rtol=0, atol=1e-3):
        raise SilentlyWrong("a run went on from a damaged checkpoint, and its answers are others")


def draw_images(count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=generator).half().float()


@functools.cache
def labelled() -> list[Any]:
    return [(draw_images(8, seed=3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))]


def train(path: Path) -> patchslim.SlimModel:
    config = TrainConfig(steps=4, batch=4, lr=1e-3, checkpoint=1, validate=2, workers=0)
    return patchslim.train(
        patchslim.load(models.old("dynamicvit")),
        labelled(),
        config,
        out=path,
        validation=labelled(),
        resume=True,
    ).model


def calibrate(path: Path) -> patchslim.SlimModel:
    config = PatchSlimmingConfig(images=8, probe=4, batch=4, lr=1e-3, epochs=1, step=4)
    return patchslim.calibrate(
        patchslim.load(models.old("tome")).host,
        labelled(),
        "patch_slimming_dynamic",
        tolerance=0.05,
        config=config,
        out=path,
        resume=True,
    ).model
