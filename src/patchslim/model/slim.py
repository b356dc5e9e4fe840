"""`slim`: puts a model, a method and a schedule together, and checks the result.

The check is run every time, on the user's own model: with nothing removed, the slimmed model must
give what the host gives. A host that fails it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from patchslim.errors import DeepCut, UnsupportedModel, Untrained, warn_caller
from patchslim.hosts._adapter import Adapter
from patchslim.methods._learned import LearnedMethod, is_trainable
from patchslim.methods._method import Method, Setting
from patchslim.model.check import check_identity
from patchslim.model.model import SlimModel
from patchslim.model.plan import make_plan
from patchslim.schedules.schedule import Schedule, Tail
from patchslim.tokens.shapes import Cost
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
    """Returns `model` with fewer tokens: the same call, the same kind of output.

    The model is not changed. Give one of `macs`, `keep`, `r`, `keep_rate` or `schedule`.

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
            answer; "full" computes all. "exact" is the default if `macs` is given.
        adapter: an Adapter of your own, for a model of a family that does not ship here.
        **settings: the named method's own settings, such as fuse=False.

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    check_version("torch")
    if isinstance(model, SlimModel):
        raise UnsupportedModel("This model is slimmed already; slim its .host instead.")
    plan = make_plan(
        model,
        method,
        schedule,
        macs=macs,
        keep=keep,
        r=r,
        keep_rate=keep_rate,
        at=at,
        tail=tail,
        adapter=adapter,
        settings=settings,
    )
    chosen, shape = plan.method, plan.shape
    was_trained = is_trainable(chosen)
    missing = chosen.missing if isinstance(chosen, LearnedMethod) else None
    plan.schedule.warn_if_short(shape.entering, shape.prefix, shape.depth, chosen, shape.resets)
    slimmed = SlimModel(model, plan)
    check_identity(slimmed)
    _warn_if_deep(plan.cost, plan.dense_cost)
    if is_trainable(chosen) and not was_trained:
        chosen.to(next(model.parameters()))  # only just made: moved to the host's device and type
        missing = missing or (
            f"{type(chosen).__name__} learns what to keep, and has not been trained yet. Train "
            "it: patchslim.train, `patchslim train`."
        )
    if missing is not None:
        warn_caller(missing, Untrained)
    return slimmed


def _warn_if_deep(cost: Cost, dense: Cost) -> None:
    """Warns above half of the work removed: accuracy without training will be poor."""
    if cost.total < dense.total / 2:
        warn_caller(
            f"{1 - cost.total / dense.total:.0%} of the operations are removed without any "
            "training. Measure accuracy before you rely on it; beyond half, fine-tuning is needed.",
            DeepCut,
        )
