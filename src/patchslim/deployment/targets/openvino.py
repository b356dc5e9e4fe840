"""`openvino`: a folder with a model for OpenVINO (`model.xml`, `model.bin`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from patchslim.deployment.graph import INPUT, Graph, quietly
from patchslim.deployment.target import Runner, Target
from patchslim.errors import BadFile
from patchslim.files import read_json

MODEL_FILE, WEIGHTS_FILE, DIGESTS_FILE = "model.xml", "model.bin", "digests.json"
CARD_PATH = ["patchslim", "card"]


class OpenVino(Target):
    """OpenVINO's intermediate representation in float32, run on the CPU in float32."""

    name = "openvino"
    files = (MODEL_FILE, WEIGHTS_FILE, DIGESTS_FILE)
    needs = {"openvino": (2025, 4)}  # noqa: RUF012
    extra = "openvino"

    def convert(self, graph: Graph) -> Any:
        """The model in OpenVINO's memory, with the kept cells among its outputs."""
        import openvino

        model = quietly(lambda: openvino.convert_model(graph.program(by_product=True)))
        names = [*graph.outputs.names, *graph.kept_names]
        for port, name in zip([*model.inputs, *model.outputs], [INPUT, *names], strict=True):
            port.get_tensor().set_names({name})
        return model

    def write(self, converted: Any, graph: Graph, card: str, path: Path) -> None:
        """Writes the part of the model that the kept cells do not need, the card, and digests."""
        import openvino

        results = converted.get_results()[: len(graph.outputs.names)]
        model = openvino.Model(results, converted.get_parameters(), "patchslim")
        model.set_rt_info(card, CARD_PATH)
        openvino.save_model(model, path / MODEL_FILE, compress_to_fp16=False)
        digests = {name: _digest(path / name) for name in (MODEL_FILE, WEIGHTS_FILE)}
        (path / DIGESTS_FILE).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")

    def witness(self, converted: Any) -> Runner:
        """Runs the model from memory."""
        return _compile(converted)

    def open(self, path: Path) -> tuple[str | None, Runner]:
        """The card in the model's runtime information, and the compiled model."""
        import openvino

        _check_digests(path)
        try:
            model = openvino.Core().read_model(path / MODEL_FILE)
        except RuntimeError as error:
            raise BadFile(f"{path} cannot be read by OpenVINO: {str(error)[:200]}") from error
        card = model.get_rt_info(CARD_PATH).value if model.has_rt_info(CARD_PATH) else None
        return card, _compile(model)

    def looks_written(self, path: Path) -> bool:
        """Whether it is a folder with the two files of a model."""
        return (path / MODEL_FILE).is_file() or (path / DIGESTS_FILE).is_file()


def _compile(model: Any) -> Runner:
    """What runs a model, in float32: in a lower precision, other tokens would be kept."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda images: [value.copy() for value in compiled(images).to_tuple()]


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_digests(path: Path) -> None:
    """Refuses files that are not the ones that were written."""
    try:
        digests: dict[str, str] = read_json(path / DIGESTS_FILE)
        wrong = [
            name for name in (MODEL_FILE, WEIGHTS_FILE) if digests[name] != _digest(path / name)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{path} is incomplete: {error}. Copy it again, or export again.") from error
    if wrong:
        raise BadFile(
            f"{path / wrong[0]} is not the file that was exported (its SHA-256 differs). Copy the "
            "folder again, or export again."
        )


TARGET = OpenVino()
