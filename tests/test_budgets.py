"""Several budgets of one set of weights: stored once, each as good as alone; layouts of servers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import patchslim
from patchslim.cli.main import main, make_parser
from patchslim.deployment.budgets import Budgets, open_budgets
from patchslim.deployment.layout import find_layout, layout_names
from patchslim.deployment.registry import find_target, target_names
from patchslim.errors import (
    BadFile,
    BadSetting,
    PatchslimError,
    UnknownName,
    UnsupportedModel,
    WrongExport,
)
from test_export import host, pictures

slow = pytest.mark.slow
ABLE = [name for name in target_names() if not find_target(name).alone]
# The weights of this host are most of its file, as those of real models are.
WIDE = {"img_size": 24, "patch_size": 4, "embed_dim": 192, "depth": 3, "num_heads": 3}
INDEX = {
    "budgets": 1, "package": "0.9.0", "target": "onnx", "layout": None, "names": ["gone"],
    "bytes_apart": 1,
}  # fmt: skip


def slim(made: Any, rate: float, method: str = "topk") -> Any:
    return patchslim.slim(made, method, keep_rate=rate, at=(1, 2))


def three(made: Any = None) -> dict[str, Any]:
    made = made or host()
    return {"good": slim(made, 0.9), "fast": slim(made, 0.4), "merged": slim(made, 0.6, "tome")}


def wide_host() -> Any:
    torch.default_generator.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **WIDE).eval()


@slow
@pytest.mark.parametrize("target", ABLE)
def test_each_budget_is_as_good_as_alone_and_weights_are_there_once(tmp_path, target):
    models, x = three(wide_host()), pictures(3)
    written = patchslim.export(models, tmp_path / "all", to=target, images=x)
    again = patchslim.load(tmp_path / "all")
    assert isinstance(again, Budgets)
    assert [*again] == [*written] == ["fast", "merged", "good"]
    for name, model in models.items():
        assert written[name].check.largest_difference < 1e-5
        assert written[name].check.images == 7
        with torch.no_grad():
            assert torch.allclose(again[name](x), model(x), atol=1e-5)
    weights = sum(each.numel() for each in models["fast"].parameters()) * 4
    held = (tmp_path / "all" / "weights.bin").stat().st_size
    assert 0.95 * weights < held < 1.1 * weights  # ONNX keeps what is small in each model
    assert again.size < 0.5 * again.bytes_apart
    suffix = find_target(target).suffix
    single = patchslim.load(tmp_path / "all" / f"merged{suffix}")
    assert single.card["method"] == "tome"
    assert torch.equal(single(x), again["merged"](x))
    report = patchslim.measure(again, [(x, None)], dense=wide_host(), repeats=0)
    assert [row.name for row in report.rows] == ["dense", "fast", "merged", "good"]
    moved = shutil.move(tmp_path / "all", tmp_path / "elsewhere")
    assert torch.equal(patchslim.load(moved)["fast"](x), again["fast"](x))


@slow
@pytest.mark.parametrize("target", ABLE)
def test_other_weights_are_noticed(tmp_path, target):
    patchslim.export(three(wide_host()), tmp_path / "m", to=target)
    weights = tmp_path / "m" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(BadFile, match=r"weights.bin is not the file that was exported"):
        patchslim.load(tmp_path / "m")
    weights.unlink()
    with pytest.raises(BadFile, match=r"weights.bin"):
        patchslim.load(tmp_path / "m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two budgets for ONNX, named by their shares of the operations."""
    made = host()
    path = tmp_path_factory.mktemp("budgets") / "all"
    patchslim.export([slim(made, 0.9), slim(made, 0.4)], path, to="onnx")
    return path


@slow
@pytest.mark.parametrize("small_disk", ["100k"], indirect=True)
@pytest.mark.parametrize("target", ABLE)
def test_a_full_disk_is_one_error_and_leaves_nothing(small_disk, target):
    with pytest.raises(BadFile, match=r"Could not write .*What was there before is as it was"):
        patchslim.export([slim(host(), 0.5), slim(host(), 0.8)], small_disk / "vit", to=target)
    assert not [each for each in small_disk.iterdir() if "lock" not in each.name]


@slow
def test_a_list_is_named_by_shares_and_a_budget_is_chosen(folder):
    budgets = patchslim.load(folder)
    shares = {name: each.card["macs"] / each.card["dense_macs"] for name, each in budgets.items()}
    assert [*budgets] == [f"{share:.2g}" for share in sorted(shares.values())]
    cheap, costly = budgets.values()
    assert budgets.within(1.0) is costly
    assert budgets.within(shares[next(iter(budgets))]) is cheap
    assert budgets.within(costly.card["macs"] - 1) is cheap
    assert budgets.preprocessing.image_size == (24, 24)
    with pytest.raises(BadSetting, match=r"the cheapest model in .* Give at least as many"):
        budgets.within(0.1)
    with pytest.raises(UnknownName, match=r"Unknown budget '0.71'"):
        _ = budgets["0.71"]
    assert repr(budgets).startswith("Budgets(")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"budgets": 2, "package": "9.1"}, "pip install -U 'patchslim>=9.1'"),
        ({"budgets": None}, "has no version"),
        ({"target": "pt2"}, "look at: target"),
        ({"layout": "mine"}, "look at: layout"),
        ({"names": ["../../etc"]}, "look at: names"),
        ({"names": ["a", "a"]}, "look at: names"),
        ({"layout": []}, "look at: layout"),
        ({"bytes_apart": True}, "look at: bytes_apart"),
        ({}, "gone.onnx is missing"),
    ],
)
def test_an_edited_index_is_one_error(tmp_path, edit, says):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "budgets.json").write_text(json.dumps({**INDEX, **edit}))
    with pytest.raises(BadFile, match=says):
        patchslim.load(tmp_path / "m")


@slow
def test_a_folder_is_replaced_only_if_nothing_else_is_in_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    made = host()
    patchslim.export({"only": slim(made, 0.5)}, tmp_path / "m", to="onnx")
    assert sorted(each.name for each in (tmp_path / "m").iterdir()) == [
        "budgets.json", "only.onnx", "weights.bin",
    ]  # fmt: skip
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    with pytest.raises(BadFile, match="holds other things"):
        patchslim.export({"only": slim(made, 0.5)}, tmp_path / "m", to="onnx")
    assert [*patchslim.load(tmp_path / "m")] == ["only"]


def test_models_of_other_weights_are_refused(tmp_path):
    one, other = host(), host()
    other.head.bias.data += 1
    models = {"a": slim(one, 0.4), "b": slim(other, 0.9)}
    with pytest.raises(UnsupportedModel, match=r"'a' and 'b' are not .* head.bias differs"):
        patchslim.export(models, tmp_path / "m", to="onnx")
    models["b"] = slim(wide_host(), 0.9)
    with pytest.raises(UnsupportedModel, match=r"are not of one set of weights: .* differs"):
        patchslim.export(models, tmp_path / "m", to="onnx")
    assert not [*tmp_path.iterdir()]


WRONG = [
    ({"to": None}, BadSetting, "does not tell what it is for. Give to="),
    ({"to": "pt2"}, WrongExport, "pt2 cannot hold several models .*: an archive"),
    ({"to": "aoti"}, WrongExport, "aoti cannot hold several models"),
    ({"to": "executorch"}, WrongExport, "executorch cannot hold several models"),
    ({"path": "m.onnx"}, BadSetting, r"are a folder. Give .*/m\."),
    ({"model": []}, BadSetting, "There is no model"),
    ({"model": [1]}, UnsupportedModel, "not int: slim it first"),
    ({"model": "twice"}, BadSetting, "Two of the models take .* Give names"),
    ({"model": "named"}, BadSetting, "'a/b' is no name for a model"),
    ({"layout": "tensorflow"}, UnknownName, "Unknown layout 'tensorflow'. .*ovms, triton"),
    ({"layout": "ovms"}, WrongExport, "Give to='openvino'"),
    ({"layout": "triton", "to": "pt2"}, WrongExport, "Triton has no backend for pt2"),
    ({"layout": "triton", "to": "openvino"}, WrongExport, "cannot be told to compute in float32"),
    ({"layout": "triton", "path": "a model"}, BadSetting, "the server calls the model 'a model'"),
]


@pytest.mark.parametrize(("call", "error", "says"), WRONG, ids=lambda each: str(each)[:40])
def test_wrong_calls_say_what_is_needed(tmp_path, call, error, says):
    model = slim(host(), 0.5)
    given = {"twice": [model, model], "named": {"a/b": model}, None: [model]}
    call = {"to": "onnx", "path": "m", "model": None, **call}
    call["path"] = tmp_path / call["path"]
    if call["model"] is None or isinstance(call["model"], str):
        call["model"] = given[call["model"]]
    with pytest.raises(error, match=says):
        patchslim.export(**call)
    assert not [*tmp_path.iterdir()]


def parse_pbtxt(path: Path) -> Any:
    """The configuration as Triton reads it."""
    config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(encoding="utf-8"), config.ModelConfig())


@slow
@pytest.mark.parametrize("batch", [None, 2])
def test_a_repository_of_triton(tmp_path, batch):
    import onnxruntime

    models, x = three(), pictures(2)
    written = patchslim.export(
        models, tmp_path / "vit", to="onnx", layout="triton", batch=batch, images=x
    )
    assert [*written] == ["fast", "merged", "good"]
    for number, name in enumerate(written, 1):
        session = onnxruntime.InferenceSession(str(tmp_path / "vit" / str(number) / "model.onnx"))
        (output,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(output), models[name](x), atol=1e-5)
    config = parse_pbtxt(tmp_path / "vit" / "config.pbtxt")
    assert (config.name, config.backend) == ("vit", "onnxruntime")
    assert config.max_batch_size == (0 if batch else 64)
    lead = [batch] if batch else []
    (given,), (answer,) = config.input, config.output
    ports = {each.name: each for each in [*session.get_inputs(), *session.get_outputs()]}
    for port, shape in ((given, [3, 24, 24]), (answer, [5])):
        assert [*port.dims] == lead + shape
        assert ports[port.name].shape[1:] == shape
        assert ports[port.name].type == "tensor(float)"
        assert port.data_type == 11  # TYPE_FP32
    assert config.version_policy.HasField("all")
    assert config.HasField("dynamic_batching") == (batch is None)
    assert [*open_budgets(tmp_path / "vit")] == [*written]


@slow
def test_a_repository_of_triton_for_openvino_is_told_to_use_bfloat16(tmp_path):
    written = patchslim.export(
        slim(host(), 0.5), tmp_path / "vit", to="openvino", precision="bfloat16", layout="triton"
    )
    assert written.path == tmp_path / "vit" / "1"
    config = parse_pbtxt(tmp_path / "vit" / "config.pbtxt")
    assert config.backend == "openvino"
    assert config.parameters["HINT_BF16"].string_value == "YES"


@slow
def test_a_model_for_openvino_model_server(tmp_path):
    import openvino

    model, x = slim(host(), 0.5), pictures(2)
    written = patchslim.export(model, tmp_path / "vit", to="openvino", layout="ovms")
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    (served,) = (each["config"] for each in config["model_config_list"])
    assert (served["name"], served["model_version_policy"]) == ("vit", {"all": {}})
    version = tmp_path / "vit" / served["base_path"] / "1"
    assert written.path == version.resolve()
    compiled = openvino.Core().compile_model(version / "model.xml", "CPU", served["plugin_config"])
    assert str(compiled.input("images").partial_shape) == "[?,3,24,24]"
    with torch.no_grad():
        answer = torch.from_numpy(compiled({"images": x.numpy()})["output"])
        assert torch.allclose(answer, model(x), atol=1e-5)


@slow
def test_a_folder_in_a_repository_of_the_hub_is_opened(folder, tmp_path, monkeypatch):
    """The client keeps files under other names, and its folder holds links to them."""
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--slim"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for each in (repository / "refs", snapshot, blobs):
        each.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    x = pictures(2)
    again, before = patchslim.load("hf-hub:someone/slim"), patchslim.load(folder)
    assert torch.equal(again.within(1)(x), before.within(1)(x))


def test_the_command_knows_the_layouts():
    options = make_parser().commands["export"]._actions
    (layout,) = (each for each in options if each.dest == "layout")
    assert sorted(layout.choices) == layout_names()


def test_layouts_of_servers_number_their_versions():
    for name in ("ovms", "triton"):
        places = find_layout(name).places(find_target("onnx"), ["0.4", "0.9"])
        assert [str(each) for each in places.values()] == ["1/model.onnx", "2/model.onnx"]
    assert str(find_layout("ovms").places(find_target("openvino"), ["a"])["a"]) == "1"


@slow
def test_the_command_exports_several_models(tmp_path, capsys):
    from patchslim.example import digits

    made = digits.host()
    for name, share in (("a", 0.6), ("b", 0.8)):
        patchslim.slim(made, "topk", macs=share).save(tmp_path / name)
    argv = [str(tmp_path / "a"), str(tmp_path / "b"), "--to", "onnx", "--limit", "2", "--json"]
    assert main(["export", *argv, "--out", str(tmp_path / "both")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] < 0.7 * told["bytes_apart"]
    assert [*told["models"]] == ["0.6", "0.8"]
    assert [*patchslim.load(tmp_path / "both")] == ["0.6", "0.8"]
    assert main(["export", *argv[:-1], "--layout", "triton", "--out", str(tmp_path / "vit")]) == 0
    assert "version 2" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "vit" / "2")
    with pytest.raises(PatchslimError, match="missing"):
        patchslim.load(tmp_path / "vit")
