"""`slim`: the verb that puts a model, a method and a schedule together, and checks the result.

The check is run every time, on the user's own model: with nothing removed, the slimmed model must
give what the host gives. A host that fails it is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from patchslim.errors import DeepCut, UnsupportedModel, Untrained
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._registry import find_adapter
from patchslim.methods._method import Method, Setting
from patchslim.methods._registry import make_method
from patchslim.model.check import check_class_token, check_identity
from patchslim.model.model import SlimModel
from patchslim.schedules.budget import Budget, make_schedule, scheduled_counts
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Schedule, Tail
from patchslim.tokens.shapes import Cost, dense_macs
from patchslim.versions import check_version


def slim(  # noqa: PLR0913 (the front door: every budget by its name)
    model: nn.Module,
    method: str | Method = "tome",
    schedule: Schedule | str | Path | None = None,
    *,
    macs: float | None = None,
    keep: float | Sequence[int] | None = None,
    r: float | Sequence[int] | tuple[int, float] | None = None,
    keep_rate: float | None = None,
    at: Sequence[int] | None = None,
    tail: Tail | None = None,
    adapter: Adapter | None = None,
    **settings: Setting,
) -> SlimModel:
    """`model` with fewer tokens: the same call, the same kind of output. The model is not changed.

    Give one of `macs`, `keep`, `r`, `keep_rate` or `schedule`.

    Args:
        model: a timm or Hugging Face vision transformer, with its weights.
        method: a name (`patchslim methods` lists them) or a Method of your own.
        schedule: a Schedule, or the path of a saved one, instead of a budget.
        macs: multiply-adds, as a share of the model's own (0.6) or as a number (0.8e9).
        keep: the share of patches left at the end, or the tokens left after each block.
        r: tokens removed in every block; a list, one a block; or (r, inflect).
        keep_rate: the share of patches kept at each of the blocks `at`.
        at: blocks that remove, counted from 0; (3, 6, 9) of 12 unless given.
        tail: "exact" computes in the last block only the rows that the head reads, with the same
            answer; "full" computes all. By default exact where `macs` is asked for.
        adapter: an Adapter of your own, for a model of a family that does not ship here.
        **settings: the named method's own settings, such as fuse=False.

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    check_version("torch")
    if isinstance(model, SlimModel):
        raise UnsupportedModel("This model is slimmed already; slim its .host instead.")
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"slim() takes a torch.nn.Module, not {type(model).__name__}.")
    adapter = adapter or find_adapter(model)
    reducer = make_method(method, settings)
    learned, lacks = reducer.is_trainable, reducer.missing
    shape = adapter.shape(model)
    check_class_token(model, adapter, reducer)
    tail = tail or ("full" if macs is None else "exact")
    budget = Budget(macs=macs, keep=keep, r=r, keep_rate=keep_rate, at=at)
    rule = make_schedule(shape, reducer, schedule, tail=tail, **budget)
    rule.warn_if_short(shape.entering, shape.prefix, shape.depth, reducer, shape.resets)
    slimmed = SlimModel(model, adapter, reducer, rule, tail)
    check_identity(slimmed)
    counts = scheduled_counts(rule, shape, reducer)
    cost = slim_macs(shape, reducer, counts, tail=tail == "exact")
    _warn_if_deep(cost, dense_macs(shape))
    if reducer.is_trainable and not learned:
        reducer.to(next(model.parameters()))  # made just now: where the host is, and of its type
        lacks = lacks or (
            f"{type(reducer).__name__} learns what to keep, and has not been trained yet. Train "
            "it: patchslim.train, `patchslim train`."
        )
    if lacks is not None:
        warnings.warn(lacks, Untrained, stacklevel=2)
    return slimmed


def macs(  # noqa: PLR0913 (the words of slim)
    model: nn.Module,
    method: str | Method = "identity",
    schedule: Schedule | str | Path | None = None,
    *,
    macs: float | None = None,
    keep: float | Sequence[int] | None = None,
    r: float | Sequence[int] | tuple[int, float] | None = None,
    keep_rate: float | None = None,
    at: Sequence[int] | None = None,
    tail: Tail | None = None,
    adapter: Adapter | None = None,
    **settings: Setting,
) -> Cost:
    """Multiply-adds of one image, from shapes alone: no forward pass, weights on any device."""
    adapter = adapter or find_adapter(model)
    reducer = make_method(method, settings)
    shape = adapter.shape(model)
    check_class_token(model, adapter, reducer)
    tail = tail or ("full" if macs is None else "exact")
    budget = Budget(macs=macs, keep=keep, r=r, keep_rate=keep_rate, at=at)
    rule = make_schedule(shape, reducer, schedule, tail=tail, **budget)
    counts = scheduled_counts(rule, shape, reducer)
    return slim_macs(shape, reducer, counts, tail=tail == "exact")


def _warn_if_deep(cost: Cost, dense: Cost) -> None:
    """Above half of the work removed, accuracy without training is not to be expected."""
    if cost.total < dense.total / 2:
        warnings.warn(
            f"{1 - cost.total / dense.total:.0%} of the operations are removed without any "
            "training. Measure accuracy before you rely on it; beyond half, fine-tuning is needed.",
            DeepCut,
            stacklevel=3,
        )
