"""Files of weights: wrong headers, offsets, types, values and sizes, and pickles that do harm."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

import patchslim
from attacks import _run_folders as runs
from attacks import _saved_models as models
from attacks.attack import Attack, SilentlyWrong
from patchslim.hosts._catalog import load_weights
from patchslim.hosts._weights import read_weights
from patchslim.saving.folder import RECIPE_FILE, WEIGHTS_FILE
from patchslim.saving.seal import seal_recipe

Header = dict[str, Any]


def attacks() -> Iterator[Attack]:
    for name, run in list_all():
        yield Attack(name, models.forbid_code(run))


def list_all() -> Iterator[tuple[str, Callable[[Path], object]]]:
    source = models.saved("tome") / WEIGHTS_FILE
    data = source.read_bytes()
    for name, made in {**spoiled_files(data), **spoiled_headers(data)}.items():
        yield f"given: {name}", partial(give, "w.safetensors", made)
        yield f"saved: {name}", partial(load_saved, made, True)
        yield f"saved without a new digest: {name}", partial(load_saved, made, False)
    state = {name.removeprefix("host."): t for name, t in load_file(source).items()}
    for name, changed in spoiled_states(state):
        yield f"given: {name}", partial(give, "w.safetensors", save(changed))
        yield f"given as torch's: {name}", partial(give, "w.pth", runs.pickled(changed))
        prefixed = {f"host.{key}": t for key, t in changed.items()}
        yield f"saved: {name}", partial(load_saved, save(prefixed), True)
    for name, made in spoiled_pickles(state).items():
        yield f"given as torch's: {name}", partial(give, "w.pth", made)
    for name, dtype in (
        ("half", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("double", torch.float64),
    ):
        changed = {key: t.to(dtype) for key, t in state.items()}
        yield f"given in {name}", partial(give_rounded, save(changed))
    yield "tied weights", tie_weights
    yield "tied weights, trained on", tie_and_train


# --- what may be wrong in a safetensors file


def split(data: bytes) -> tuple[Header, bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Header | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def spoiled_files(data: bytes) -> dict[str, bytes]:
    header, body = split(data)
    text = json.dumps(header).encode()
    first = next(name for name in header if name != "__metadata__")
    twice = text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}".encode() + b"}"
    return {
        "nothing": b"",
        "seven bytes": data[:7],
        "a header of no bytes": struct.pack("<Q", 0) + body,
        "a header of 2**63 bytes": struct.pack("<Q", 1 << 63) + data[8:],
        "a header of 100 MB": struct.pack("<Q", 100_000_000) + data[8:],
        "a header longer than the file": struct.pack("<Q", len(data)) + data[8:],
        "a header cut short": struct.pack("<Q", len(text) // 2) + text + body,
        "a header that is a list": join(b"[]", body),
        "a header that is deep": join(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, body),
        "a header with a name twice": join(twice, body),
        "a header with NaN": join(b'{"a": NaN}', body),
        "a header in latin letters": join('{"é": 1}'.encode("latin-1"), body),
        "an empty header": join({}, b""),
        "metadata alone": join({"__metadata__": {"format": "pt"}}, b""),
        "half of it": data[: len(data) // 2],
        "a byte less": data[:-1],
        "a byte more": data + b"\0",
        "a megabyte more": data + bytes(1 << 20),
        "zeros": bytes(len(data)),
        "an archive": b"PK\x03\x04" + data,
        "a pickle": pickle.dumps({"a": 1}),
        "a pickle that runs code": pickle.dumps(runs.Bomb()),
    }  # fmt: skip


def spoiled_headers(data: bytes) -> dict[str, bytes]:
    header, body = split(data)
    names = [name for name in header if name != "__metadata__"]
    one, two = names[0], names[1]

    def with_entry(name: str, **changes: Any) -> bytes:
        return join({**header, name: {**header[name], **changes}}, body)

    start, stop = header[one]["data_offsets"]
    wide = {name: {**header[name]} for name in names}
    wide[one] = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    return {
        "two tensors in one place": with_entry(two, data_offsets=header[one]["data_offsets"]),
        "offsets that run back": with_entry(one, data_offsets=[stop, start]),
        "offsets below zero": with_entry(one, data_offsets=[-4, stop - 4]),
        "offsets beyond the end": with_entry(one, data_offsets=[len(body), len(body) + stop]),
        "offsets that are text": with_entry(one, data_offsets=["0", "4"]),
        "three offsets": with_entry(one, data_offsets=[start, stop, stop]),
        "offsets of 2**64": with_entry(one, data_offsets=[1 << 64, (1 << 64) + 4]),
        "a shape below zero": with_entry(one, shape=[-1, -1]),
        "a shape of 2**40": with_entry(one, shape=[1 << 40]),
        "a shape that overflows": with_entry(one, shape=[1 << 33, 1 << 33]),
        "a shape of 10,000 ones": with_entry(one, shape=[1] * 10_000),
        "a shape that is text": with_entry(one, shape="3"),
        "no shape": join({**header, one: {"dtype": "F32", "data_offsets": [start, stop]}}, body),
        "an unknown type": with_entry(one, dtype="F7"),
        "a type that is a number": with_entry(one, dtype=7),
        "whole numbers": with_entry(one, dtype="I32"),
        "half the width": with_entry(one, dtype="F16"),
        "a hole": join({name: header[name] for name in names[1:]}, body),
        "a terabyte": join(wide, body),
        "another name": join({("x" if n == one else n): header[n] for n in names}, body),
        "a name of 10 MB": join({**header, "x" * 10_000_000: header[one]}, body),
        "metadata that is a list": join({**header, "__metadata__": [1]}, body),
        "an entry more": join(
            {**header, "x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, body
        ),
        "a tensor that is a list": join({**header, one: [1]}, body),
    }  # fmt: skip


def spoiled_states(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """States with one tensor that no host can have learned."""
    name = "blocks.0.norm1.weight"
    t = state[name]
    for dtype in ("int8", "uint8", "int16", "int32", "int64", "bool", "complex64", "float8_e4m3fn"):
        yield f"{name} in {dtype}", {**state, name: t.to(getattr(torch, dtype))}
        yield (
            f"all in {dtype}",
            {key: each.to(getattr(torch, dtype)) for key, each in state.items()},
        )
    for value in (torch.nan, torch.inf, -torch.inf):
        spoiled = t.clone()
        spoiled[-1] = value
        yield f"{name} with {value}", {**state, name: spoiled}
    yield f"{name} too large for float32", {**state, name: t.double() + 1e300}
    yield f"{name} longer", {**state, name: torch.cat([t, t])}
    yield f"{name} of no entries", {**state, name: t[:0]}
    yield f"{name} a scalar", {**state, name: t[0]}
    yield f"{name} in a row of its own", {**state, name: t[None]}
    yield f"{name} missing", {key: each for key, each in state.items() if key != name}
    yield "one more", {**state, "blocks.9.norm1.weight": t.clone()}
    yield "a name that is a path", {**state, "../../x": t.clone()}
    yield "none", {"x": t.clone()}


def spoiled_pickles(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    plain = runs.pickled(state)
    legacy = io.BytesIO()
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    far = pickle.dumps({"x": 1}).replace(b"x", b"y")
    meta = {**state, "norm.weight": torch.empty(16, device="meta")}
    sparse = {**state, "norm.weight": torch.ones(16).to_sparse()}
    expanded = {**state, "norm.weight": torch.ones(1).expand(1 << 40)}
    return {
        "code": runs.bomb(),
        "code among weights": runs.pickled({**state, "x": runs.Bomb()}),
        "code, an old file": pickle.dumps(runs.Bomb()),
        "half": plain[: len(plain) // 2],
        "half, an old file": legacy.getvalue()[: len(plain) // 2],
        "a recursion": runs.recursive(),
        "an archive that grows": runs.growing(),
        "an empty archive": empty_archive(),
        "nothing": b"",
        "another pickle": far,
        "a module": runs.pickled(torch.nn.Linear(2, 2)),
        "a list": runs.pickled([1]),
        "numbers": runs.pickled({"model": {"a": 1}}),
        "names that are numbers": runs.pickled({1: torch.ones(1)}),
        "wrapped in itself": runs.pickled({"model": {"state_dict": {"model": 1}}}),
        "a tensor on the meta device": runs.pickled(meta),
        "a sparse tensor": runs.pickled(sparse),
        "a terabyte that is one number": runs.pickled(expanded),
        "text": b"hello",
        "zeros": bytes(1 << 20),
    }  # fmt: skip


def empty_archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w"):
        pass
    return stream.getvalue()


# --- what is done with them


def give(name: str, data: bytes, folder: Path) -> None:
    """Gives a file of weights to a host (`--weights`); what is accepted is what was meant."""
    file = folder / name
    file.write_bytes(data)
    host = models.timm_host()
    wanted = {key: t.clone() for key, t in models.timm_host().state_dict().items()}
    load_weights(host, read_weights(file), file)
    for key, t in host.state_dict().items():
        if not torch.equal(t, wanted[key]):
            raise SilentlyWrong(f"{key} was taken, and is something else")


def give_rounded(data: bytes, folder: Path) -> None:
    """Weights of another precision are taken, rounded."""
    file = folder / "w.safetensors"
    file.write_bytes(data)
    host = models.timm_host()
    load_weights(host, read_weights(file), file)
    for key, t in models.timm_host().state_dict().items():
        if not torch.allclose(host.state_dict()[key], t, atol=1e-2):
            raise SilentlyWrong(f"{key} was taken, and is something else")


def load_saved(data: bytes, fits: bool, folder: Path) -> None:  # noqa: FBT001
    """Puts a file in the place of saved weights, with the size and digest it has, or not."""
    source = models.saved("tome")
    wanted, _ = models.saved_answers(source)
    path = models.copied(source, folder)
    (path / WEIGHTS_FILE).write_bytes(data)
    if fits:
        recipe = models.read_json(path / RECIPE_FILE)
        recipe |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / RECIPE_FILE).write_text(json.dumps(seal_recipe(recipe)))
    models.require_same(models.answers(patchslim.load(path)), wanted, "other weights")


def tied_host() -> Any:
    host: Any = models.timm_host()
    host.blocks[1].mlp.fc1.weight = host.blocks[0].mlp.fc1.weight
    return host


def tie_weights(folder: Path) -> None:
    """Weights that a user has tied come back tied, and are as many as they were."""
    model = patchslim.slim(tied_host(), "tome", r=2)
    model.save(folder / "tied")
    again = patchslim.load(folder / "tied")
    models.require_same(models.answers(again), models.answers(model), "tied weights")
    if sum(p.numel() for p in again.parameters()) != sum(p.numel() for p in model.parameters()):
        raise SilentlyWrong("tied weights came back untied, with more parameters")


def tie_and_train(folder: Path) -> None:
    """What is learned by one of two tied weights is learned by both."""
    patchslim.slim(tied_host(), "tome", r=2).save(folder / "tied")
    host: Any = patchslim.load(folder / "tied").host
    with torch.no_grad():
        host.blocks[0].mlp.fc1.weight.add_(1)
    if not torch.equal(host.blocks[0].mlp.fc1.weight, host.blocks[1].mlp.fc1.weight):
        raise SilentlyWrong("tied weights came back untied")
