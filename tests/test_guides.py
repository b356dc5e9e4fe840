"""The guides to adding a method or a family are where errors say, in a checkout and a wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import patchslim
from patchslim.errors import UnsupportedModel
from patchslim.guides import locate_guide

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ["adding-a-family", "adding-a-method"]


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_is_the_page_of_the_documents(name):
    text = Path(locate_guide(name)).read_text(encoding="utf-8")
    assert text == (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def test_the_error_about_an_unknown_family_names_a_file_that_is_there():
    with pytest.raises(UnsupportedModel) as caught:
        patchslim.find_adapter(torch.nn.Linear(2, 2))
    assert Path(str(caught.value).rpartition("To add one: ")[2]).is_file()


@pytest.mark.slow
def test_the_wheel_holds_the_guides_and_what_a_page_is_made_of(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        for name in GUIDES:
            page = (ROOT / "docs" / f"{name}.md").read_bytes()
            assert packed.read(f"patchslim/guides/{name}.md") == page
        for name in ("page.css", "page.js"):
            text = (ROOT / "src" / "patchslim" / "report" / name).read_bytes()
            assert packed.read(f"patchslim/report/{name}") == text
        packed.extractall(tmp_path / "installed")
    code = """
import torch, patchslim
print(patchslim.__file__)
try:
    patchslim.slim(torch.nn.Linear(2, 2), "tome")
except patchslim.errors.UnsupportedModel as error:
    print(open(str(error).rpartition("To add one: ")[2], encoding="utf-8").readline())
"""
    installed = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'installed')\n{code}"]
    done = subprocess.run(
        installed,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PATH": "", "PYTHONPATH": str(tmp_path / "installed")},
    )
    file, title, *_ = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path / "installed"), done.stderr
    assert title.startswith("# ")
