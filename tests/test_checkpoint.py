"""A checkpoint is complete or missing, and any damage to a file is one clear error."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch

from child_process import kill_when, needs_fork
from patchslim.errors import BadFile
from patchslim.runs.checkpoint import SEAL_LENGTH, read, write

STATE = {
    "step": 7,
    "rate": 0.1,
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 1)}]},
    "best": None,
    "method": "evit",
    "generator": torch.get_rng_state(),
    "done": False,
}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "last.pt"
    write(path, STATE)
    return path


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "new" / "last.pt", STATE)
    assert same(read(tmp_path / "new" / "last.pt"), STATE)
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["last.pt"]


def test_a_parameter_comes_back_as_a_tensor_without_history(tmp_path):
    layer = torch.nn.Linear(2, 2)
    write(tmp_path / "last.pt", {"model": layer.state_dict(), "weight": layer.weight * 2})
    state = read(tmp_path / "last.pt")
    assert torch.equal(state["model"]["weight"], layer.weight)
    assert not state["weight"].requires_grad


@pytest.mark.parametrize("value", [Path("x"), {1, 2}, object(), torch.float32])
def test_what_could_not_be_read_is_not_written(path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a .*tensors, numbers and text"):
        write(path, {"a": [1, value]})
    assert same(read(path), STATE)


# --- interruptions


@needs_fork
def test_a_kill_leaves_the_old_or_the_new_checkpoint(path):
    """The process is killed as soon as the new file is there, at many points of writing it."""
    states = [{"step": step, "weight": torch.full((50_000,), float(step))} for step in range(2)]
    write(path, states[0])
    fresh = path.with_name(f".{path.name}.new")
    for size in (0, 1, 100_000, 200_000):

        def half_written(size=size):
            try:
                return fresh.stat().st_size >= size
            except FileNotFoundError:
                return False

        kill_when(lambda: [write(path, states[n % 2]) for n in range(300)], when=half_written)
        state = read(path)
        assert same(state, states[state["step"]])
        assert {entry.name for entry in path.parent.iterdir()} <= {path.name, fresh.name}
    write(path, STATE)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_full_disk_error_says_how_much_space_is_needed(small_disk):
    path = small_disk / "last.pt"
    write(path, STATE)
    needed = r"disk is full\. 4\.0 MB are needed .*, and 1\.0 MB are free.*as it was"
    with pytest.raises(BadFile, match=needed):
        write(path, {"weight": torch.zeros(1_000_000)})
    assert same(read(path), STATE)
    assert [entry.name for entry in small_disk.iterdir()] == ["last.pt"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadFile, match="Could not write the checkpoint"):
        write(tmp_path / "file" / "last.pt", STATE)


# --- files that are not what they should be


def sealed(content: bytes, number: int = 1) -> bytes:
    seal = f"\npatchslim checkpoint {number:04d} {hashlib.sha256(content).hexdigest()}\n"
    return content + seal.encode()


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_file(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadFile, match=r"truncated.*Give another checkpoint"):
        read(path)


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 0.9, -2, -20, -SEAL_LENGTH, -SEAL_LENGTH - 1])
def test_a_flipped_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place if isinstance(place, int) else int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadFile, match=r"SHA-256 differs|is no checkpoint"):
        read(path)


def test_files_that_are_missing_empty_or_something_else(path, tmp_path):
    with pytest.raises(BadFile, match="No such file"):
        read(tmp_path / "nowhere.pt")
    with pytest.raises(BadFile, match="is not a file"):
        read(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(BadFile, match="is empty"):
        read(path)
    path.write_text("step,loss\n")
    with pytest.raises(BadFile, match="no checkpoint of patchslim"):
        read(path)
    torch.save({"model": {}}, path)
    with pytest.raises(BadFile, match="no checkpoint of patchslim"):
        read(path)
    path.write_bytes(sealed(b"not written by torch"))
    with pytest.raises(BadFile, match="none of it was run"):
        read(path)
    torch.save([1, 2], path)
    path.write_bytes(sealed(path.read_bytes()))
    with pytest.raises(BadFile, match="holds a list"):
        read(path)


def test_code_in_a_checkpoint_is_never_run(path, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    torch.save({"model": Bomb()}, path)
    for content in (path.read_bytes(), pickle.dumps(Bomb())):
        path.write_bytes(sealed(content))
        with pytest.raises(BadFile, match="none of it was run"):
            read(path)
    assert not (tmp_path / "exploded").exists()


def test_a_newer_format_names_the_cure(path):
    path.write_bytes(sealed(b"whatever comes", number=2))
    with pytest.raises(BadFile, match=r"of format 2.*up to 1.*pip install -U patchslim"):
        read(path)
