"""`slim`: the verb that puts a model, a method and a schedule together, and checks the result.

The check is run every time, on the user's own model: with nothing removed, the slimmed model must
give what the host gives. A host that fails it is refused.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from patchslim.adapter import Adapter, find_adapter
from patchslim.budget import Budget, counts_of, plan
from patchslim.cost import Cost, dense_macs, slim_macs
from patchslim.errors import DeepCut, NeedsClassToken, UnsupportedModel, Untrained
from patchslim.model import SlimModel
from patchslim.reducer import Reducer, Setting, find_reducer, make_reducer, reducer_names
from patchslim.schedule import Constant, Schedule, Tail
from patchslim.versions import check_version

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def slim(  # noqa: PLR0913 (the front door: every budget by its name)
    model: nn.Module,
    method: str | Reducer = "tome",
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
        method: a name (`patchslim methods` lists them) or a Reducer of your own.
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
    reducer = make_reducer(method, settings)
    learned, lacks = reducer.learns, reducer.lacks
    shape = adapter.shape(model)
    check_class_token(model, adapter, reducer)
    tail = tail or ("full" if macs is None else "exact")
    budget = Budget(macs=macs, keep=keep, r=r, keep_rate=keep_rate, at=at)
    rule = plan(shape, reducer, schedule, tail=tail, **budget)
    rule.warn_if_short(shape.entering, shape.prefix, shape.depth, reducer, shape.resets)
    slimmed = SlimModel(model, adapter, reducer, rule, tail)
    check_identity(slimmed)
    counts = counts_of(rule, shape, reducer)
    cost = slim_macs(shape, reducer, counts, tail=tail == "exact")
    _warn_if_deep(cost, dense_macs(shape))
    if reducer.learns and not learned:
        reducer.to(next(model.parameters()))  # made just now: where the host is, and of its type
        lacks = lacks or (
            f"{type(reducer).__name__} learns what to keep, and has not been trained yet. Train "
            "it: patchslim.train, `patchslim train`."
        )
    if lacks is not None:
        warnings.warn(lacks, Untrained, stacklevel=2)
    return slimmed


def check_class_token(model: nn.Module, adapter: Adapter, reducer: Reducer) -> None:
    """Refuses a method that scores by the class token where nothing can stand in for one."""
    if not reducer.needs_class_token or adapter.has_class_token(model):
        return
    if not adapter.pools_by_query(model):
        free = [name for name in reducer_names() if not find_reducer(name).needs_class_token]
        raise NeedsClassToken(
            f"{type(reducer).__name__} scores patches by the class token, and this model has "
            "none, nor an attention-pooling head to lend its query. Methods that need none: "
            f"{', '.join(free)}; similarity, with weight='received' or 'size'."
        )


def check_identity(slimmed: SlimModel) -> None:
    """Refuses a host whose answer changes when nothing is removed: it would be served wrongly."""
    host, adapter = slimmed.host, slimmed.adapter
    parameter = next(host.parameters())
    if parameter.device.type == "meta":
        raise UnsupportedModel(
            "The model has no weights yet (meta device), so it cannot be checked."
        )
    exactly = torch.autocast(parameter.device.type, enabled=False)
    with evaluating(host), torch.no_grad(), exactly:
        shape = (1, *adapter.image_shape(host))
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=noise).to(parameter.device, parameter.dtype)
        same = SlimModel(host, adapter, find_reducer("identity")(), Constant(0), slimmed.tail)
        wanted = adapter.logits(host(images)).double()
        got = adapter.logits(same(images)).double()
    off = difference(got, wanted)
    if not off <= TOLERANCE.get(parameter.dtype, 1e-2):
        raise UnsupportedModel(
            f"With nothing removed, the slimmed {type(host).__name__} differs from the model by "
            f"{off:.2g} ({parameter.dtype}). It has a part that the adapter for {adapter.family} "
            "does not know; results would be wrong, so it is refused. Please report the model."
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


def macs(  # noqa: PLR0913 (the words of slim)
    model: nn.Module,
    method: str | Reducer = "identity",
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
    reducer = make_reducer(method, settings)
    shape = adapter.shape(model)
    check_class_token(model, adapter, reducer)
    tail = tail or ("full" if macs is None else "exact")
    budget = Budget(macs=macs, keep=keep, r=r, keep_rate=keep_rate, at=at)
    rule = plan(shape, reducer, schedule, tail=tail, **budget)
    counts = counts_of(rule, shape, reducer)
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
