"""`slim`: the verb that puts a model, a method and a schedule together, and checks the result.

The check is run every time, on the user's own model: with nothing removed, the slimmed model must
give what the host gives. A host that fails it is refused.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from patchslim.adapter import Adapter, find_adapter
from patchslim.cost import Cost, HostShape, dense_macs, slim_macs
from patchslim.errors import (
    BadSchedule,
    DeepCut,
    ImpossibleBudget,
    NeedsClassToken,
    UnknownName,
    UnsupportedModel,
)
from patchslim.model import SlimModel, Tail
from patchslim.reducer import Reducer, Spread, find_reducer, reducer_names
from patchslim.schedule import Constant, Counts, Rate, Schedule, stages, total_counts
from patchslim.versions import check_version

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Budget(TypedDict, total=False):
    """How much to keep. Give one of macs, keep, r, keep_rate; `at` goes with the last and keep."""

    macs: float
    keep: float | Sequence[int]
    r: float | Sequence[int] | tuple[int, float]
    keep_rate: float
    at: Sequence[int]


def slim(
    model: nn.Module,
    method: str | Reducer = "tome",
    schedule: Schedule | str | Path | None = None,
    *,
    tail: Tail | None = None,
    adapter: Adapter | None = None,
    **budget: Unpack[Budget],
) -> SlimModel:
    """`model` with fewer tokens: the same call, the same kind of output. The model is not changed.

    Args:
        model: a timm or Hugging Face vision transformer, with its weights.
        method: a name (`patchslim methods` lists them) or a Reducer of your own.
        schedule: a Schedule, or the path of a saved one, instead of a budget.
        tail: "exact" computes in the last block only the rows that the head reads, with the same
            answer; "full" computes all. By default exact where `macs` is asked for.
        adapter: an Adapter of your own, for a model of a family that does not ship here.
        **budget: one of
            macs: multiply-adds, as a share of the model's own (0.6) or as a number (0.8e9);
            keep: the share of patches left at the end, or the tokens left after each block;
            r: tokens removed in every block; a list, one a block; or (r, inflect);
            keep_rate: the share of patches kept at each of the blocks `at` (3,6,9 of 12).

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    check_version("torch")
    if isinstance(model, SlimModel):
        raise UnsupportedModel("This model is slimmed already; slim its .host instead.")
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"slim() takes a torch.nn.Module, not {type(model).__name__}.")
    adapter = adapter or find_adapter(model)
    reducer = find_reducer(method)() if isinstance(method, str) else method
    shape = adapter.shape(model)
    check_class_token(model, adapter, reducer)
    tail = tail or ("exact" if "macs" in budget and schedule is None else "full")
    rule = plan(shape, reducer, schedule, tail=tail, **budget)
    rule.warn_if_short(shape.entering, shape.prefix, shape.depth, reducer)
    slimmed = SlimModel(model, adapter, reducer, rule, tail)
    check_identity(slimmed)
    _warn_if_deep(slimmed.macs(), slimmed.dense_macs())
    return slimmed


def plan(
    shape: HostShape,
    reducer: Reducer,
    schedule: Schedule | str | Path | None = None,
    *,
    tail: Tail = "full",
    **budget: Unpack[Budget],
) -> Schedule:
    """The schedule that a budget, a saved file or nothing at all means for this host and method."""
    known = set(Budget.__annotations__)
    for name in budget:
        if name not in known:
            raise UnknownName.of("budget", name, known)
    asked = [name for name in ("macs", "keep", "r", "keep_rate") if budget.get(name) is not None]
    if len(asked) + (schedule is not None) > 1:
        given = [*asked, *(["schedule"] if schedule is not None else [])]
        raise BadSchedule(f"Give one of them, not several: {', '.join(given)}.")
    if schedule is not None:
        return schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    if not asked:
        if reducer.fewest(2) == 2:
            return Constant(0)
        raise BadSchedule("How much is to be kept? Give macs=0.6, keep=0.5, r=13 or keep_rate=0.7.")
    at = tuple(budget["at"]) if budget.get("at") is not None else None
    if at is not None and asked[0] in ("macs", "r") and reducer.spread is Spread.EVERY_BLOCK:
        raise BadSchedule(
            f"at={at} goes with keep_rate or keep, not with {asked[0]} of this method."
        )
    if asked[0] == "macs":
        return solve(shape, reducer, budget["macs"], tail=tail, at=at)
    if asked[0] == "keep":
        return _keep(shape, reducer, budget["keep"], at)
    if asked[0] == "r":
        return _removed(shape, budget["r"])
    return Rate(budget["keep_rate"], at or stages(shape.depth))


def solve(
    shape: HostShape,
    reducer: Reducer,
    macs: float,
    *,
    tail: Tail,
    at: tuple[int, ...] | None = None,
) -> Schedule:
    """The schedule, of the kind natural to the method, of the largest cost not above `macs`.

    The cost falls in steps as the rule's one number moves, so bisection finds the step.
    """
    dense = dense_macs(shape).total
    target = macs_target(macs, dense)
    spread = Spread.STAGES if at is not None else reducer.spread
    places = at or stages(shape.depth)
    most = float(shape.entering - shape.prefix)

    def rule(cut: float) -> Schedule:
        if spread is Spread.EVERY_BLOCK:
            return Constant(cut * most)
        return Rate(max(1.0 - cut, 1e-9), places)

    def cost(cut: float) -> int:
        counts = rule(cut).counts(shape.entering, shape.prefix, shape.depth, reducer)
        return slim_macs(shape, reducer, counts, tail=tail == "exact").total

    if cost(0.0) <= target:
        return rule(0.0)
    low, high = 0.0, 1.0
    if cost(high) > target:
        least = cost(high) / dense
        raise ImpossibleBudget(
            f"macs={macs:g} is {target / dense:.3f} of this model; {type(reducer).__name__} cannot go "
            f"below {least:.3f} here. Nearest possible: macs={math.ceil(least * 1000) / 1000:.3f}."
        )
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    counts = rule(high).counts(shape.entering, shape.prefix, shape.depth, reducer)
    return Counts(counts, shape.entering, shape.prefix)


def macs_target(macs: float, dense: int) -> float:
    """The budget in multiply-adds, of a share or of a number."""
    if isinstance(macs, bool) or not math.isfinite(macs) or macs <= 0 or 1 < macs < 1e4:
        raise ImpossibleBudget(
            f"macs={macs}: give a share of the model's own above 0 and at most 1 (0.6), or "
            f"multiply-adds an image (this model has {dense:.3g}; 1 GMAC is 1e9)."
        )
    if macs > dense:
        raise ImpossibleBudget(f"macs={macs:g} is more than the model itself has: {dense:.4g}.")
    return macs * dense if macs <= 1 else macs


def check_class_token(model: nn.Module, adapter: Adapter, reducer: Reducer) -> None:
    """Refuses a method that scores by the class token where nothing can stand in for one."""
    if not reducer.needs_class_token or adapter.has_class_token(model):
        return
    if not adapter.pools_by_query(model):
        free = [name for name in reducer_names() if not find_reducer(name).needs_class_token]
        raise NeedsClassToken(
            f"{type(reducer).__name__} scores patches by the class token, and this model has none, nor "
            f"an attention-pooling head to lend its query. Methods that need none: {', '.join(free)}."
        )


def check_identity(slimmed: SlimModel) -> None:
    """Refuses a host whose answer changes when nothing is removed: then we would not serve it exactly."""
    host, adapter = slimmed.host, slimmed.adapter
    parameter = next(host.parameters())
    if parameter.device.type == "meta":
        raise UnsupportedModel(
            "The model has no weights yet (meta device), so it cannot be checked."
        )
    with evaluating(host), torch.no_grad():
        shape = (1, *adapter.image_shape(host))
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=noise).to(parameter.device, parameter.dtype)
        same = SlimModel(host, adapter, find_reducer("identity")(), Constant(0), slimmed.tail)
        wanted = adapter.logits(host(images)).double()
        got = adapter.logits(same(images)).double()
    off = difference(got, wanted)
    if not off <= TOLERANCE.get(parameter.dtype, 1e-2):
        raise UnsupportedModel(
            f"With nothing removed, the slimmed {type(host).__name__} differs from the model by {off:.2g} "
            f"({parameter.dtype}). It has a part that the adapter for {adapter.family} does not know; "
            "results would be wrong, so it is refused. Please report the model."
        )


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest deviation, relative to the largest value where that is above one."""
    scale = max(1.0, float(wanted.abs().max()))
    return float((got - wanted).abs().max()) / scale


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode, and every module back as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def macs(
    model: nn.Module,
    method: str | Reducer = "identity",
    schedule: Schedule | str | Path | None = None,
    *,
    tail: Tail | None = None,
    **budget: Unpack[Budget],
) -> Cost:
    """Multiply-adds of one image, from shapes alone: no forward pass, weights on any device."""
    adapter = find_adapter(model)
    reducer = find_reducer(method)() if isinstance(method, str) else method
    shape = adapter.shape(model)
    check_class_token(model, adapter, reducer)
    tail = tail or ("exact" if "macs" in budget and schedule is None else "full")
    rule = plan(shape, reducer, schedule, tail=tail, **budget)
    counts = rule.counts(shape.entering, shape.prefix, shape.depth, reducer)
    return slim_macs(shape, reducer, counts, tail=tail == "exact")


def _keep(
    shape: HostShape, reducer: Reducer, keep: float | Sequence[int], at: tuple[int, ...] | None
) -> Schedule:
    """Explicit counts, or the share of patches left at the end in the method's natural spread."""
    if isinstance(keep, Sequence):
        return total_counts(keep, shape.entering, shape.prefix)
    if not 0 < keep <= 1:
        raise BadSchedule(
            f"keep={keep}: the share of patches left at the end, above 0 and at most 1."
        )
    if reducer.spread is Spread.EVERY_BLOCK and at is None:
        return Constant((shape.entering - shape.prefix) * (1 - keep) / shape.depth)
    places = at or stages(shape.depth)
    return Rate(keep ** (1 / len(places)), places)


def _removed(shape: HostShape, r: float | Sequence[int] | tuple[int, float]) -> Schedule:
    """A constant number removed in every block, a tilted one, or one number a block."""
    if isinstance(r, int | float):
        return Constant(r)
    if isinstance(r, tuple) and len(r) == 2:
        return Constant(r[0], inflect=float(r[1]))
    if len(r) != shape.depth or any(not isinstance(each, int) or each < 0 for each in r):
        raise BadSchedule(f"r={list(r)}: one whole number for each of the {shape.depth} blocks.")
    rows, kept = shape.entering, []
    for each in r:
        rows -= int(each)
        kept.append(rows)
    return total_counts(kept, shape.entering, shape.prefix)


def _warn_if_deep(cost: Cost, dense: Cost) -> None:
    """Above half of the work removed, accuracy without training is not to be expected."""
    if cost.total < dense.total / 2:
        warnings.warn(
            f"{1 - cost.total / dense.total:.0%} of the operations are removed without any training. "
            "Measure accuracy before you rely on it; above about half, fine-tuning is needed.",
            DeepCut,
            stacklevel=3,
        )
