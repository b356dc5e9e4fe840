"""`Target`: a runtime or file format that a slimmed model can be exported for.

A target converts a graph, writes the result, and runs what it wrote. It knows neither methods nor
hosts, and does not judge whether the result is right: `checking.py` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from patchslim.deployment.graph import Graph
from patchslim.deployment.nodes import Node
from patchslim.deployment.quantiser import Quantiser
from patchslim.versions import check_version

Arrays: TypeAlias = list[NDArray[Any]]
# What runs an artefact: images (B, C, H, W) in float32 give its outputs in their order.
Runner: TypeAlias = Callable[[NDArray[np.float32]], Arrays]
FLOAT32 = "float32"  # every target has this precision
INT8 = "int8"  # what a target's quantiser makes


def refuse_to_run(images: NDArray[np.float32]) -> Arrays:
    """Stands for what runs an artefact that has no card, and so is never called."""
    raise NotImplementedError(f"{len(images)} images for a model that was not written by patchslim")


class Target(ABC):
    """A runtime or file format, in one file of the folder `targets`.

    Attributes:
        name: what `to=` takes: the name of the file.
        suffix: how the path of an artefact ends; empty for a folder.
        files: names of the files in the folder, if it is one.
        needs: the distributions that it needs and their oldest versions.
        extra: the extra of patchslim that installs them.
        any_batch: whether an artefact can take any number of images in a call.
        precisions: in which it can be written; float32 first.
        refusals: for other precisions, why not.
        quantiser: what makes it int8, if that is among its precisions.
        runs_code: whether its reader may run code that is in a file, so that only an artefact that
            was written just now is opened.
        shows_nodes: whether it can list the nodes of the graph that its runtime runs.
        has_streams: whether it can run several calls at a time, each on a part of the threads.
        reader: the function that opens an artefact whose reader runs code.
        fault: what is wrong with artefacts of older versions, which then say so when they are
            opened; empty if nothing is known.
        mended: the first version of patchslim without this fault.
        alone: why several models cannot be one artefact with their weights in common; empty if
            they can.
    """

    name: ClassVar[str]
    suffix: ClassVar[str] = ""
    files: ClassVar[Sequence[str]] = ()
    needs: ClassVar[dict[str, tuple[int, ...]]] = {}
    extra: ClassVar[str | None] = None
    any_batch: ClassVar[bool] = True
    precisions: ClassVar[Sequence[str]] = (FLOAT32,)
    refusals: ClassVar[Mapping[str, str]] = {}
    quantiser: ClassVar[Quantiser | None] = None
    runs_code: ClassVar[bool] = False
    shows_nodes: ClassVar[bool] = False
    has_streams: ClassVar[bool] = False
    reader: ClassVar[str] = ""
    fault: ClassVar[str] = ""
    mended: ClassVar[tuple[int, ...]] = ()
    alone: ClassVar[str] = "each holds its own weights"

    def distributions(self, precision: str) -> list[str]:
        """The distributions that it needs to write in this precision."""
        quantiser = self.quantiser if precision == INT8 else None
        return [*self.needs, *([] if quantiser is None else quantiser.needs)]

    def check_installed(self, precision: str = FLOAT32) -> None:
        """Refuses to go on if the runtime is missing or too old, or what writes this precision."""
        for distribution, oldest in self.needs.items():
            check_version(distribution, oldest, self.extra)
        if precision == INT8 and self.quantiser is not None:
            for distribution, oldest in self.quantiser.needs.items():
                check_version(distribution, oldest, self.quantiser.extra)

    @abstractmethod
    def convert(self, graph: Graph) -> Any:
        """The graph in the target's own form, with its decisions among its outputs."""

    def describe(self, converted: Any) -> dict[str, Any]:
        """What the card says of the converted graph besides, as plain data."""
        return {}

    def lower(self, converted: Any, graph: Graph, precision: str) -> Any:
        """The converted graph in another of its `precisions` than int8, to be written or run.

        What the graph decides is computed in float32, whatever the rest is.
        """
        raise NotImplementedError

    def strip(self, converted: Any, graph: Graph) -> Any:
        """The converted graph without its decisions among its outputs, as it is written.

        Only a target that has lower precisions needs it.
        """
        return converted

    @abstractmethod
    def write(self, converted: Any, graph: Graph, card: str, path: Path) -> None:
        """Writes the artefact, without its decisions, with the card in it.

        `path` is a file to write, or an empty folder.
        """

    def share_weights(self, written: Sequence[Path], weights: Path) -> None:
        """Moves the weights of several artefacts into the file `weights`, equal ones once.

        The artefacts lie in the folder of that file. Only a target that is not `alone` can.
        """
        raise NotImplementedError

    @abstractmethod
    def witness(self, converted: Any) -> Runner:
        """Runs a converted graph as it is, decisions included."""

    @abstractmethod
    def open(self, path: Path, threads: int | None = None) -> tuple[str | None, Runner]:
        """The card in an artefact, None if it has none, and what runs it.

        `threads` is how many it runs on; by default as many as the runtime chooses.
        """

    def open_streams(self, path: Path, threads: int, streams: int) -> Runner:
        """What runs a batch on each of several streams at once, and returns when all are done.

        Only a target that has streams can.
        """
        raise NotImplementedError

    def read_nodes(self, path: Path) -> tuple[list[Node], list[Node]]:
        """The nodes of the graph in an artefact, and of the graph that the runtime makes of it.

        Only a target that shows them can.
        """
        raise NotImplementedError

    def looks_written(self, path: Path) -> bool:
        """Whether `path` looks like something that this target wrote."""
        return path.is_file() and path.name.endswith(self.suffix)
