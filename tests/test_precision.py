"""Artefacts in less than float32: what they change is told, and too much of it is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import patchslim
from patchslim import versions
from patchslim.cli.main import main
from patchslim.deployment import int8
from patchslim.deployment.drift import Drift, Limits, Reference
from patchslim.deployment.graph import NO_CELL, Graph, Outputs, Witness
from patchslim.deployment.int8 import in_batches, quantise
from patchslim.deployment.quantiser import Quantiser
from patchslim.errors import BadFile, BadSetting, MissingExtra, UnsupportedModel, WrongExport
from test_export import Pretence, artefact_path, pictures, slim

slow = pytest.mark.slow


class Rounding(Quantiser):
    """Eight bits as noise: each place adds some to the logits, and place `b` by far the most."""

    recipes = ("poor", "good")
    noise = {"a": 0.02, "b": 1.0, "c": 0.01, "d": 0.04}  # noqa: RUF012

    def __init__(self) -> None:
        self.calibrated: list[Tensor] = []

    def quantise(self, converted: Any, graph: Graph, images: Any, recipe: str) -> Any:
        self.calibrated = [*images]
        extra = {"recipe": 2.0} if recipe == "poor" else {}
        return converted, {**self.noise, **extra}

    def list_places(self, quantised: Any) -> list[str]:
        return [*quantised[1]]

    def leave_float(self, quantised: Any, places: Any) -> Any:
        converted, noise = quantised
        return converted, {name: size for name, size in noise.items() if name not in places}


class Noisy(Pretence):
    """The pretence with an int8 that adds noise."""

    precisions = ("float32", "int8")

    def __init__(self) -> None:
        super().__init__()
        self.quantiser = Rounding()  # type: ignore[misc]

    def witness(self, converted: Any) -> Any:
        module, noise = converted
        run = super().witness(module)
        wave = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.2]) * sum(noise.values())

        def noisy(images: Any) -> list[Any]:
            logits, *kept = run(images)
            return [logits + wave.numpy(), *kept]

        return noisy


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph(slim(), Outputs("tensor", ("output",)), None)


def lower(graph: Graph, images: Tensor, **limits: float) -> tuple[Any, Drift, Noisy]:
    target = Noisy()
    witness = Witness(graph.model, graph.outputs)
    made, _, drift = quantise(target, witness, graph, images, Limits(**limits))
    return made, drift, target


def test_the_best_recipe_is_chosen_on_images_that_did_not_calibrate(graph):
    images = pictures(9)
    made, drift, target = lower(graph, images, kl=100.0)
    assert made[1] == Rounding.noise
    assert (drift.recipe, drift.images, drift.kept, drift.same_tokens) == ("good", 4, 1.0, 1.0)
    assert torch.equal(torch.cat(target.quantiser.calibrated), images[::2])


def test_as_few_activations_as_will_do_are_left_in_float(graph):
    _, first, _ = lower(graph, pictures(9), kl=100.0)
    made, drift, _ = lower(graph, pictures(9), kl=first.kl / 5)
    assert [*made[1]] == ["a", "c", "d"]
    assert drift.recipe == "good, 1 of 4 activations in float32"
    assert drift.kl <= first.kl / 5
    two, _, _ = lower(graph, pictures(9), kl=drift.kl / 2)
    assert [*two[1]] == ["a", "c"]


def test_without_a_limit_few_activations_stay_in_float_for_the_aim(graph, monkeypatch):
    monkeypatch.setattr(int8, "AIM", Limits(kl=1e-9))
    made, drift, _ = lower(graph, pictures(9))
    assert [*made[1]] == ["a", "c", "d"]
    assert drift.recipe == "good, 1 of 4 activations in float32"
    monkeypatch.setattr(int8, "AIM", Limits(kl=100.0))
    made, drift, _ = lower(graph, pictures(9))
    assert (made[1], drift.recipe) == (Rounding.noise, "good")


def test_a_limit_that_cannot_be_met_is_an_error(graph, monkeypatch):
    monkeypatch.setattr(Rounding, "leave_float", lambda self, quantised, places: quantised)
    with pytest.raises(WrongExport, match=r"max_kl=0.0001; with every activation in float32 and"):
        lower(graph, pictures(9), kl=1e-4)


def test_a_target_that_leaves_nothing_in_float_is_taken_or_refused_as_it_is(graph, monkeypatch):
    monkeypatch.setattr(Rounding, "list_places", lambda self, quantised: [])
    with pytest.raises(WrongExport, match=r"max_kl=0.0001. Nothing was written. Allow more, or"):
        lower(graph, pictures(9), kl=1e-4)
    monkeypatch.setattr(int8, "AIM", Limits(kl=1e-9))
    made, drift, _ = lower(graph, pictures(9))
    assert (made[1], drift.recipe) == (Rounding.noise, "good")


@pytest.mark.parametrize("images", [None, pictures(1), []])
def test_int8_needs_images(tmp_path, images):
    with pytest.raises(BadSetting, match=r"int8 needs images= \(--data\)"):
        patchslim.export(slim(), tmp_path / "m.onnx", precision="int8", images=images)
    assert not [*tmp_path.iterdir()]


def test_limits_name_what_is_too_large():
    drift = Drift("int8", 10, 1.0, kl=0.02, agreement=0.9, kept=1.0)
    assert not Limits().excess(drift)
    assert not Limits(0.02, 0.11).excess(drift)
    assert Limits(0.01, 0.05).excess(drift) == (
        "its KL to float32 is 0.0200, and max_kl=0.01 and it changes the first answer on 10.0% of "
        "the images, and max_drop=0.05"
    )
    nan = Drift("int8", 10, 1.0, kl=float("nan"), agreement=0.9, kept=1.0)
    assert "nan" in Limits(kl=1.0).excess(nan)


def test_patches_in_common_are_counted(graph):
    reference = Reference(graph, [pictures(4)])
    right = [each.numpy() for each in reference.answers[0]]
    assert reference.measure(lambda images: right, "int8").kept == 1
    logits, first, second = right
    swapped = second.copy()
    kept = swapped[0] == np.arange(36)
    swapped[0, kept.argmax()], swapped[0, kept.argmin()] = NO_CELL, kept.argmin()
    drift = reference.measure(lambda images: [logits, first, swapped], "int8")
    rows = (first[0] == np.arange(36)).sum() + kept.sum()
    assert drift.same_tokens == 0.75
    assert drift.kept == pytest.approx(1 - (1 - (rows - 1) / (rows + 1)) / 4)


def test_answers_that_are_no_class_scores_have_no_divergence(graph):
    reference = Reference(graph, [pictures(2)])
    logits, *kept = reference.answers[0]
    reference.answers = [[logits[:, None], *kept]]
    with pytest.raises(UnsupportedModel, match="not with class scores"):
        reference.measure(lambda images: [v.numpy() for v in reference.answers[0]], "int8")


def test_batches_of_a_fixed_size_are_filled_up():
    images = pictures(3)
    assert [len(each) for each in in_batches(images, None, 2)] == [2, 1]
    filled = in_batches(images, 2, 1)
    assert torch.equal(torch.cat(filled), torch.cat([images, images[:1]]))


def test_int8_without_nncf_names_its_extra(tmp_path, monkeypatch):
    model = slim()
    known = versions.installed_version
    monkeypatch.setattr(
        "patchslim.versions.installed_version",
        lambda name: None if name == "nncf" else known(name),
    )
    with pytest.raises(MissingExtra, match=r"nncf is not .* pip install 'patchslim\[int8\]'"):
        patchslim.export(model, tmp_path / "m", to="openvino", precision="int8", images=pictures(4))
    assert not [*tmp_path.iterdir()]


LOWER = [("openvino", "bfloat16"), ("openvino", "float16"), ("openvino", "int8"), ("onnx", "int8")]


@slow
@pytest.mark.parametrize(("target", "precision"), LOWER)
def test_real_runtimes_run_what_the_card_says(tmp_path, target, precision):
    model, x, path = slim("topk"), pictures(16), artefact_path(tmp_path, target)
    written = patchslim.export(model, path, to=target, precision=precision, images=x, max_kl=0.05)
    drift = written.check.drift
    assert written.card["precision"] == drift.precision == precision
    assert drift.agreement == 1
    assert drift.kept > 0.9
    again = patchslim.load(path)
    assert again.card["checked"]["drift"]["kl"] == drift.kl
    with torch.no_grad():
        off = (again(x) - model(x)).abs().max()
    # Not float32, and not another model.
    assert (1e-6 if precision == "float16" else 1e-4) < off < 0.3


@slow
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    ("method", "kinds"),
    [("tome", {"MatMul", "Reduce"}), ("similarity", {"MatMul", "Reduce", "Softmax"})],
)
def test_decisions_are_computed_in_float32(method, kinds, precision, tmp_path):
    import openvino

    from patchslim.deployment.targets._openvino_precision import ADDS, DECIDES

    written = patchslim.export(
        slim(method),
        tmp_path / "m",
        to="openvino",
        precision=precision,
        batch=2,
        images=pictures(8),
    )
    hint = {"INFERENCE_PRECISION_HINT": "bf16"}
    compiled = openvino.Core().compile_model(written.path / "model.xml", "CPU", hint)
    ran: dict[str, set[str]] = {}
    for node in compiled.get_runtime_model().get_ops():
        facts = node.get_rt_info()
        kind, gives = facts["layerType"].value, facts["outputPrecisions"].value.split(",")
        decides = facts["originalLayersNames"].value.startswith((DECIDES, ADDS))
        ran.setdefault(f"{'decides ' if decides else ''}{kind}", set()).update(gives)
    # Scores and what they are from; whole numbers and truth values are neither rounded nor "f32".
    assert all("f32" in ran[f"decides {kind}"] for kind in kinds)
    assert not [kind for kind, each in ran.items() if "decides" in kind and "bf16" in each]
    facts = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    read = {name: set() for name in ("FullyConnected", "adds")}
    for each in facts:
        adds = each["originalLayersNames"].value.startswith(ADDS)
        kind = "adds" if adds else each["layerType"].value
        read.setdefault(kind, set()).add(each["runtimePrecision"].value)
    assert read["FullyConnected"] & ({"bf16"} if precision == "bfloat16" else {"i8", "u8"})
    if precision == "bfloat16":
        assert read["adds"] == {"bf16"}  # exact there, and quicker


@slow
@pytest.mark.parametrize("method", ["tome", "similarity"])
def test_the_graph_that_tells_its_decisions_rounds_like_the_one_that_is_written(method):
    from patchslim.deployment.registry import find_target

    target, x = find_target("openvino"), pictures(2).numpy()
    graph = Graph(slim(method), Outputs("tensor", ("output",)), 2)
    told = target.lower(target.convert(graph), graph, "bfloat16")
    witness = target.witness(told)(x)
    written = target.witness(target.strip(told, graph))(x)
    assert (len(witness), len(written)) == (1 + len(graph.decision_names), 1)
    assert (witness[0] == written[0]).all()
    assert all(each.dtype.kind == "i" for each in witness[1:])


@slow
def test_an_openvino_folder_in_an_unknown_precision_is_refused(tmp_path):
    from patchslim.deployment.targets.openvino import HINTS, TARGET

    path = patchslim.export(slim(), tmp_path / "m", to="openvino").path
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(HINTS, "float32")
        with pytest.raises(BadFile, match="is in float32, which this version"):
            TARGET.open(path)


@slow
def test_half_the_bytes_in_float16(tmp_path):
    sizes = {}
    for precision in ("float32", "float16"):
        made = patchslim.export(slim(), tmp_path / precision, to="openvino", precision=precision)
        sizes[precision] = (made.path / "model.bin").stat().st_size
    assert sizes["float16"] < 0.65 * sizes["float32"]


@slow
@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_sensitive_activations_stay_in_float(tmp_path, target):
    model, x, path = slim("topk"), pictures(8), artefact_path(tmp_path, target)
    every = patchslim.export(model, path, to=target, precision="int8", images=x).check.drift
    weights = path if path.is_file() else path / "model.bin"
    before = weights.read_bytes()
    with pytest.raises(WrongExport, match="weights alone in int8"):
        patchslim.export(model, path, to=target, precision="int8", images=x, max_kl=1e-12)
    assert weights.read_bytes() == before
    again = patchslim.export(
        model, path, to=target, precision="int8", images=x, max_kl=0.9 * every.kl
    )
    assert "activations in float32" in again.check.drift.recipe
    assert again.check.drift.kl <= 0.9 * every.kl


@slow
def test_weights_are_looked_for_among_constants_alone():
    """Else the search would go through the whole model, along every path."""
    import numpy as np
    from openvino import opset13 as op

    from patchslim.deployment.targets._openvino_precision import _widened

    x = op.parameter([2], np.float32)
    for _ in range(100):
        x = op.add(x, x)
    assert _widened(op.multiply(x, op.constant(np.ones(2, np.float32)))) is None
    weights = op.convert(op.constant(np.array([2, 3], np.int8)), np.float32)
    scaled = op.multiply(weights, op.constant(np.array([0.5, 2], np.float32)))
    assert _widened(scaled).tolist() == [1, 6]


@slow
def test_every_layer_of_the_host_is_int8_in_executorch(tmp_path):
    model, x, path = slim("topk"), pictures(8), tmp_path / "m.pte"
    drift = patchslim.export(model, path, precision="int8", images=x, max_kl=0.05).check.drift
    assert (drift.precision, drift.images, drift.agreement) == ("int8", 4, 1)
    made = patchslim.load(path)
    with torch.no_grad():
        off = (made(x[:1]) - model(x[:1])).abs().max()
    assert 1e-4 < off < 0.3
    # No layer is left to plain kernels, and none of their roundings.
    assert not [name for name in made.card["delegated"]["left"] if "quant" in name or "mm" in name]


@slow
def test_what_a_method_learned_decides_in_float32_in_executorch(tmp_path):
    from patchslim.deployment.targets import _xnnpack_int8

    program = Graph(slim("dynamicvit"), Outputs("tensor", ("output",)), 1).program()
    rounded = _xnnpack_int8.round_layers(program, pictures(1))
    layers = [node for node in rounded.graph.nodes if node.target is _xnnpack_int8.LINEAR]
    of_method = [node for node in layers if "dequantize" not in node.args[0].name]
    assert 0 < len(of_method) < len(layers)


@slow
def test_a_batch_of_a_fixed_size_becomes_int8(tmp_path):
    written = patchslim.export(
        slim(), tmp_path / "m.onnx", precision="int8", images=pictures(8), batch=2
    )
    assert written(pictures(2)).shape == (2, 5)


@slow
def test_the_command_takes_a_precision(tmp_path, capsys):
    out = tmp_path / "digits.onnx"
    argv = f"export digits --macs 0.7 --method topk --precision int8 --out {out} --limit 12 --json"
    assert main(argv.split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["precision"], told["check"]["drift"]["images"]) == ("int8", 6)
    assert main([*argv.split(), "--max-kl", "-1"]) == 2


@slow
def test_rows_are_counted_in_whole_numbers_above_256(tmp_path):
    torch.manual_seed(0)
    host = timm.models.VisionTransformer(
        img_size=384, patch_size=16, embed_dim=64, depth=3, num_heads=2, num_classes=5
    ).eval()
    made = patchslim.export(
        patchslim.slim(host, "tome", r=8), tmp_path / "big", to="openvino", precision="bfloat16",
        batch=2, images=torch.randn(4, 3, 384, 384),
    )  # fmt: skip
    assert made.check.drift.kept > 0.99
