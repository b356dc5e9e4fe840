"""What a plan is made for: PyTorch as it is, or a runtime that models are exported for.

A runtime gives calls to be timed: of a whole model, and of one kind of block.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from patchslim.deployment.conversion import (
    make_graph,
    tell_refused,
    tell_unwritable,
    write_form,
)
from patchslim.deployment.graph import Graph, Outputs
from patchslim.deployment.registry import find_target, target_names
from patchslim.deployment.target import FLOAT32, INT8, Runner, Target
from patchslim.errors import BadSetting, UnknownName
from patchslim.measurement.latency import use_threads
from patchslim.model.forward_pass import ForwardPass
from patchslim.model.model import SlimModel
from patchslim.model.step import BlockStep
from patchslim.runs.interrupts import defer_interrupts
from patchslim.settings import check_choice
from patchslim.tokens.spelling import spell_by_product
from patchslim.tokens.tokens import Tokens

EAGER = "eager"
Call = Callable[[Tensor], object]


@dataclass(frozen=True)
class Blocks:
    """A call that runs some blocks of one kind, and how many they are."""

    run: Callable[[], object]
    count: int


class Runtime(ABC):
    """What runs models: its name, the precision, and how many threads it has.

    Attributes:
        stride: of the numbers of tokens that blocks may be timed with, every how many-th is.
    """

    name: str
    precision: str
    threads: int
    stride: ClassVar[int] = 1

    @abstractmethod
    def dense(self, untouched: SlimModel) -> Call:
        """Returns a call of the dense model, given the slimmed model that removes nothing."""

    @abstractmethod
    def whole(self, model: SlimModel) -> Call:
        """Returns a call of a slimmed model."""

    def target_needs(self) -> list[str]:
        """Lists the distributions whose versions decide on times, besides PyTorch's."""
        return []

    @abstractmethod
    def blocks(self, forward: ForwardPass, step: BlockStep, tokens: Tokens, count: int) -> Blocks:
        """Returns a call of at most `count` blocks that each do what `step` says to `tokens`."""


class Eager(Runtime):
    """PyTorch, which runs the model as it is."""

    name = EAGER

    def __init__(self, precision: str, threads: int) -> None:
        self.precision, self.threads = precision, threads

    def dense(self, untouched: SlimModel) -> Call:
        """Calls the host itself."""
        return untouched.host

    def whole(self, model: SlimModel) -> Call:
        """Calls the slimmed model."""
        return model

    def blocks(self, forward: ForwardPass, step: BlockStep, tokens: Tokens, count: int) -> Blocks:
        """Runs several blocks in turn, so that weights come from memory as in a whole model."""
        depth = forward.plan.shape.depth
        every = sorted({round(each * (depth - 1) / max(count - 1, 1)) for each in range(count)})
        steps = [replace(step, index=index) for index in every]

        def run() -> None:
            for each in steps:
                forward.run_block(each, tokens)

        return Blocks(run, len(steps))


class Exported(Runtime):
    """A runtime that models are converted for, with the number of images fixed in each graph.

    Files are written to a folder of their own. Whether they keep the same tokens is not checked
    here, since that takes longer than to time them; `export` does, for the one that is used.
    """

    stride = 2  # each kind of block is converted by itself, in some seconds

    def __init__(
        self, target: Target, precision: str, threads: int, batch: int, folder: Path
    ) -> None:
        self.target, self.name, self.batch = target, target.name, batch
        self.precision, self.threads, self.folder = precision, threads, folder
        self._written = 0
        self._untouched: dict[tuple[BlockStep, ...], Runner] = {}

    def target_needs(self) -> list[str]:
        """Lists the distributions of the target."""
        return [*self.target.needs]

    def dense(self, untouched: SlimModel) -> Call:
        """Runs the exported model that removes nothing."""
        return self.whole(untouched)

    def whole(self, model: SlimModel) -> Call:
        """Converts and runs the model; the untouched one is converted once."""
        run = self._untouched.get(model.plan.steps)
        if run is None:
            run = self._open(make_graph(model, self.batch))
            if not model.plan.decision_blocks:
                self._untouched[model.plan.steps] = run
        opened = run
        return lambda images: opened(images.cpu().numpy())

    def blocks(self, forward: ForwardPass, step: BlockStep, tokens: Tokens, count: int) -> Blocks:
        """Converts and runs one block, from the middle of the model."""
        middle = replace(step, index=forward.plan.shape.depth // 2)
        model = SlimModel(forward.host, forward.plan).eval()
        run = self._open(
            _BlockGraph(model, Outputs("tensor", ("output",)), self.batch, middle, tokens)
        )
        features = tokens.x.numpy()
        return Blocks(lambda: run(features), 1)

    def _open(self, graph: Graph) -> Runner:
        """Converts a graph, and returns what runs it."""
        with tell_refused(self.target, graph):
            converted = self.target.convert(graph)
            if self.precision != FLOAT32:
                converted = self.target.lower(converted, graph, self.precision)
        self._written += 1
        path = self.folder / f"{self._written}{self.target.suffix}"
        if self.target.files:
            path.mkdir()
        card = json.dumps({"precision": self.precision})
        with tell_unwritable(path):
            write_form(self.target, converted, graph, card, path)
        return self.target.open(path, self.threads)[1]


@contextlib.contextmanager
def open_runtime(
    name: str, precision: str | None, threads: int | None, batch: int, host: nn.Module
) -> Iterator[Runtime]:
    """Gives the runtime of this name; refuses what cannot be planned for."""
    exported = {name: find_target(name) for name in target_names()}
    plannable = [name for name, target in exported.items() if target.shows_nodes]
    if name not in (EAGER, *plannable):
        check_choice("runtime", name, (EAGER, *exported))
        raise BadSetting(
            f"runtime={name!r} cannot be planned for yet: its blocks cannot be timed one by one. "
            f"Known: {', '.join([EAGER, *plannable])}."
        )
    threads = torch.get_num_threads() if threads is None else threads
    own = str(next(host.parameters()).dtype).removeprefix("torch.")
    if name == EAGER:
        if precision not in (None, own):
            raise BadSetting(
                f"precision={precision!r}: PyTorch runs the model as it is, in {own}. Give the "
                "model in that precision, such as model.to(torch.bfloat16); or another runtime."
            )
        with use_threads(threads):
            yield Eager(own, threads)
        return
    target, precision = exported[name], precision or FLOAT32
    allowed = [each for each in target.precisions if each != INT8]
    if precision not in allowed:
        raise UnknownName.of(f"precision to plan for on {name}", precision, allowed)
    target.check_installed(precision)
    with tempfile.TemporaryDirectory() as folder:
        yield Exported(target, precision, threads, batch, Path(folder))


class _OneBlock(nn.Module):
    """One block with what a method does in it, from features to features."""

    def __init__(self, model: SlimModel, step: BlockStep, tokens: Tokens) -> None:
        super().__init__()
        self.model, self.step, self.tokens = model, step, tokens

    def forward(self, x: Tensor) -> Tensor:
        tokens = replace(self.tokens, x=x, size=None, position=None, content=None)
        if self.tokens.size is not None:
            # Sizes of rows that depend on the input: constant ones would be folded into the graph.
            tokens = replace(tokens, size=1.0 + (x[:, tokens.prefix :, 0] > 0).to(x.dtype))
        forward = replace(self.model.start_pass(), packs=False)
        return forward.run_block(self.step, tokens).x


@dataclass(frozen=True)
class _BlockGraph(Graph):
    """One block, to be converted like a whole model."""

    step: BlockStep
    tokens: Tokens

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of the features of one image."""
        return tuple(self.tokens.x.shape[1:])

    @property
    def decision_names(self) -> tuple[str, ...]:
        """No output tells a decision."""
        return ()

    def program(
        self, *, tells: bool = True, by_product: bool = False
    ) -> torch.export.ExportedProgram:
        """PyTorch's exported graph of the block."""
        example = torch.zeros(*self.tokens.x.shape)
        spelling = spell_by_product() if by_product else contextlib.nullcontext()
        block = _OneBlock(self.model, self.step, self.tokens).eval()
        with torch.no_grad(), spelling, defer_interrupts():
            return torch.export.export(block, (example,), strict=False)
