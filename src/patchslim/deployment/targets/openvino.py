"""`openvino`: a folder with a model for OpenVINO (`model.xml`, `model.bin`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from patchslim.deployment.graph import INPUT, Graph, quietly
from patchslim.deployment.nodes import Node, link_nodes
from patchslim.deployment.running import check_regular
from patchslim.deployment.shared_weights import WEIGHTS_FILE as SHARED_FILE
from patchslim.deployment.shared_weights import SharedWeights, digest_file
from patchslim.deployment.target import FLOAT32, INT8, Runner, Target
from patchslim.deployment.targets._openvino_marks import end_in_products
from patchslim.deployment.targets._openvino_precision import (
    DECIDES,
    INT8_BFLOAT16,
    PRECISION_PATH,
    NncfQuantiser,
    halve_weights,
    keep_decisions,
)
from patchslim.deployment.targets._openvino_sums import part_sums
from patchslim.deployment.targets._openvino_swaps import undo_swaps
from patchslim.errors import BadFile
from patchslim.files import read_json

MODEL_FILE, WEIGHTS_FILE, DIGESTS_FILE = "model.xml", "model.bin", "digests.json"
SHARED_PLACE = f"../{SHARED_FILE}"  # where the weights are if other models have the same
CARD_PATH = ["patchslim", "card"]
# What the plugin computes in. Weights in float16 are widened when they are read. In int8 files that
# were written before 0.12, decisions are not marked, so that all that is not int8 is float32.
HINTS = {
    FLOAT32: "f32",
    "float16": "f32",
    "bfloat16": "bf16",
    "int8": "f32",
    INT8_BFLOAT16: "bf16",
}


def find_hint(precision: str) -> str:
    """What a model that is written now in this precision is to be run with."""
    return HINTS[INT8_BFLOAT16 if precision == INT8 else precision]


class OpenVino(Target):
    """OpenVINO's intermediate representation, run on the CPU."""

    name = "openvino"
    files = (MODEL_FILE, WEIGHTS_FILE, DIGESTS_FILE)
    needs = {"openvino": (2025, 4)}  # noqa: RUF012
    extra = "openvino"
    fault = (
        "on processors with AVX-512, OpenVINO computes wrongly from the sums of whole numbers in "
        "it, and a method that merges or ranks patches may lose some"
    )
    mended = (0, 14)
    alone = ""
    shows_nodes = True
    has_streams = True
    precisions = (FLOAT32, "bfloat16", "float16", "int8")
    quantiser = NncfQuantiser()

    def convert(self, graph: Graph) -> Any:
        """The model in OpenVINO's memory, with its decisions among its outputs."""
        import openvino

        model = quietly(lambda: openvino.convert_model(graph.program(by_product=True)))
        part_sums(model)
        undo_swaps(model)
        end_in_products(model.get_results()[len(graph.outputs.names) :], DECIDES)
        # The converter leaves all sizes open, and a graph with an open size runs more slowly.
        model.reshape([graph.batch or -1, *graph.input_shape])
        names = [*graph.outputs.names, *graph.decision_names]
        for port, name in zip([*model.inputs, *model.outputs], [INPUT, *names], strict=True):
            port.get_tensor().set_names({name})
        return model

    def lower(self, converted: Any, graph: Graph, precision: str) -> Any:
        """A copy in bfloat16 or float16, which remembers how it is to be run."""
        bfloat16 = precision == "bfloat16"
        made = keep_decisions(converted, graph) if bfloat16 else halve_weights(converted)
        made.set_rt_info(precision, PRECISION_PATH)
        return made

    def strip(self, converted: Any, graph: Graph) -> Any:
        """The part of the model that telling decisions does not need."""
        import openvino

        results = converted.get_results()[: len(graph.outputs.names)]
        model = openvino.Model(results, converted.get_parameters(), "patchslim")
        model.set_rt_info(_precision(converted), PRECISION_PATH)
        return model

    def write(self, converted: Any, graph: Graph, card: str, path: Path) -> None:
        """Writes the model without its decisions, the card, and digests."""
        import openvino

        model = self.strip(converted, graph)
        model.set_rt_info(card, CARD_PATH)
        openvino.save_model(model, path / MODEL_FILE, compress_to_fp16=False)
        _write_digests(path, WEIGHTS_FILE)

    def share_weights(self, written: Sequence[Path], weights: Path) -> None:
        """Has the constants of all models refer to one file, in the folder of their folders."""
        with SharedWeights(weights) as shared:
            for path in written:
                _move_constants(path, shared)
        for path in written:
            _write_digests(path, SHARED_PLACE)

    def witness(self, converted: Any) -> Runner:
        """Runs the model from memory."""
        return _compile(converted)

    def open(self, path: Path, threads: int | None = None) -> tuple[str | None, Runner]:
        """The card in the model's runtime information, and the compiled model."""
        model = _read(path)
        card = model.get_rt_info(CARD_PATH).value if model.has_rt_info(CARD_PATH) else None
        return card, _compile(model, {} if threads is None else {"INFERENCE_NUM_THREADS": threads})

    def open_streams(self, path: Path, threads: int, streams: int) -> Runner:
        """Runs a batch on each stream; OpenVINO shares the threads out among them."""
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams}
        queue = openvino.AsyncInferQueue(_compiled(_read(path), settings), streams)

        def run(images: Any) -> list[Any]:
            for _ in range(streams):
                queue.start_async(images)
            queue.wait_all()
            return []

        return run

    def read_nodes(self, path: Path) -> tuple[list[Node], list[Node]]:
        """The nodes of the file, and those of the compiled model, in the plugin's own words."""
        model = _read(path)
        runs = _compiled(model, {}).get_runtime_model()
        return _list_nodes(model), _list_nodes(runs)

    def looks_written(self, path: Path) -> bool:
        """Whether it is a folder with the two files of a model."""
        return (path / MODEL_FILE).is_file() or (path / DIGESTS_FILE).is_file()


def _read(path: Path) -> Any:
    """The model in a folder, if its files are the ones that were written."""
    import openvino

    weights = _check_digests(path)
    try:
        model = openvino.Core().read_model(path / MODEL_FILE, weights)
    except RuntimeError as error:
        raise BadFile(f"{path} cannot be read by OpenVINO: {str(error)[:200]}") from error
    if _precision(model) not in HINTS:
        raise BadFile(
            f"{path} is in {_precision(model)}, which this version of patchslim cannot run: "
            "pip install -U patchslim"
        )
    return model


def _move_constants(path: Path, shared: SharedWeights) -> None:
    """Moves the weights of the model in a folder into a file that it then refers to."""
    tree = ElementTree.parse(path / MODEL_FILE)
    content = (path / WEIGHTS_FILE).read_bytes()
    for layer in tree.iter("layer"):
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None:
            start = int(data.attrib["offset"])
            data.set("offset", str(shared.add(content[start : start + int(data.attrib["size"])])))
    tree.write(path / MODEL_FILE, encoding="utf-8", xml_declaration=True)
    (path / WEIGHTS_FILE).unlink()


def _precision(model: Any) -> str:
    """The precision that a model is to be run in; float32 where it says none."""
    if not model.has_rt_info(PRECISION_PATH):
        return FLOAT32
    return str(model.get_rt_info(PRECISION_PATH).value)


def _compile(model: Any, more: Mapping[str, Any] | None = None) -> Runner:
    """What runs a model."""
    compiled = _compiled(model, more or {})
    return lambda images: [value.copy() for value in compiled(images).to_tuple()]


def _compiled(model: Any, more: Mapping[str, Any]) -> Any:
    """The compiled model, in its own precision, and not in whatever the CPU does fastest."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": HINTS[_precision(model)], **more}
    return openvino.Core().compile_model(model, "CPU", settings)


def _list_nodes(model: Any) -> list[Node]:
    """The nodes of a model, by the kernel that runs each if that is known, or else by name."""
    listed = []
    for each in model.get_ordered_ops():
        facts = each.get_rt_info()
        kind = _plain(facts["layerType"]) if "layerType" in facts else each.get_type_name()
        reads = [
            (source.get_node().get_friendly_name(), source.get_index())
            for source in (port.get_source_output() for port in each.inputs())
        ]
        makes = [(each.get_friendly_name(), port.get_index()) for port in each.outputs()]
        listed.append((kind, reads, makes))
    return link_nodes(listed)


def _plain(value: Any) -> str:
    """What stands in a model's runtime information, as text."""
    return str(getattr(value, "value", value))


def _write_digests(path: Path, weights: str) -> None:
    """Writes the digests of the model and of its weights, and thereby where these are."""
    digests = {name: digest_file(path / name) for name in (MODEL_FILE, weights)}
    (path / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def _check_digests(path: Path) -> Path:
    """Refuses files that are not the ones that were written; returns the one with the weights."""
    try:
        digests: dict[str, str] = read_json(path / DIGESTS_FILE)
        weights = SHARED_PLACE if SHARED_PLACE in digests else WEIGHTS_FILE
        check_regular(path, [weights])
        wrong = [
            name for name in (MODEL_FILE, weights) if digests[name] != digest_file(path / name)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{path} is incomplete: {error}. Copy it again, or export again.") from error
    if wrong:
        raise BadFile(
            f"{path / wrong[0]} is not the file that was exported (its SHA-256 differs). Copy the "
            "folder again, or export again."
        )
    return path / weights


TARGET = OpenVino()
