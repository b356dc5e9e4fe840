"""The notebooks run from the first cell to the last, print what they must, and hold no outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 300

# What each of them prints on every machine.
SAYS = {
    "first_model": ["39\n", "0.146 GMACs of 0.244 GMACs", "64 of 64", "vs random", "True"],
}


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
    assert len(pictures) == 2
