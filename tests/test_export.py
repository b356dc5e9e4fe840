"""Exported models: the same answers and tokens, one clear error else, nothing half written."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import patchslim
from patchslim.cli.main import main
from patchslim.deployment import checking, registry
from patchslim.deployment.artefact import Named, open_artefact
from patchslim.deployment.card import read_card
from patchslim.deployment.checking import Check, check_answers, check_graph
from patchslim.deployment.graph import Graph, Outputs, Witness
from patchslim.deployment.rounding import RandomRounding
from patchslim.deployment.target import Runner, Target
from patchslim.errors import (
    BadFile,
    BadSetting,
    MissingExtra,
    OldArtefact,
    PatchslimError,
    UnknownName,
    UnsupportedModel,
    Untrained,
    WrongExport,
    WrongInput,
)
from patchslim.methods import Method
from patchslim.model.model import SlimModel
from patchslim.tokens.merging import Merge
from patchslim.tokens.tokens import Tokens

slow = pytest.mark.slow
SIDE = 24
TARGETS = registry.target_names()
# Methods that are exported for targets that take half a minute for one: each does other things.
FEW = {
    "executorch": "topk patch_slimming mctf evo ats similarity".split(),
    "aoti": "topk ats similarity".split(),
}
BROKEN = (
    "cannot be read by ONNX|no exported program|not the file that was exported|was truncated|"
    "no program of ExecuTorch|no package of AOTInductor"
)
METHODS = {
    **{name: (name, {}) for name in patchslim.method_names() if name != "identity"},
    **{
        f"similarity {group}": ("similarity", {"group": group})
        for group in "nearest bipartite average density medoids iterative redundancy".split()
    },
    "topk+tome": ("topk+tome", {}),
    "similarity leader": ("similarity", {"group": "leader", "threshold": 0.3}),
    "similarity components": ("similarity", {"group": "components", "threshold": 0.3}),
    "similarity paper": ("similarity", {"preset": "paper"}),
    "similarity window": ("similarity", {"window": 3}),
    "similarity squares": ("similarity", {"squares": 3}),
    "similarity received": ("similarity", {"weight": "received"}),
    "similarity keys": ("similarity", {"group": "bipartite", "on": "keys", "measure": "cosine"}),
    **{
        f"similarity {survivor}": ("similarity", {"survivor": survivor})
        for survivor in "mean medoid first heaviest alone".split()
    },
    "similarity threshold": ("similarity", {"threshold": 0.05}),
    "tome threshold": ("tome", {"threshold": 0.5}),
    "evit unfused": ("evit", {"fuse": False}),
    "evo alone": ("evo", {"representative": False}),
    "duplicates tolerance": ("duplicates", {"tolerance": 0.1}),
}


def host(**settings: Any) -> nn.Module:
    """A ViT of 36 patches whose weights are large enough for decisions to be clear."""
    torch.default_generator.manual_seed(0)
    made = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=4, embed_dim=16, depth=3, num_heads=2,
        num_classes=5, **settings,
    ).eval()  # fmt: skip
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return made


def slim(method: str = "topk", **settings: Any) -> SlimModel:
    blocks = (0, 2) if method == "duplicates" else (1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Untrained)
        made = patchslim.slim(host(), method, keep_rate=0.7, at=blocks, **settings)
    torch.default_generator.manual_seed(1)
    for parameter in made.method.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)  # a method that learns is as if it were trained
    return made


def pictures(count: int = 3, *, flat: bool = False) -> Tensor:
    """Noise; or noise with an area of patches that show the same."""
    made = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    if flat:
        made[:, :, :8] = 1.0
    return made


class Pretence(Target):
    """A target that needs no converter: PyTorch's own modules, pickled. Answers may be bent."""

    name = "pretence"
    suffix = ".pretence"
    extra = "pretence"
    precisions = ("float32", "bfloat16")

    def __init__(self) -> None:
        self.bend: Any = lambda values: values
        self.wrong = 1.0

    def lower(self, converted: Any, graph: Graph, precision: str) -> Any:
        made = copy.deepcopy(converted)
        head = made.model.host.head
        head.weight.data.copy_(self.wrong * head.weight.bfloat16())
        self.lowered = made.model
        return made

    def convert(self, graph: Graph) -> Any:
        return Witness(graph.model, graph.outputs)

    def write(self, converted: Any, graph: Graph, card: str, path: Path) -> None:
        told = Witness(converted.model, graph.outputs, tells=False)
        path.write_bytes(pickle.dumps((card, told)))

    def witness(self, converted: Any) -> Runner:
        def run(images: Any) -> list[Any]:
            with torch.no_grad():
                return [each.numpy() for each in self.bend(converted(torch.from_numpy(images)))]

        return run

    def open(self, path: Path) -> tuple[str | None, Runner]:
        try:
            card, module = pickle.loads(path.read_bytes())
        except Exception as error:
            raise BadFile(f"{path} is broken") from error
        return card, self.witness(module)


@pytest.fixture
def pretence(monkeypatch: pytest.MonkeyPatch) -> Pretence:
    """The pretence, among the targets that ship."""
    made, find = Pretence(), registry.find_target
    names = ["pretence", *TARGETS]

    def find_any(name: str) -> Target:
        return made if name == "pretence" else find(name)

    for module in ("registry", "export"):
        monkeypatch.setattr(f"patchslim.deployment.{module}.find_target", find_any)
        monkeypatch.setattr(f"patchslim.deployment.{module}.target_names", lambda: names)
    return made


def test_an_export_answers_as_the_model_and_tells_what_it_is(pretence, tmp_path):
    model, x = slim("evit"), pictures()
    written = patchslim.export(
        model, tmp_path / "made" / "m.pretence", images=x, labels=list("abcde")
    )
    assert str(written.check) == (
        "answers equal to 0.0e+00 on 7 images, with the same tokens in every block"
    )
    again = patchslim.load(tmp_path / "made" / "m.pretence")
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert again.labels == list("abcde")
    assert again.preprocessing.image_size == (SIDE, SIDE)
    told = {key: again.card[key] for key in ("method", "target", "batch", "input", "tokens")}
    assert told == {
        "method": "evit", "target": "pretence", "batch": None, "input": [3, SIDE, SIDE],
        "tokens": [*model.plan.counts],
    }  # fmt: skip
    assert again.card["checked"] == {
        "images": 7,
        "compared": 7,
        "largest_difference": 0.0,
        "near_ties": {},
        "hidden_ties": 0,
    }
    assert repr(again).startswith("Artefact(pretence, ")
    assert [each.name for each in (tmp_path / "made").iterdir()] == ["m.pretence"]


def test_a_model_in_training_is_left_as_it_is(pretence, tmp_path):
    model = slim().train()
    patchslim.export(model, tmp_path / "m.pretence", batch=2)
    assert model.training
    assert model.host.training


@pytest.mark.parametrize(
    ("images", "wrong"),
    [
        (np.zeros((1, 3, SIDE, SIDE)), "Got ndarray instead of images"),
        (torch.zeros(2, 3, SIDE, 8), r"Got images of shape \(2, 3, 24, 8\)"),
        (torch.zeros(2, 3, SIDE, SIDE, dtype=torch.int64), "type torch.int64"),
        (torch.zeros(3, 3, SIDE, SIDE), r"shape \(2, 3, 24, 24\). Give 2 in .* with batch=3"),
    ],
)
def test_other_images_are_refused(pretence, tmp_path, images, wrong):
    written = patchslim.export(slim(), tmp_path / "m.pretence", batch=2)
    assert written(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 5)
    with pytest.raises(WrongInput, match=wrong):
        written(images)


def swap(values: Any, block: int) -> Any:
    """Another cell in a deciding block: the first that is not kept for the first that is."""
    standing = values[1 + block].clone()
    for row in standing:
        kept = row == torch.arange(len(row))
        here, there = int(kept.int().argmax()), int(kept.int().argmin())
        row[row == here] = there
        row[there] = there
    return [*values[: 1 + block], standing, *values[2 + block :]]


def join(values: Any, block: int) -> Any:
    """Another neighbour in a deciding block: what was merged joins the last that is kept."""
    standing = values[1 + block].clone()
    for row in standing:
        kept = row == torch.arange(len(row))
        row[~kept] = int(kept.nonzero().max())
    return [*values[: 1 + block], standing, *values[2 + block :]]


@pytest.mark.parametrize(("decision", "block"), [(0, 1), (1, 2)])
def test_a_graph_that_keeps_other_patches_is_not_written(pretence, tmp_path, decision, block):
    pretence.bend = lambda values: swap(values, decision)
    (tmp_path / "m.pretence").write_text("before")
    with pytest.raises(WrongExport, match=rf"Block {block} .* first that keeps other patches"):
        patchslim.export(slim("similarity"), tmp_path / "m.pretence")
    assert (tmp_path / "m.pretence").read_text() == "before"
    assert len([*tmp_path.iterdir()]) == 1


def test_a_graph_that_merges_into_other_patches_is_not_written(pretence, tmp_path):
    pretence.bend = lambda values: join(values, 0)
    with pytest.raises(WrongExport, match=r"Block 1 .* first that merges other patches"):
        patchslim.export(slim("tome"), tmp_path / "m.pretence")
    assert not [*tmp_path.iterdir()]


def test_a_method_that_decides_where_only_the_class_token_is_read_is_written(pretence, tmp_path):
    model = patchslim.slim(host(), "dct", r=2, tail="exact")
    assert len(model.plan.steps) - 1 in model.plan.decision_blocks
    written = patchslim.export(model, tmp_path / "m.pretence")
    assert written.check.compared == written.check.images


def test_a_lower_precision_tells_what_it_changes(pretence, tmp_path):
    x, path = pictures(5), tmp_path / "m.pretence"
    model = slim()
    written = patchslim.export(model, path, precision="bfloat16", images=x, max_kl=0.1, max_drop=0)
    assert written.card["precision"] == "bfloat16"
    told = written.card["checked"]["drift"]
    assert told == patchslim.load(path).card["checked"]["drift"]
    assert (told["images"], told["same_tokens"], told["agreement"]) == (5, 1.0, 1.0)
    assert 0 < told["kl"] < 1e-3
    assert "in bfloat16 on 5 images: KL to float32 0.0" in str(written.check)
    with torch.no_grad():
        assert torch.equal(written(x), pretence.lowered(x))
    before = path.read_bytes()
    with pytest.raises(WrongExport, match=r"In bfloat16, on 5 images, its KL .* and max_kl=1e-12"):
        patchslim.export(model, path, precision="bfloat16", images=x, max_kl=1e-12)
    pretence.wrong = -1.0
    with pytest.raises(WrongExport, match=r"first answer on 100.0% .* and max_drop=0.5"):
        patchslim.export(model, path, precision="bfloat16", images=x, max_drop=0.5)
    assert path.read_bytes() == before


@pytest.mark.parametrize("by", [2e-3, float("nan")])
def test_a_graph_that_answers_otherwise_is_not_written(pretence, tmp_path, by):
    pretence.bend = lambda values: [values[0] + by, *values[1:]]
    with pytest.raises(WrongExport, match="keeps the same tokens as yours and answers"):
        patchslim.export(slim(), tmp_path / "m.pretence")
    assert not [*tmp_path.iterdir()]


def test_a_written_file_that_answers_otherwise_is_taken_back(pretence, tmp_path):
    pretence.bend = lambda values: [v + (0.01 if len(values) == 1 else 0) for v in values]
    with pytest.raises(WrongExport, match="answers otherwise"):
        patchslim.export(slim(), tmp_path / "m.pretence")
    assert not [*tmp_path.iterdir()]


def near_tie() -> tuple[SlimModel, Tensor, int]:
    """A model, images, and one at which two patches are almost equally attentive at the cut."""
    model = slim("topk")
    images = pictures(1)
    # Two equal patches at equal positions: whatever is computed of them is equal too.
    model.host.get_parameter("pos_embed").data.zero_()
    images[:] = torch.randn(3, 4, 4).repeat(1, 6, 6)
    return model, images, 1


def test_a_near_tie_is_told_from_a_wrong_graph():
    model, images, block = near_tie()
    graph = Graph(model, Outputs("tensor", ("output",)), None)
    witness = Witness(model, graph.outputs)

    def run(given: Any) -> list[Any]:
        with torch.no_grad():
            logits, *decisions = swap(witness(torch.from_numpy(given)), 0)
            return [each.numpy() for each in (logits + 0.5, *decisions)]

    sure = pictures(3)
    with pytest.raises(WrongExport, match="no answer could be compared"):
        check_graph(run, graph, [images])

    def run_both(given: Any) -> list[Any]:
        if np.array_equal(given, images.numpy()):
            return run(given)
        with torch.no_grad():
            return [each.numpy() for each in witness(torch.from_numpy(given))]

    found = check_graph(run_both, graph, [images, sure])
    assert found.near_ties == {block: 1}
    assert (found.images, found.compared) == (4, 3)
    assert "near ties went the other way on 1 of 4" in str(found)

    def run_alike(given: Any) -> list[Any]:
        with torch.no_grad():
            return [each.numpy() for each in swap(witness(torch.from_numpy(given)), 0)]

    found = check_graph(run_alike, graph, [images])
    assert (found.near_ties, found.compared) == ({block: 1}, 1)


class JoinsByATie(Method):
    """Merges the last patches with the first or the second: a near tie of two others decides."""

    def choose(self, tokens: Tokens, signals: Any, keep: int) -> Merge:
        rows = torch.arange(tokens.patches).expand(len(tokens.x), -1)
        means = tokens.x[:, tokens.prefix :].mean(dim=2)
        larger = (means[:, 2] > means[:, 3]).long()
        return Merge(
            rows[:, :keep], rows[:, keep:], larger[:, None].expand(-1, tokens.patches - keep)
        )


@pytest.mark.parametrize(
    "method",
    ["tome", *(pytest.param(each, marks=slow) for each in ("adamerge", "atc"))],
)
def test_what_rounding_decides_among_patches_that_are_alike_is_no_wrong_graph(monkeypatch, method):
    """Noise on pixels moves such patches together, and a runtime rounds each by itself."""
    model = patchslim.slim(host(), method, keep_rate=0.7, at=(1, 2))
    model.host.get_parameter("pos_embed").data.zero_()
    graph = Graph(model, Outputs("tensor", ("output",)), None)
    witness = Witness(model, graph.outputs).eval()
    images = 1 + 0.01 * pictures(5)

    def run(given: Any) -> list[Any]:
        with torch.no_grad(), RandomRounding(torch.Generator().manual_seed(5)):
            return [each.numpy() for each in witness(torch.from_numpy(given))]

    found = check_graph(run, graph, [images, pictures(2)])
    assert sum(found.near_ties.values()) >= 3

    def run_wrongly(given: Any) -> list[Any]:
        answer, first, second = run(given)
        return [answer, first[:, ::-1].copy(), second]

    with pytest.raises(WrongExport, match="is the first that"):
        check_graph(run_wrongly, graph, [pictures(2)])
    if method == "tome":  # what the check said before it rounded at random
        monkeypatch.setattr(checking, "RandomRounding", lambda _: contextlib.nullcontext())
        with pytest.raises(WrongExport, match="is the first that"):
            check_graph(run, graph, [images])


def test_a_near_tie_of_whom_to_merge_with_is_told_from_a_wrong_graph():
    model = patchslim.slim(host(), JoinsByATie(), keep_rate=0.5, at=(1,))
    model.host.get_parameter("pos_embed").data.zero_()
    sure = pictures(4)
    tie = sure[:1].clone()
    tie[:, :, :4, 12:16] = tie[:, :, :4, 8:12]  # patches 2 and 3 show the same
    graph = Graph(model, Outputs("tensor", ("output",)), None)
    witness = Witness(model, graph.outputs)

    def answer(images: Tensor) -> list[Any]:
        with torch.no_grad():
            return [each.numpy() for each in witness(images)]

    def run(given: Any) -> list[Any]:
        images = torch.from_numpy(given)
        plain = answer(images)
        if len(images) > 1:
            return plain
        near = (answer(images + 1e-5 * torch.randn(images.shape)) for _ in range(99))
        return next(each for each in near if np.abs(each[0] - plain[0]).max() > 1e-2)

    found = check_graph(run, graph, [tie, sure])
    assert (found.near_ties, found.hidden_ties) == ({1: 1}, 0)
    assert (found.images, found.compared) == (5, 4)
    assert "near ties went the other way on 1 of 5" in str(found)

    def hide(given: Any) -> list[Any]:
        return [*run(given)[:1], *answer(torch.from_numpy(given))[1:]]

    hidden = check_graph(hide, graph, [tie, sure])
    assert (hidden.near_ties, hidden.hidden_ties, hidden.compared) == ({}, 1, 4)
    written = check_answers(
        lambda given: run(given)[:1], graph, [tie, sure], graph.outputs, Check(5, 5, 0.0)
    )
    assert (written.hidden_ties, written.compared) == (1, 4)
    with pytest.raises(WrongExport, match="answers otherwise"):
        check_graph(lambda given: [run(given)[0] + 0.01, *run(given)[1:]], graph, [tie, sure])


def test_what_a_converter_says_becomes_one_error(pretence, tmp_path, monkeypatch):
    def convert(graph: Graph) -> Any:
        raise RuntimeError("no conversion") from ValueError("aten.foo\n is unknown")

    monkeypatch.setattr(pretence, "convert", convert)
    with pytest.raises(
        WrongExport, match=r"pretence cannot hold .* with TopK: ValueError: aten.foo"
    ) as caught:
        patchslim.export(slim(), tmp_path / "m.pretence")
    advice = str(caught.value).partition("Nothing was written. ")[2]
    assert advice == (
        "Try another target (aoti, executorch, onnx, openvino, pt2), or the method 'similarity', "
        "or batch=1."
    )


@pytest.mark.slow
def test_positions_are_not_resampled_to_the_size_they_have():
    slimmed = patchslim.slim(host(dynamic_img_size=True), "topk", keep_rate=0.7, at=(1, 2))
    program = Graph(slimmed, Outputs("tensor", ("output",)), None).program()
    assert not [node for node in program.graph.nodes if "upsample" in str(node.target)]
    images = torch.randn(3, 3, SIDE, SIDE)
    assert torch.allclose(program.module()(images)[0], slimmed(images), atol=1e-5)


def test_a_full_disk_leaves_what_was_there(pretence, tmp_path, monkeypatch):
    def write(converted: Any, graph: Graph, card: str, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretence, "write", write)
    (tmp_path / "m.pretence").write_text("before")
    with pytest.raises(BadFile, match="No space left on device"):
        patchslim.export(slim(), tmp_path / "m.pretence")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["before"]


WRONG_CALLS = [
    ({"path": "m.tflite"}, BadSetting, "does not tell what it is for"),
    ({"path": "m.onnx", "to": "onix"}, UnknownName, "Unknown target 'onix'. Did you mean 'onnx'"),
    ({"path": "m.bin", "to": "onnx"}, BadSetting, "a file for onnx ends in .onnx"),
    ({"path": "m.pt2", "to": "aoti"}, BadSetting, "ends in .aoti.pt2, .* Give .*/m.aoti.pt2"),
    ({"path": "m.aoti.pt2", "to": "pt2"}, BadSetting, "ends in .pt2, .* Give .*/m.pt2"),
    ({"path": "m.pt2", "precision": "int4"}, UnknownName, "Unknown precision 'int4'"),
    ({"path": "m.pt2", "precision": 8}, UnknownName, "Unknown precision '8'"),
    ({"path": "m.pt2", "precision": "bfloat16"}, WrongExport, "pt2 has no bfloat16: .*'openvino'"),
    ({"path": "m.onnx", "precision": "bfloat16"}, WrongExport, r"onnx has no .* on a CPU\. Give"),
    ({"path": "m.pt2", "max_kl": -1}, BadSetting, "max_kl"),
    ({"path": "m.pt2", "max_drop": 2}, BadSetting, "max_drop=2"),
    ({"path": "m.pt2", "batch": 0}, BadSetting, "batch=0"),
    ({"path": "m.pt2", "labels": ["a"]}, BadSetting, "labels= has 1 names"),
    ({"path": "m.pt2", "images": torch.zeros(1, 3, 8, 8)}, BadSetting, "images= has a batch"),
    ({"path": "m.pt2", "images": "photos"}, BadSetting, r"one str. .*for_host\(model, 'photos'\)"),
    ({"path": "m.pt2", "images": Path("photos")}, BadSetting, r"for_host\(model, 'photos'\)"),
    ({"path": "m.pt2", "model": nn.Linear(1, 1)}, UnsupportedModel, "not Linear: slim it first"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "says"), WRONG_CALLS, ids=lambda each: str(each)[:30])
def test_wrong_calls_say_what_is_needed(tmp_path, call, error, says):
    call = {"model": slim(), **call, "path": tmp_path / call["path"]}
    with pytest.raises(error, match=says):
        patchslim.export(**call)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": 3},
        {"path": "a\0.pt2"},
        {"to": 3},
        {"batch": "2"},
        {"batch": True},
        {"images": 3},
        {"images": "abc"},
        {"images": [3]},
        {"images": torch.full((1, 3, SIDE, SIDE), float("nan"))},
        {"labels": 3},
        {"labels": "abcde"},
    ],
    ids=str,
)
def test_arguments_of_a_wrong_kind_are_refused(tmp_path, wrong):
    name = next(iter(wrong))
    with pytest.raises(PatchslimError, match=rf"{name}|path"):
        patchslim.export(slim(), **{"path": tmp_path / "m.pt2", **wrong})
    assert not [*tmp_path.iterdir()]


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"weights of torch.bfloat16"):
        patchslim.export(slim().bfloat16(), tmp_path / "m.pt2")


@pytest.mark.parametrize("name", ["onnx", "openvino", "executorch"])
def test_a_missing_runtime_names_its_extra(tmp_path, monkeypatch, name):
    model = slim()
    monkeypatch.setattr("patchslim.versions.installed_version", lambda distribution: None)
    path = artefact_path(tmp_path, name)
    with pytest.raises(MissingExtra, match=rf"pip install 'patchslim\[{name}\]'"):
        patchslim.export(model, path, to=name)
    file = path if path.suffix else path / "model.xml"
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    with pytest.raises(MissingExtra, match="is not installed"):
        patchslim.load(path)


@pytest.mark.parametrize(
    ("package", "warns"),
    [
        ("0.13.0", True),
        ("0.9", True),
        ("0.14.0", False),
        ("1.2.0", False),
        (None, False),
        (7, False),
    ],
)
def test_a_file_of_a_version_whose_files_have_a_fault_says_so(pretence, tmp_path, package, warns):
    path = tmp_path / "m.pretence"
    patchslim.export(slim(), path)
    text, module = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps((json.dumps({**json.loads(text), "package": package}), module)))
    pretence.mended, pretence.fault = (0, 14), "it is wrong"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patchslim.load(path)
    said = [str(each.message) for each in caught if each.category is OldArtefact]
    wanted = f"written by patchslim {package}, whose files have a fault: it is wrong. Export it"
    assert len(said) == warns
    assert all(wanted in each for each in said)


def test_openvino_tells_of_its_files_from_before_sums_were_parted():
    target = registry.find_target("openvino")
    assert target.mended == (0, 14)
    assert "AVX-512" in target.fault


def test_cards_are_read_with_care(tmp_path):
    for text, says in (
        (None, "it has no card"),
        ("{", "not readable as JSON"),
        ("[]", "has no version"),
        (json.dumps({"artefact": 99, "package": "9.1"}), "pip install -U 'patchslim>=9.1'"),
        (json.dumps({"artefact": 1, "target": 3}), "was edited; look at: target"),
    ):
        with pytest.raises(BadFile, match=says):
            read_card(text, tmp_path)


def test_every_kind_of_answer_comes_back():
    one, two = torch.zeros(1), torch.ones(1)
    for answer, kind, names in (
        (one, "tensor", ("output",)),
        ((one, two), "sequence", ("output_0", "output_1")),
        ({"logits": one, "hidden": None, "more": two}, "mapping", ("logits", "more")),
    ):
        outputs = Outputs.of(answer)
        assert (outputs.kind, outputs.names) == (kind, names)
        assert len(outputs.flatten(answer)) == len(names)
    with pytest.raises(UnsupportedModel, match="holds more than tensors"):
        Outputs.of((one, "text"))
    named = Named(logits=one)
    assert named.logits is one
    with pytest.raises(AttributeError, match="There is no 'loss', but: logits"):
        _ = named.loss


def artefact_path(folder: Path, target: str) -> Path:
    return folder / f"m{registry.find_target(target).suffix}"


def cases():
    """Every method in every target; settings that make other graphs in ONNX alone.

    ExecuTorch and AOTInductor take half a minute a method: here they meet one method of each kind,
    and `benchmarks/export.py` has them all.
    """
    for method in METHODS:
        ships = method in patchslim.method_names()
        targets = [t for t in TARGETS if method in FEW.get(t, METHODS)]
        for target in targets if ships else ["onnx"]:
            yield pytest.param(method, target, id=f"{method}-{target}")


@slow
@pytest.mark.parametrize(("method", "target"), list(cases()))
def test_every_method_is_the_same_in_every_target(tmp_path, method, target):
    name, settings = METHODS[method]
    model, x = slim(name, **settings), pictures(5, flat=name == "duplicates")
    path = artefact_path(tmp_path, target)
    written = patchslim.export(model, path, to=target, images=x)
    assert not written.check.near_ties
    again = written if registry.find_target(target).runs_code else patchslim.load(path)
    with torch.no_grad():
        for images in (x[: written.card["batch"]], x[:1]):
            assert torch.allclose(again(images), model(images), atol=1e-5)


def test_a_file_in_which_code_would_run_is_not_opened(tmp_path):
    """The next test has a real one; making it takes seconds."""
    evil, marker = tmp_path / "evil.pt2", tmp_path / "code-was-run"
    with zipfile.ZipFile(evil, "w") as bad:
        code = f"__import__('pathlib').Path('{marker}').touch()"
        bad.writestr("m/models/model.json", json.dumps({"expr_str": code}))
    with pytest.raises(BadFile, match="runs code in such a file"):
        patchslim.load(evil)
    assert not marker.exists()


@slow
def test_code_in_an_exported_program_is_not_run(tmp_path):
    """PyTorch evaluates the sizes in such a file as Python."""
    path, evil, marker = tmp_path / "m.pt2", tmp_path / "evil.pt2", tmp_path / "code-was-run"
    patchslim.export(slim(), path)
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(evil, "w") as bad:
        for member in good.infolist():
            content = good.read(member)
            if member.filename.endswith(".json"):
                code = f"__import__('pathlib').Path('{marker}').touch()".encode()
                content = re.sub(rb'("expr_str": ?)"[^"]*"', rb'\1"' + code + b'"', content)
            bad.writestr(member, content)
    with pytest.raises(BadFile, match="runs code in such a file"):
        patchslim.load(evil)
    assert not marker.exists()


@slow
@pytest.mark.parametrize("target", TARGETS)
def test_static_batches_and_broken_files(tmp_path, target):
    path = artefact_path(tmp_path, target)
    written = patchslim.export(slim("similarity"), path, to=target, batch=2)
    assert written(pictures(2)).shape == (2, 5)
    with pytest.raises(WrongInput, match=r"shape \(2, 3, 24, 24\)"):
        written(pictures(3))
    heavy = path if path.is_file() else path / "model.bin"
    heavy.write_bytes(heavy.read_bytes()[:-1000])
    with pytest.raises(BadFile, match=BROKEN):
        open_artefact(path, is_own=True)
    heavy.write_bytes(b"something else")
    with pytest.raises(BadFile, match=BROKEN):
        open_artefact(path, is_own=True)


@slow
def test_hugging_face_hosts_keep_their_names(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=24, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    model = patchslim.slim(ViTForImageClassification(config).eval(), "tome", r=3)
    written = patchslim.export(model, tmp_path / "m.onnx")
    assert written.labels == ["cat", "dog"]
    with torch.no_grad():
        assert torch.allclose(written(pictures()).logits, model(pictures()).logits, atol=1e-5)


@slow
def test_the_command_exports_the_example(tmp_path, capsys):
    out = tmp_path / "digits.pt2"
    argv = f"export digits --macs 0.7 --method topk --out {out} --limit 3 --json".split()
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["target"], told["check"]["images"]) == ("pt2", 7)
    assert open_artefact(out, is_own=True).card["method"] == "topk"
