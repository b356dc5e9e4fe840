"""`pt2`: PyTorch's own exported program, for other compilers and for C++."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from patchslim.deployment.graph import Graph
from patchslim.deployment.target import Runner, Target
from patchslim.errors import BadFile

CARD_FILE = "patchslim.json"


class Pt2(Target):
    """A program of `torch.export`, run by PyTorch without the source of the model."""

    name = "pt2"
    suffix = ".pt2"
    alone = "an archive of PyTorch is one program with its weights"
    refusals = dict.fromkeys(
        ("bfloat16", "float16", "int8"),
        "an exported program is there to be compiled further, and its compiler lowers it",
    )
    # torch.export.load evaluates sizes as Python, and unpickles what weights_only refuses.
    runs_code = True
    reader = "torch.export.load"

    def convert(self, graph: Graph) -> Any:
        """The program with its decisions among its outputs."""
        return graph.program()

    def write(self, converted: Any, graph: Graph, card: str, path: Path) -> None:
        """Writes the program without its decisions, and the card beside it in the archive."""
        # Through memory: PyTorch's writer ends the whole process where a disk is full.
        made = io.BytesIO()
        torch.export.save(graph.program(tells=False), made, extra_files={CARD_FILE: card})
        path.write_bytes(made.getbuffer())

    def witness(self, converted: Any) -> Runner:
        """Runs the program."""
        return _runner(converted)

    def open(self, path: Path, threads: int | None = None) -> tuple[str | None, Runner]:
        """The card in the archive, and the program, which runs on PyTorch's threads."""
        extra = {CARD_FILE: ""}
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.load(file, extra_files=extra)
        except Exception as error:  # a broken archive raises whatever its reader meets
            raise BadFile(
                f"{path} is no exported program of PyTorch: {str(error)[:200]}"
            ) from error
        return extra[CARD_FILE] or None, _runner(program)


def _runner(program: torch.export.ExportedProgram) -> Runner:
    """What runs a program."""
    module = program.module()

    def run(images: Any) -> list[Any]:
        with torch.inference_mode():
            return [each.numpy() for each in module(torch.from_numpy(images))]

    return run


TARGET = Pt2()
