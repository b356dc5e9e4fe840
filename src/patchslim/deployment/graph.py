"""`Graph`: a slimmed model as PyTorch's exported graph, plain or with what it does to patches."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from patchslim.errors import UnsupportedModel
from patchslim.model.model import SlimModel
from patchslim.runs.interrupts import defer_interrupts
from patchslim.tokens.packing import pad
from patchslim.tokens.spelling import spell_by_product
from patchslim.tokens.tokens import Tokens

INPUT = "images"
Kind = Literal["tensor", "sequence", "mapping"]
T = TypeVar("T")
NO_CELL = -1  # stands for a cell that was dropped


@dataclass(frozen=True)
class Outputs:
    """What a model returns, as a list of tensors with names.

    Attributes:
        kind: whether it returns one tensor, a sequence of them, or tensors by name.
        names: the names of the tensors.
    """

    kind: Kind
    names: tuple[str, ...]

    @classmethod
    def of(cls, answer: Any) -> Outputs:
        """How this answer of a model is made up; refuses what holds anything but tensors."""
        if isinstance(answer, Tensor):
            return cls("tensor", ("output",))
        if isinstance(answer, Mapping):
            kind: Kind = "mapping"
            names = tuple(name for name, value in answer.items() if value is not None)
            values = [answer[name] for name in names]
        else:
            kind, values = "sequence", list(answer) if isinstance(answer, Sequence) else [None]
            names = tuple(f"output_{number}" for number in range(len(values)))
        if not all(isinstance(value, Tensor) for value in values):
            raise UnsupportedModel(
                f"This model returns a {type(answer).__name__} that holds more than tensors, and "
                "runtimes know tensors alone. Export a model that returns a tensor."
            )
        return cls(kind, names)

    def flatten(self, answer: Any) -> list[Tensor]:
        """The tensors in the order of their names."""
        if self.kind == "tensor":
            return [answer]
        return [answer[name] for name in self.names] if self.kind == "mapping" else list(answer)


class Witness(nn.Module):
    """Returns what a slimmed model does, and what each deciding block does to the grid's cells.

    That is, for each of `blocks`, the cell that stands for every cell afterwards (B, cells): itself
    if it is kept, the one that it was merged into, or `NO_CELL`. The order of rows does not matter.
    With a `last` block, nothing is run after it, and only what it does is returned.
    """

    def __init__(
        self, model: SlimModel, outputs: Outputs, *, tells: bool = True, last: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.outputs, self.tells, self.last = model, outputs, tells, last
        self.blocks = model.plan.decision_blocks

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs, and then what stands for each cell after each deciding block."""
        forward = replace(self.model.start_pass(), packs=False)
        standing: list[Tensor] = []
        tokens = forward.embed(images, {}, track=self.tells or forward.facts.returns_rows)
        for step in forward.steps(tokens):
            tokens = forward.run_block(step, tokens)
            if self.tells and step.index in self.blocks:
                standing.append(_standing_cells(tokens))
            if step.index == self.last:
                return (standing[-1],)
        answer = forward.adapter.head(forward.host, pad(tokens.rejoin()), {})
        return (*self.outputs.flatten(answer), *standing)


def _standing_cells(tokens: Tokens) -> Tensor:
    """The grid cell that stands for each cell (B, cells); `NO_CELL` if it was dropped."""
    row = tokens.origin
    if row is None:
        # Only the prefix came out of the last block. An output without numbers would end the
        # process in OpenVINO's converter.
        height, width = tokens.grid
        shape = (tokens.x.shape[0], height * width)
        return torch.full(shape, NO_CELL, device=tokens.x.device)
    return torch.where(row >= 0, tokens.cells().gather(1, row.clamp(min=0)), NO_CELL)


@dataclass(frozen=True)
class Graph:
    """A slimmed model to be converted.

    Attributes:
        model: the model, in evaluation mode, on the CPU, in float32.
        outputs: what it returns.
        batch: how many images the graph takes; None for any number.
    """

    model: SlimModel
    outputs: Outputs
    batch: int | None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return self.model.plan.adapter.describe(self.model.host).image_shape

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of what it takes, without the number of images."""
        return self.image_shape

    @property
    def decision_names(self) -> tuple[str, ...]:
        """Names of the outputs that tell what stands for each cell."""
        return tuple(f"decision_{block}" for block in self.model.plan.decision_blocks)

    def program(
        self, *, tells: bool = True, by_product: bool = False
    ) -> torch.export.ExportedProgram:
        """PyTorch's exported graph.

        Args:
            tells: whether what stands for each cell is among its outputs.
            by_product: whether matrix products add rows up (see `tokens/spelling.py`).
        """
        # Not 1 image, which PyTorch would take for the only number.
        example = torch.zeros(self.batch or 2, *self.input_shape)
        dynamic = None if self.batch else {INPUT: {0: torch.export.Dim("batch", min=1)}}
        witness = Witness(self.model, self.outputs, tells=tells).eval()
        spelling = spell_by_product() if by_product else contextlib.nullcontext()
        # Ctrl-C while PyTorch traces may end the whole process, so it waits for some seconds.
        with warnings.catch_warnings(), torch.no_grad(), spelling, defer_interrupts():
            warnings.simplefilter("ignore")
            program = torch.export.export(witness, (example,), dynamic_shapes=dynamic, strict=False)
        return _without_resampling(program)


def _without_resampling(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The graph without resampling to the size that is there already, which changes nothing.

    A host of timm that takes any size of images resamples its positions in every graph, lest it be
    for one size alone; a graph of ours is. OpenVINO has no such operation.
    """
    for node in list(program.graph.nodes):
        if node.op == "call_function" and "upsample" in str(node.target):
            source = node.args[0]
            if source.meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def kept_cells(standing: Tensor) -> Tensor:
    """Which grid cells stand for themselves (B, cells)."""
    return standing == torch.arange(standing.shape[1])


def quietly(convert: Callable[[], T]) -> T:
    """Runs a converter without what it prints and logs to its own developers."""
    import contextlib
    import io
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            defer_interrupts(),
        ):
            warnings.simplefilter("ignore")
            return convert()
    finally:
        logging.disable(before)
