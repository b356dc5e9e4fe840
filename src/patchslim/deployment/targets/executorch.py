"""`executorch`: one file for ExecuTorch, PyTorch's runtime for phones and small devices."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from patchslim.deployment.graph import Graph, quietly
from patchslim.deployment.target import FLOAT32, INT8, Runner, Target
from patchslim.deployment.targets._xnnpack import respell
from patchslim.deployment.targets._xnnpack_int8 import XnnpackQuantiser
from patchslim.errors import BadFile

PLAIN, WITNESS, CARD_METHOD = "forward", "witness", "patchslim_card"
MAGIC = b"patchslim sha256 "
DIGEST_LENGTH = 64
IDENTIFIER = slice(4, 6)  # of the bytes of a program: "ET", and then its version


@dataclass(frozen=True)
class Lowered:
    """A graph whose operators are with XNNPACK as far as it takes them.

    Attributes:
        plain: the program that is written.
        witness: bytes of one that returns its decisions, too.
    """

    plain: Any
    witness: bytes


def lower_graph(
    graph: Graph, change: Callable[[ExportedProgram], ExportedProgram] = lambda program: program
) -> Lowered:
    """Lowers a graph, once plain and once with its decisions among its outputs.

    `change` is what is done to each program before.
    """

    def lower() -> Lowered:
        lowered = _lower(
            {
                WITNESS: change(respell(graph.program())),
                PLAIN: change(respell(graph.program(tells=False))),
            }
        )
        return Lowered(
            lowered.exported_program(PLAIN), _bytes({PLAIN: lowered.exported_program(WITNESS)})
        )

    return quietly(lower)


class ExecuTorch(Target):
    """A program of ExecuTorch for the CPU, with what XNNPACK can compute given to it."""

    name = "executorch"
    suffix = ".pte"
    alone = "each program holds its weights as XNNPACK takes them"
    needs = {"executorch": (1, 5)}  # noqa: RUF012
    extra = "executorch"
    any_batch = False  # with a free number of images, XNNPACK takes no reshape
    precisions = (FLOAT32, INT8)
    refusals = dict.fromkeys(
        ("bfloat16", "float16"), "what XNNPACK leaves to ExecuTorch's own kernels is float32"
    )
    quantiser = XnnpackQuantiser(lower_graph)

    def convert(self, graph: Graph) -> Lowered:
        """The lowered graph, once plain and once with its decisions among its outputs."""
        return lower_graph(graph)

    def strip(self, converted: Lowered, graph: Graph) -> Lowered:
        """The program that is written, in the place of the one that returns its decisions."""
        plain = converted.plain
        return Lowered(plain, quietly(lambda: _bytes({PLAIN: plain})))

    def describe(self, converted: Lowered) -> dict[str, Any]:
        """How many operators XNNPACK takes, in how many partitions, and which are left."""
        return {"delegated": _count_delegated(converted.plain.graph_module)}

    def write(self, converted: Lowered, graph: Graph, card: str, path: Path) -> None:
        """Writes the plain program, a method of it that returns the card, and a digest."""
        content = quietly(lambda: _bytes({PLAIN: converted.plain}, {CARD_METHOD: card}))
        path.write_bytes(seal(content))

    def witness(self, converted: Lowered) -> Runner:
        """Runs the program that returns its decisions."""
        return _runner(_load(converted.witness))

    def open(self, path: Path, threads: int | None = None) -> tuple[str | None, Runner]:
        """The card, which a method of the program returns, and what runs the program."""
        content = _read(path)
        try:
            if threads is not None:
                _set_threads(threads)
            program = _load(content)
            card = None
            if CARD_METHOD in program.method_names:
                card = program.load_method(CARD_METHOD).execute([])[0]
            return card, _runner(program)
        except Exception as error:  # the runtime raises RuntimeError and what Python makes of it
            raise BadFile(f"{path} cannot be read by ExecuTorch: {str(error)[:200]}") from error


def _lower(programs: dict[str, ExportedProgram]) -> Any:
    """The programs, with what XNNPACK can compute put into partitions of its own."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])


def _bytes(programs: dict[str, Any], constants: dict[str, str] | None = None) -> bytes:
    """A file of ExecuTorch with these lowered programs, and methods that return constants."""
    from executorch.exir import EdgeProgramManager

    # Of copies, since the programs would be changed, and could not be written once more.
    made = EdgeProgramManager(copy.deepcopy(programs), constants).to_executorch()
    return bytes(made.buffer)


def _count_delegated(module: torch.fx.GraphModule) -> dict[str, Any]:
    """How many operators of a lowered graph are in partitions, and which are left outside."""
    inside, partitions, left = 0, 0, Counter[str]()
    for node in _operators(module.graph):
        if getattr(node.target, "__name__", "") == "executorch_call_delegate":
            part = getattr(module, str(node.args[0].target))
            inside += len(_operators(part.original_module.graph))
            partitions += 1
        else:
            left[str(node.target.__name__).split(".")[-2:][0]] += 1
    return {
        "operators": inside,
        "of": inside + left.total(),
        "partitions": partitions,
        "left": dict(left.most_common()),
    }


def _operators(graph: torch.fx.Graph) -> list[Any]:
    """The nodes of a graph that compute something."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return [node for node in calls if node.target is not operator.getitem]


def _read(path: Path) -> bytes:
    """The bytes of a program that is as it was written.

    The runtime may end the process over a broken one, so that it is not given one.
    """
    content = path.read_bytes()
    end = len(content) - len(MAGIC) - DIGEST_LENGTH
    if content[IDENTIFIER] != b"ET":
        raise BadFile(f"{path} is no program of ExecuTorch.")
    if end < 0 or content[end:].removeprefix(MAGIC) == content[end:]:
        raise BadFile(
            f"{path} was truncated, or was not written by patchslim: its digest is not at its end. "
            "Copy it again, export it again, or run it with its own runtime."
        )
    if content[end + len(MAGIC) :] != _digest(content[:end]):
        raise BadFile(
            f"{path} is not the file that was exported (its SHA-256 differs). Copy it again, or "
            "export again."
        )
    return content[:end]


def seal(content: bytes) -> bytes:
    """The bytes of a program with their digest at the end, which the runtime does not read."""
    return content + MAGIC + _digest(content)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _load(content: bytes) -> Any:
    """A program in ExecuTorch's own runtime."""

    def load() -> Any:
        from executorch.runtime import Runtime

        return Runtime.get().load_program(content)

    return quietly(load)


def _set_threads(threads: int) -> None:
    """Has XNNPACK run on so many threads, in all programs of this process."""

    def set_threads() -> None:
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(threads)

    quietly(set_threads)


def _runner(program: Any) -> Runner:
    """What runs a program, and keeps it: a method reads the bytes that the program holds."""

    def run(images: Any) -> list[Any]:
        method = program.load_method(PLAIN)  # the program loads it once
        return [each.numpy() for each in method.execute([torch.from_numpy(images)])]

    return run


TARGET = ExecuTorch()
