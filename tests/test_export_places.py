"""Where an export is written: a full disk, a place that was there before, and links."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import patchslim
from patchslim.errors import BadFile, BadSetting
from patchslim.model.model import SlimModel

NAMES = {"onnx": "m.onnx", "openvino": "m", "pt2": "m.pt2"}
OLD = b"what was there before"


def large_model() -> SlimModel:
    """A model of two megabytes, on a disk of one."""
    host = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=192, depth=1, num_classes=3
    )
    return patchslim.slim(host.eval(), "topk", keep_rate=0.5, at=(0,), tail="full")


def write_old(path: Path) -> dict[Path, bytes]:
    """Puts something in the place of an artefact; returns what is there."""
    if path.suffix:
        path.write_bytes(OLD)
        return {path: OLD}
    path.mkdir()
    files = [path / name for name in ("model.xml", "model.bin", "digests.json")]
    for file in files:
        file.write_bytes(OLD)
    return dict.fromkeys(files, OLD)


@pytest.mark.slow
@pytest.mark.parametrize("target", NAMES)
def test_a_full_disk_is_one_error_and_what_was_there_is_as_it_was(target, small_disk):
    pytest.importorskip("onnxruntime" if target == "onnx" else "torch")
    pytest.importorskip("openvino" if target == "openvino" else "torch")
    path = small_disk / NAMES[target]
    before = write_old(path)
    with pytest.raises(BadFile, match=r"(?s)Could not write .* as it was"):
        patchslim.export(large_model(), path, target)
    after = {file: file.read_bytes() for file in small_disk.rglob("*") if file.is_file()}
    assert after == before


@pytest.mark.parametrize("target", NAMES)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_converted(target, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadFile, match="cannot be written"):
        patchslim.export("no model", tmp_path / "file" / NAMES[target], target)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    with pytest.raises((BadFile, BadSetting), match=r"holds other things|ends in"):
        patchslim.export("no model", tmp_path / "m", target)
    assert (tmp_path / "m" / "thesis.txt").read_text() == "mine"


def test_names_of_classes_are_texts(tmp_path):
    model = large_model()
    with pytest.raises(BadSetting, match="labels is the NoneType None"):
        patchslim.export(model, tmp_path / "m.pt2", labels=["a", None, "c"])
    with pytest.raises(BadSetting, match="float tensor"):
        patchslim.export(model, tmp_path / "m.pt2", images=torch.zeros(3))
