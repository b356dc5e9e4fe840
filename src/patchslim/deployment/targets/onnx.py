"""`onnx`: one file for ONNX Runtime and whatever else reads ONNX."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from patchslim.deployment.graph import INPUT, Graph, quietly
from patchslim.deployment.nodes import Node, link_nodes
from patchslim.deployment.onnx_file import (
    CARD_KEY,
    SEALED,
    read_card_text,
    seal_file,
    share_weights,
)
from patchslim.deployment.target import FLOAT32, Runner, Target, refuse_to_run
from patchslim.deployment.targets._onnx_attention import choose_opset, translations
from patchslim.deployment.targets._onnx_int8 import OrtQuantiser
from patchslim.errors import BadFile


class Onnx(Target):
    """An ONNX file of opset 23, or of 18 with an old PyTorch, run by ONNX Runtime on the CPU."""

    name = "onnx"
    suffix = ".onnx"
    needs = {"onnx": (1, 18), "onnxscript": (0, 5), "onnxruntime": (1, 23)}  # noqa: RUF012
    extra = "onnx"
    alone = ""
    shows_nodes = True
    precisions = (FLOAT32, "int8")
    quantiser = OrtQuantiser()
    refusals = {  # noqa: RUF012
        "bfloat16": "ONNX Runtime computes nothing in bfloat16 on a CPU",
        "float16": "ONNX Runtime widens float16 on a CPU for most of what a transformer computes",
    }

    def convert(self, graph: Graph) -> Any:
        """The model as a protocol buffer, with its decisions among its outputs."""
        program = graph.program()
        outputs = [*graph.outputs.names, *graph.decision_names]
        opset = choose_opset()

        def convert() -> Any:
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=outputs,
                opset_version=opset,
                optimize=False,
                custom_translation_table=translations(opset),
            )
            if made is None:
                return None
            _simplify(made.model)
            return _name_batch(made.model_proto)

        return quietly(convert)

    def strip(self, converted: Any, graph: Graph) -> Any:
        """The part of the model that telling decisions does not need."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            whole, part = Path(folder) / "whole.onnx", Path(folder) / "part.onnx"
            onnx.save(converted, whole)
            onnx.utils.extract_model(whole, part, [INPUT], [*graph.outputs.names])
            return onnx.load(part)

    def write(self, converted: Any, graph: Graph, card: str, path: Path) -> None:
        """Writes the part of the model that telling decisions does not need, and the card in it."""
        import onnx

        model = self.strip(converted, graph)
        onnx.helper.set_model_props(model, {CARD_KEY: card, **SEALED})
        onnx.save(model, path)
        seal_file(path)

    def share_weights(self, written: Sequence[Path], weights: Path) -> None:
        """Keeps what is large as external data of ONNX, in one file beside the models."""
        share_weights(written, weights)

    def witness(self, converted: Any) -> Runner:
        """Runs the model from memory."""
        return _session(converted.SerializeToString())

    def open(self, path: Path, threads: int | None = None) -> tuple[str | None, Runner]:
        """The card in the file's metadata, and a session of ONNX Runtime."""
        card = read_card_text(path)
        return card, refuse_to_run if card is None else _session(str(path), threads)

    def read_nodes(self, path: Path) -> tuple[list[Node], list[Node]]:
        """The nodes of the file, and those that the session runs after its optimisations."""
        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"
            _session(str(path), optimised=optimised)
            return _read_nodes(path), _read_nodes(optimised)


def _simplify(model: Any) -> None:
    """Folds constants and joins equal nodes, in place.

    PyTorch's exporter would search the graph for dozens of patterns, too. That takes longer than
    all the rest and changes nothing here: ONNX Runtime finds those patterns when it loads a file.
    """
    from onnx_ir.passes import Sequential, common
    from onnxscript.optimizer import fold_constants

    fold_constants(model)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    )(model)


def _name_batch(model: Any) -> Any:
    """Calls the free size of a model "batch", as its users will see it."""
    graph = model.graph
    free = {dim.dim_param for each in graph.input for dim in each.type.tensor_type.shape.dim}
    for each in [*graph.input, *graph.output, *graph.value_info]:
        for dim in each.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param in free:
                dim.dim_param = "batch"
    return model


def _session(
    model: str | bytes, threads: int | None = None, optimised: Path | None = None
) -> Runner:
    """What runs a model in ONNX Runtime on the CPU.

    Its threads stop spinning when a call ends, so that they take no time from anybody else.
    `optimised` is where the graph that it runs is written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads = threads or 0
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base of their own
        shown = "The model" if isinstance(model, bytes) else model
        raise BadFile(f"{shown} cannot be read by ONNX Runtime: {str(error)[:200]}") from error
    return lambda images: list(session.run(None, {INPUT: images}))


def _read_nodes(path: Path) -> list[Node]:
    """The nodes of an ONNX file."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    return link_nodes([(each.op_type, each.input, each.output) for each in nodes])


TARGET = Onnx()
