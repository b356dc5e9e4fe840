"""`Cell`: one question of a sweep, and the key under which its answer is kept."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from patchslim.methods._method import Method, method_settings, needs_no_budget
from patchslim.model.model import SlimModel
from patchslim.model.recipe import to_plain_data
from patchslim.sweep.digests import digest_source, digest_weights

DENSE = "dense"
# What a sweep compares: a method for each budget, a model that was slimmed before, or, as None, the
# dense model on smaller images.
Contestant: TypeAlias = Method | SlimModel | None
DIGITS = 20  # hexadecimal, of a key


@dataclass(frozen=True)
class Variant:
    """A model that is to be scored, before it is built.

    Attributes:
        host: the name of the dense model.
        label: what the method is called here; DENSE for the untouched host.
        budget: share of the operations; None for a method that has no budget, and for DENSE.
        runtime, precision: what runs it, and in which type of numbers.
    """

    host: str
    label: str
    budget: float | None
    runtime: str
    precision: str

    @property
    def name(self) -> str:
        """What the rows of this model are called."""
        return self.label if self.budget is None else f"{self.label} {self.budget:g}"

    @property
    def is_dense(self) -> bool:
        """Whether it is the untouched host."""
        return self.label == DENSE


@dataclass(frozen=True)
class Cell:
    """A model that is to be timed with a number of images in a call."""

    variant: Variant
    batch: int

    @property
    def place(self) -> tuple[str, str, str, int]:
        """What its times can be compared within: host, runtime, precision and batch."""
        return (self.variant.host, self.variant.runtime, self.variant.precision, self.batch)

    def __str__(self) -> str:
        v = self.variant
        return f"{v.host}: {v.name}, {v.runtime} {v.precision}, batch {self.batch}"


def make_cells(
    host: str,
    methods: Mapping[str, Contestant],
    budgets: Sequence[float],
    runtimes: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
) -> Iterator[Cell]:
    """Yields all cells of a host, the dense model first on each runtime and in each precision.

    Cells that differ in the batch alone follow each other, so that a model is built once for them.
    """
    asked: list[tuple[str, float | None]] = [(DENSE, None)]
    for label, method in methods.items():
        free = isinstance(method, SlimModel) or (method is not None and needs_no_budget(method))
        asked += [(label, budget) for budget in ((None,) if free else budgets)]
    for runtime, precision in itertools.product(runtimes, precisions):
        for label, budget in asked:
            variant = Variant(host, label, budget, runtime, precision)
            yield from (Cell(variant, batch) for batch in batches)


def make_key(*parts: Any) -> str:
    """Returns a short text that other parts have not: plain data, dataclasses and methods."""
    plain = [
        asdict(each) if isinstance(each, Variant | Cell) else to_plain_data(each) for each in parts
    ]
    text = json.dumps(plain, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def describe_method(method: Contestant) -> dict[str, Any]:
    """Returns all that a method's choices depend on as plain data; nothing for None."""
    if method is None:
        return {}
    if isinstance(method, SlimModel):
        plan = method.plan
        return {
            **describe_method(method.method),
            "schedule": plan.schedule.to_json(),
            "tail": plan.tail,
            "model": digest_weights(method),
        }
    kind = type(method)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "source": digest_source(kind),
        "settings": method_settings(method),
        "learned": digest_weights(method),
    }
