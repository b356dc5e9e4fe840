"""The notebooks run from the first cell to the last, print what they must, and hold no outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 300

# What each of them prints on every machine.
SAYS = {
    "first_model": ["39\n", "0.146 GMACs of 0.244 GMACs", "64 of 64", "vs random", "True"],
    "own_photo": ["(1, 3, 224, 224)", "all patches\n", "55% of the operations", "vs random"],
}
PICTURES = {"first_model": 2, "own_photo": 1}


def write_photo(folder):
    """Writes what the second notebook opens: a photo, and weights, which here are random."""
    drawn = np.random.default_rng(0)
    pixels = drawn.integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    torch.default_generator.manual_seed(0)
    save_file(
        timm.create_model("deit_tiny_patch16_224").state_dict(), folder / "weights.safetensors"
    )


def read(path: Path):
    return nbformat.read(path, as_version=4)


def test_every_notebook_is_tested():
    assert [path.stem for path in NOTEBOOKS] == sorted(SAYS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_outputs(path):
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert not cell.outputs, f"{path.name}: clear the outputs of all cells"
            assert cell.execution_count is None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter's own libraries
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("PYTHONWARNINGS", "error:::__main__")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(path)
    if "PHOTO" in notebook.cells[1].source:
        write_photo(tmp_path)
        first = notebook.cells[1]
        first.source = first.source.replace("WEIGHTS = None", 'WEIGHTS = "weights.safetensors"')
    client = NotebookClient(
        notebook,
        timeout=MOST_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    printed = "".join(each.get("text", "") for each in outputs)
    missing = [words for words in SAYS[path.stem] if words not in printed]
    assert not missing, printed
    pictures = [each for each in outputs if "image/png" in each.get("data", {})]
    assert len(pictures) == PICTURES[path.stem]
