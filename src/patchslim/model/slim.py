"""`slim`: puts a model, a method and a schedule together, and checks the result.

The check is run every time, on the user's own model: with nothing removed, the slimmed model must
give what the host gives. A host that fails it is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from patchslim.errors import DeepCut, UnsupportedModel, Untrained, warn_caller
from patchslim.hosts._adapter import Adapter
from patchslim.methods._learned import LearnedMethod, is_trainable
from patchslim.methods._method import Method
from patchslim.methods._registry import DEFAULT_METHOD
from patchslim.model.check import check_identity
from patchslim.model.model import SlimModel, name_slimmed_part
from patchslim.model.plan import make_plan, split_budget
from patchslim.schedules.schedule import Schedule, Tail
from patchslim.tokens.shapes import Cost
from patchslim.versions import check_version


def slim(
    model: nn.Module,
    method: str | Method = DEFAULT_METHOD,
    schedule: Schedule | str | Path | None = None,
    *,
    tail: Tail | None = None,
    adapter: Adapter | None = None,
    **asked: Any,
) -> SlimModel:
    """Returns `model` with fewer tokens, by a method and a budget.

    `asked` is the budget and the method's own settings. The public `patchslim.slim` describes all
    arguments; it takes "auto", too.
    """
    check_version("torch")
    if isinstance(model, SlimModel):
        raise UnsupportedModel("This model is slimmed already; slim its .host instead.")
    if inner := name_slimmed_part(model):
        raise UnsupportedModel(
            f"This {type(model).__name__} holds a model that is slimmed already, {inner}. Slim its "
            ".host instead."
        )
    budget, settings = split_budget(asked)
    plan = make_plan(
        model, method, schedule, tail=tail, adapter=adapter, settings=settings, **budget
    )
    chosen, shape = plan.method, plan.shape
    was_trained = is_trainable(chosen)
    missing = chosen.missing if isinstance(chosen, LearnedMethod) else None
    plan.schedule.warn_if_short(shape.entering, shape.prefix, shape.depth, chosen, shape.resets)
    slimmed = SlimModel(model, plan)
    check_identity(slimmed)
    warn_if_deep(plan.cost, plan.dense_cost)
    if is_trainable(chosen) and not was_trained:
        chosen.to(next(model.parameters()))  # only just made: moved to the host's device and type
        missing = missing or (
            f"{type(chosen).__name__} learns what to keep, and has not been trained yet. Train "
            "it: patchslim.train, `patchslim train`."
        )
    if missing is not None:
        warn_caller(missing, Untrained)
    return slimmed


def untouched_model(host: nn.Module, adapter: Adapter | None = None) -> SlimModel:
    """Returns a host in the loop with nothing removed, to compare others with; not checked."""
    plan = make_plan(host, "identity", keep=1.0, tail="full", adapter=adapter)
    return SlimModel(host, plan).eval()


def warn_if_deep(cost: Cost, dense: Cost) -> None:
    """Warns above half of the work removed: accuracy without training will be poor."""
    if cost.total < dense.total / 2:
        warn_caller(
            f"{1 - cost.total / dense.total:.0%} of the operations are removed without any "
            "training. Measure accuracy before you rely on it; beyond half, fine-tuning is needed.",
            DeepCut,
        )
