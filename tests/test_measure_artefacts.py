"""`measure` on exported models gives the scores that it gives of the slimmed model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import patchslim
from patchslim.cli.main import main
from patchslim.data.images import Images
from patchslim.deployment.artefact import Artefact
from patchslim.deployment.card import make_card
from patchslim.deployment.graph import Graph, Outputs
from patchslim.errors import BadFile, PatchslimError, UnknownName, UnsupportedModel, WrongInput
from patchslim.model.model import SlimModel
from test_export import host, pictures, slim

slow = pytest.mark.slow


def artefact(model: SlimModel, name: str = "m.onnx", batch: int | None = None) -> Artefact:
    """An artefact that PyTorch runs: the card and the answers are those of an exported one."""
    with torch.no_grad():
        outputs = Outputs.of(model(pictures(1)))
    card = make_card(Graph(model, outputs, batch), "onnx", "float32", ["torch"], None)

    def run(images: Any) -> list[Any]:
        assert batch in (None, len(images))
        with torch.no_grad():
            return [each.numpy() for each in outputs.flatten(model(torch.from_numpy(images)))]

    return Artefact(Path(name), json.loads(json.dumps(card)), run, ["torch"])


def dense() -> SlimModel:
    return patchslim.slim(host(), "identity", keep=1.0)


def batches() -> list[tuple[Tensor, Tensor]]:
    x = pictures(20)
    return [(x[:8], torch.arange(8) % 5), (x[8:16], torch.arange(8) % 5), (x[16:], torch.arange(4))]


SCORES = "accuracy change agreement kl ece macs macs_share tokens choosing parameters".split()


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("exported", [True, False])
def test_scores_are_those_of_the_slimmed_model(exported, batch):
    model = slim("evit")
    want = patchslim.measure(model, batches(), repeats=0, baseline=False)
    beside = artefact(dense(), batch=batch) if exported else model.host
    got = patchslim.measure(artefact(model, batch=batch), batches(), dense=beside, repeats=0)
    for ours, theirs in zip(got.rows, want.rows, strict=True):
        for name in SCORES:
            mine, other = getattr(ours, name), getattr(theirs, name)
            mine, other = getattr(mine, "value", mine), getattr(other, "value", other)
            assert mine == pytest.approx(other, abs=1e-6), name
    assert [row.name for row in got.rows] == ["dense", "m.onnx"]
    assert got.rows[1].method == "evit"
    assert got.rows[1].memory is None
    assert got.provenance.images == 20
    assert patchslim.Report.from_json(got.to_json()) == got


def test_without_a_dense_model_nothing_is_compared():
    report = patchslim.measure(artefact(slim("topk")), batches(), batch=2, repeats=3)
    nothing, row = report.rows
    assert (nothing.method, nothing.accuracy, nothing.latency) == ("dense", None, None)
    assert nothing.tokens == (37, 37, 37)
    assert row.accuracy is not None
    assert (row.agreement, row.kl, row.change, row.speedup, row.conversion) == (None,) * 5
    assert row.latency is not None
    assert row.latency.repeats == 3
    assert " -  " in report.table()
    assert report.csv().count("\n") == 3


def test_costs_alone_need_no_images():
    model = artefact(slim("topk"))
    report = patchslim.measure({"a": model, "b": model}, dense=artefact(dense()), repeats=2)
    assert [row.name for row in report.rows] == ["dense", "a", "b"]
    assert report.rows[1].speedup is not None
    assert report.rows[1].accuracy is None
    assert report.provenance.versions["torch"]


def test_an_older_card_says_less():
    model = artefact(slim("topk"))
    for name in ("dense_tokens", "choosing", "parameters"):
        del model.card[name]
    with pytest.raises(BadFile, match="how many tokens the dense model has"):
        patchslim.measure(model, repeats=0)
    report = patchslim.measure(model, dense=artefact(dense()), repeats=0)
    assert report.rows[1].parameters is None


def other_images() -> Artefact:
    made = artefact(dense())
    made.card["input"] = [3, 32, 32]
    return made


def test_what_cannot_be_compared_is_refused():
    model = artefact(slim("topk"))
    fixed = artefact(slim("topk"), batch=4)
    for call, error, says in (
        ({"model": {"dense": model}}, UnknownName, "is the model to compare with"),
        ({"model": {"a": model, "b": slim()}}, UnsupportedModel, "'a' is an exported model and"),
        ({"model": slim(), "dense": model}, UnsupportedModel, "beside a torch.nn.Module"),
        ({"model": model, "dense": other_images()}, WrongInput, "One measurement is of one image"),
        ({"model": model, "dense": model}, UnsupportedModel, "keeps fewer tokens"),
        ({"model": model, "dense": 3}, UnsupportedModel, "dense= is a int"),
        ({"model": fixed, "batch": 8}, WrongInput, "takes 4 images in a call, and 8 are to be"),
        ({"model": model, "images": pictures()}, WrongInput, "one Tensor"),
        ({"model": model, "batch": 0}, WrongInput, "batch=0"),
    ):
        with pytest.raises(error, match=says):
            patchslim.measure(**call)
    fewer = artefact(patchslim.slim(host(), "identity", keep=1.0))
    fewer.__dict__["num_classes"] = 7
    with pytest.raises(UnsupportedModel, match="tells 7 classes apart"):
        patchslim.measure(model, dense=fewer)


def test_images_are_prepared_as_the_card_says(tmp_path):
    for label in range(5):
        (tmp_path / str(label)).mkdir()
        Image.new("RGB", (40, 30), (50 * label, 9, 80)).save(tmp_path / str(label) / "a.png")
    model = slim("topk")
    theirs = Images.for_host(artefact(model), tmp_path)
    ours = Images.for_host(model, tmp_path)
    assert theirs.prepared == ours.prepared
    assert theirs.has_labels
    for (a, b), (c, d) in zip(theirs, ours, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


@slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_command_measures_an_artefact_as_it_measures_the_model(tmp_path, capsys, target):
    saved = tmp_path / "saved"
    slim("similarity").save(saved)
    path, beside = tmp_path / "m.onnx", tmp_path / "dense.onnx"
    if target == "openvino":
        path, beside = tmp_path / "m", tmp_path / "dense"
    patchslim.export(patchslim.load(saved), path, to=target)
    patchslim.export(dense(), beside, to=target)
    for label in range(5):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        Image.effect_noise((30, 30), 90 + label).convert("RGB").save(
            tmp_path / "data" / str(label) / "a.png"
        )
    found = []
    for words in (f"{saved}", f"{path} --dense {beside}", f"{path} --dense {saved}"):
        argv = f"measure {words} --data {tmp_path / 'data'} --repeats 2 --json"
        assert main(argv.split()) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        found.append([rows[0], rows[1]])
    for name in ("accuracy", "agreement", "kl"):
        for other in found[1:]:
            assert other[1][name]["value"] == pytest.approx(found[0][1][name]["value"], abs=1e-4)
    assert math.isclose(found[0][1]["macs"], found[1][1]["macs"])
    assert found[1][1]["speedup"]["repeats"] == 2


@slow
def test_the_commands_say_what_an_artefact_cannot(tmp_path, capsys):
    path, weights = tmp_path / "m.onnx", tmp_path / "w.safetensors"
    patchslim.export(slim("topk"), path)
    weights.write_bytes(b"x")
    for argv, says in (
        (f"measure {path} --macs 0.5", "is exported, with a method, a budget and weights"),
        (f"measure {path} --dense {weights}", "does not say what to load"),
        (f"measure {path} --dense nowhere", "no such file or folder"),
        (f"show {path} cat.png", "which can be measured"),
        (f"train {path} --out {tmp_path / 'run'} --data digits", "which can be measured"),
    ):
        assert main(argv.split()) == 2
        assert says in capsys.readouterr().err
    assert main(["measure", str(path), "--repeats", "0"]) == 0
    assert "holds no dense one to compare with" in capsys.readouterr().err


def test_every_error_is_ours():
    with pytest.raises(PatchslimError):
        patchslim.measure({})
