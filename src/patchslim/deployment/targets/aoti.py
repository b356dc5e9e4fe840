"""`aoti`: a package of machine code that PyTorch's compiler has made for this kind of machine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from patchslim.deployment.graph import Graph, quietly
from patchslim.deployment.target import FLOAT32, Runner, Target
from patchslim.errors import BadFile, MissingExtra

CARD_KEY = "patchslim"


class Aoti(Target):
    """A package of AOTInductor, run by PyTorch in Python or C++ without the source of the model."""

    name = "aoti"
    suffix = ".aoti.pt2"
    alone = "each package is machine code with its weights in it"
    runs_code = True  # it is machine code
    reader = "torch._inductor.aoti_load_package"

    def check_installed(self, precision: str = FLOAT32) -> None:
        """Refuses to go on without a compiler of C++."""
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise MissingExtra(
                "The target aoti compiles C++, and no compiler was found. Install one (on Debian "
                "and Ubuntu: apt install g++), or name it in the variable CXX."
            ) from error

    def convert(self, graph: Graph) -> Any:
        """The compiled graph with its decisions among its outputs, loaded."""
        with tempfile.TemporaryDirectory() as folder:
            return _load(_compile(graph.program(), folder))

    def write(self, converted: Any, graph: Graph, card: str, path: Path) -> None:
        """Compiles the graph without its decisions, with the card in its metadata."""
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(_compile(graph.program(tells=False), folder, {CARD_KEY: card}), path)

    def witness(self, converted: Any) -> Runner:
        """Runs the compiled graph."""
        return _runner(converted)

    def open(self, path: Path, threads: int | None = None) -> tuple[str | None, Runner]:
        """The card in the metadata, and the machine code, which runs on PyTorch's threads."""
        try:
            model = _load(str(path))
            return model.get_metadata().get(CARD_KEY), _runner(model)
        except Exception as error:  # a broken package raises whatever its reader meets
            raise BadFile(f"{path} is no package of AOTInductor: {str(error)[:200]}") from error


def _compile(
    program: torch.export.ExportedProgram, folder: str, metadata: dict[str, str] | None = None
) -> str:
    """Compiles a program into a package in `folder`; returns its path."""
    from torch._inductor import aoti_compile_and_package

    return quietly(
        lambda: aoti_compile_and_package(
            program,
            package_path=str(Path(folder) / "model.pt2"),
            inductor_configs={"aot_inductor.metadata": metadata or {}},
        )
    )


def _load(path: str) -> Any:
    """A package, ready to be called. It is not needed any longer then."""
    from torch._inductor import aoti_load_package

    return quietly(lambda: aoti_load_package(path))


def _runner(model: Any) -> Runner:
    """What runs a loaded package."""

    def run(images: Any) -> list[Any]:
        with torch.inference_mode():
            return [each.numpy() for each in model(torch.from_numpy(images))]

    return run


TARGET = Aoti()
