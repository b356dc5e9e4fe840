"""What runs the models of a sweep: PyTorch itself, or a runtime that models are exported for."""

from __future__ import annotations

import copy
import itertools
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from patchslim.deployment.artefact import Artefact, open_artefact
from patchslim.deployment.export import export
from patchslim.deployment.registry import find_target, target_names
from patchslim.deployment.target import INT8, Target
from patchslim.errors import BadFile, BadSetting, UnknownName
from patchslim.measurement.sample import fill_batch, move_to_host
from patchslim.measurement.score import Batch
from patchslim.model.model import SlimModel
from patchslim.settings import check_choice

M = TypeVar("M", bound=nn.Module)

EAGER = "eager"
EAGER_PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Opened:
    """A model that can be timed and scored.

    Attributes:
        run: what is timed: from the images as `prepare` returns them.
        prepare: brings images to where the model takes them, before they are timed.
        logits: what is scored: from images to class scores.
        spent: the operations of each image that was scored, where images differ in them.
    """

    run: Callable[[Tensor], object]
    prepare: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    spent: list[int] = field(default_factory=list)


class Backend(ABC):
    """Opens models on a runtime, in a precision.

    Attributes:
        runtime, precision: their names.
        needs: the distributions whose versions decide on times, besides PyTorch's.
    """

    runtime: str
    precision: str
    needs: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Deletes what was written for the runtime."""

    @abstractmethod
    def open_dense(self, untouched: SlimModel) -> Opened:
        """Opens the dense model, given the slimmed model that removes nothing."""

    @abstractmethod
    def open(self, model: SlimModel) -> Opened:
        """Opens a slimmed model."""


class Eager(Backend):
    """PyTorch, which runs the model as it is, or a copy of it in a lower precision."""

    runtime = EAGER

    def __init__(self, precision: str) -> None:
        check_choice("precision", precision, EAGER_PRECISIONS)
        self.precision = precision

    def __exit__(self, *_: object) -> None:
        """Has written nothing."""

    def open_dense(self, untouched: SlimModel) -> Opened:
        """Opens the host itself."""
        adapter, host = untouched.plan.adapter, self._convert(untouched.host)
        return Opened(
            host,
            lambda images: move_to_host(images, host),
            lambda images: adapter.logits(host(move_to_host(images, host))).float(),
        )

    def open(self, model: SlimModel) -> Opened:
        """Opens the slimmed model; where images cost different amounts, these are noted."""
        made = self._convert(model)
        adapter, spent = made.plan.adapter, list[int]()

        def logits(images: Tensor) -> Tensor:
            images = move_to_host(images, made.host)
            if not made.method.adaptive:
                return adapter.logits(made(images)).float()
            output, costs = made.forward_with_costs(images)
            spent.extend(cost.total for cost in costs)
            return adapter.logits(output).float()

        return Opened(made, lambda images: move_to_host(images, made.host), logits, spent)

    def _convert(self, model: M) -> M:
        """Returns the model in evaluation mode; a copy if its numbers are of another type."""
        dtype: torch.dtype = getattr(torch, self.precision)
        if next(model.parameters()).dtype == dtype:
            return model
        return copy.deepcopy(model).to(dtype).eval()


class Exported(Backend):
    """A runtime that models are exported for; the files are deleted at the end of `with`."""

    def __init__(
        self,
        target: Target,
        precision: str,
        threads: int | None,
        calibration: Iterable[Batch] | None,
    ) -> None:
        if precision not in target.precisions:
            raise UnknownName.of(f"precision of {target.name}", precision, target.precisions)
        if precision == INT8 and calibration is None:
            raise BadSetting(
                "int8 is calibrated on images: give `calibration`, others than those to score."
            )
        target.check_installed(precision)
        self.target, self.runtime, self.precision = target, target.name, precision
        self.threads, self.calibration = threads, calibration
        self.needs = tuple(target.needs)
        self._folder = tempfile.TemporaryDirectory(prefix="patchslim-bench-")
        self._numbers = itertools.count()

    def __exit__(self, *_: object) -> None:
        """Deletes the files."""
        self._folder.cleanup()

    def open_dense(self, untouched: SlimModel) -> Opened:
        """Exports and opens the model that removes nothing."""
        return self.open(untouched)

    def open(self, model: SlimModel) -> Opened:
        """Exports the model, checked as always, and opens the file."""
        path = Path(self._folder.name) / f"{next(self._numbers)}{self.target.suffix}"
        images = self.calibration if self.precision == INT8 else None
        export(model, path, self.runtime, precision=self.precision, images=images)
        artefact = open_artefact(path, threads=self.threads)
        if artefact is None:
            raise BadFile(f"{path} was written and is gone. Another process may have moved it.")
        logits = _in_parts(artefact)
        return Opened(logits, Tensor.cpu, logits)


def known_precisions() -> tuple[str, ...]:
    """Lists the precisions that any runtime has."""
    exported = (each for name in target_names() for each in find_target(name).precisions)
    return tuple(dict.fromkeys([*EAGER_PRECISIONS, *exported]))


def open_backend(
    runtime: str, precision: str, threads: int | None, calibration: Iterable[Batch] | None
) -> Backend:
    """Opens the backend of these names; refuses what does not exist or is not installed."""
    check_choice("runtime", runtime, (EAGER, *target_names()))
    if runtime == EAGER:
        return Eager(precision)
    return Exported(find_target(runtime), precision, threads, calibration)


def _in_parts(artefact: Artefact) -> Callable[[Tensor], Tensor]:
    """Calls a file that takes a fixed number of images once for each part of a batch."""
    fixed: int | None = artefact.card["batch"]
    if fixed is None:
        return artefact.logits

    def logits(images: Tensor) -> Tensor:
        parts = [
            artefact.logits(fill_batch(part, fixed))[: len(part)] for part in images.split(fixed)
        ]
        return torch.cat(parts)

    return logits
