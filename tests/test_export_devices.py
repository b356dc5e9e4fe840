"""Exported programs of ExecuTorch and packages of machine code, in their own runtimes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import patchslim
from patchslim.cli.main import main
from patchslim.deployment.artefact import Artefact, open_artefact
from patchslim.errors import BadFile, MissingExtra, WrongInput
from test_export import SIDE, pictures, slim

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """A program of ExecuTorch, as it was exported."""
    path = tmp_path_factory.mktemp("executorch") / "m.pte"
    return patchslim.export(slim("topk"), path, images=pictures())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    """A package of machine code, as it was exported."""
    path = tmp_path_factory.mktemp("aoti") / "m.aoti.pt2"
    return patchslim.export(slim("topk"), path, images=pictures())


@slow
def test_a_program_is_loaded_with_its_card(program):
    again, x = patchslim.load(program.path), pictures(1)
    assert again.card == program.card
    assert again.preprocessing.image_size == (SIDE, SIDE)
    with torch.no_grad():
        assert torch.allclose(again(x), slim("topk")(x), atol=1e-5)


@slow
def test_a_program_takes_one_image_unless_told_otherwise(program):
    assert program.card["batch"] == 1
    with pytest.raises(WrongInput, match="Give 1 in each call, or export with batch=3"):
        program(pictures(3))


@slow
def test_the_runtime_of_a_device_reads_program_and_card(program):
    """ExecuTorch alone, which maps the file: what is at its end does not disturb it."""
    from executorch.runtime import Runtime

    plain = Runtime.get().load_program(program.path)
    assert plain.method_names == {"forward", "patchslim_card"}
    (text,) = plain.load_method("patchslim_card").execute([])
    assert json.loads(text) == program.card
    (answer,) = plain.load_method("forward").execute([pictures(1)])
    assert torch.equal(answer, program(pictures(1)))


@slow
def test_how_much_is_delegated_is_in_the_card(program, tmp_path):
    dense = patchslim.export(patchslim.slim(slim().host, "identity", keep=1.0), tmp_path / "d.pte")
    told = dense.card["delegated"]
    assert told["operators"] == told["of"] > 50
    assert told["partitions"] == 1
    told = program.card["delegated"]
    assert told["operators"] / told["of"] > 0.8
    assert 1 < told["partitions"] < 12


def broken_programs(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """A program that was cut, edited, or is no program, and what is said of it."""
    differs = "SHA-256 differs"
    yield "no program of ExecuTorch", b""
    yield "no program of ExecuTorch", b"PK" + whole[2:4] + b"\0" * 100
    for end in (8, 100, len(whole) // 2, -1):
        yield "was truncated, or was not written by patchslim", whole[:end]
    yield "was truncated, or was not written by patchslim", whole + b"\n"
    for place in range(8, len(whole) - 81, len(whole) // 7):
        edited = bytearray(whole)
        edited[place] ^= 0xFF
        yield differs, bytes(edited)
    yield differs, whole[:-1] + (b"0" if whole[-1:] != b"0" else b"1")


def check_refused(whole: bytes, path: Path) -> None:
    for says, content in broken_programs(whole):
        path.write_bytes(content)
        with pytest.raises(BadFile, match=says):
            patchslim.load(path)


def test_the_runtime_is_given_no_broken_program(tmp_path):
    from patchslim.deployment.targets.executorch import seal

    check_refused(seal(bytes(4) + b"ET12" + bytes(range(256))), tmp_path / "m.pte")


@slow
def test_broken_programs_are_refused(program, tmp_path):
    check_refused(program.path.read_bytes(), tmp_path / "m.pte")


@slow
def test_a_program_of_others_that_is_sealed_is_refused(tmp_path):
    """The digest is no signature. What it lets through is still checked for a card."""
    from executorch.exir import to_edge

    from patchslim.deployment.targets.executorch import seal

    other = to_edge(torch.export.export(torch.nn.ReLU(), (torch.zeros(1),))).to_executorch()
    (tmp_path / "m.pte").write_bytes(seal(bytes(other.buffer)))
    with pytest.raises(BadFile, match="it has no card"):
        patchslim.load(tmp_path / "m.pte")


@slow
def test_the_command_says_how_much_is_delegated(tmp_path, capsys):
    slim().save(tmp_path / "m")
    argv = f"export {tmp_path / 'm'} --to executorch --out {tmp_path / 'd.pte'}"
    assert main(argv.split()) == 0
    told = capsys.readouterr().out
    assert "for executorch in float32, " in told
    assert "operators, in" in told.split("delegated")[1]


def test_a_missing_compiler_is_told_before_work_starts(tmp_path, monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(MissingExtra, match=r"no compiler was found. Install one .* CXX"):
        patchslim.export(slim(), tmp_path / "m.aoti.pt2")
    assert not [*tmp_path.iterdir()]


RUN_ALONE = """
import sys, torch
sys.modules["patchslim"] = None  # an import of it fails
try:
    import patchslim
except ImportError:
    pass
else:
    sys.exit("patchslim can be imported")
model = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([model.get_metadata()["patchslim"], *model(torch.load(sys.argv[2]))], sys.argv[3])
"""


@slow
def test_a_package_runs_without_the_source_of_the_model(package, tmp_path):
    x = pictures(4)
    torch.save(x, tmp_path / "x.pt")
    paths = [str(package.path), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", RUN_ALONE, *paths], check=True, cwd=tmp_path, env=plain, timeout=300
    )
    card, answer = torch.load(tmp_path / "y.pt")
    assert json.loads(card) == package.card
    assert torch.equal(answer, package(x))
    with torch.no_grad():
        assert torch.allclose(answer, slim("topk")(x), atol=1e-5)


@slow
def test_a_package_is_not_opened_from_the_disk(package):
    """It is machine code."""
    with pytest.raises(BadFile, match=r"open it with torch\._inductor\.aoti_load_package"):
        patchslim.load(package.path)
    assert open_artefact(package.path, is_own=True)(pictures(2)).shape == (2, 5)
