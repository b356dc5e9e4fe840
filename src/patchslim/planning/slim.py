"""`slim`: by a method and a budget, or with "auto" by whatever loses least on this device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from patchslim.data.source import Source
from patchslim.errors import BadSetting
from patchslim.hosts._adapter import Adapter
from patchslim.measurement.score import Batch
from patchslim.methods._method import Method, Setting
from patchslim.methods._registry import DEFAULT_METHOD
from patchslim.model.model import SlimModel
from patchslim.model.slim import slim as slim_by_budget
from patchslim.planning.plan import AUTO, plan
from patchslim.schedules.schedule import Schedule, Tail


def slim(  # noqa: PLR0913 (the front door: every budget by its name)
    model: nn.Module,
    method: str | Method = DEFAULT_METHOD,
    schedule: Schedule | str | Path | None = None,
    *,
    macs: float | None = None,
    keep: float | Sequence[int] | None = None,
    r: float | Sequence[int] | tuple[int, float] | None = None,
    keep_rate: float | None = None,
    at: Sequence[int] | None = None,
    latency_ms: float | None = None,
    images: Source | Iterable[Batch] | None = None,
    tail: Tail | None = None,
    adapter: Adapter | None = None,
    **settings: Setting,
) -> SlimModel:
    """Returns `model` with fewer tokens: the same call, the same kind of output.

    The model is not changed. Give one of `macs`, `keep`, `r`, `keep_rate` or `schedule`. With
    method="auto", `images` and `macs` or `latency_ms`, method and schedule are those that `plan`
    finds to lose least on this device; `plan` itself also says what it measured.

    Args:
        model: a timm or Hugging Face vision transformer, with its weights.
        method: a name (`patchslim methods` lists them), a Method of your own, or "auto".
        schedule: a Schedule, or the path of a saved one, instead of a budget.
        macs: multiply-adds, as a share of the model's own (0.6) or as a number (0.8e9).
        keep: the share of patches left at the end, or the tokens left after each block.
        r: tokens removed in every block; a list, one a block; or (r, inflect).
        keep_rate: the share of patches kept at each of the blocks `at`.
        at: blocks that remove, counted from 0; (3, 6, 9) of 12 unless given.
        latency_ms: for "auto", milliseconds that one call with a batch of 8 may take.
        images: for "auto", unlabelled images, some hundreds.
        tail: "exact" computes in the last block only the rows that the head reads, with the same
            answer; "full" computes all. "exact" is the default if `macs` is given.
        adapter: an Adapter of your own, for a model of a family that does not ship here.
        **settings: the named method's own settings, such as fuse=False; for "auto", `batch`,
            `runtime`, `precision`, `threads` and the like of `plan`.

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    if method != AUTO:
        if latency_ms is not None or images is not None:
            raise BadSetting(
                f"latency_ms and images are for slim(model, 'auto', ...). For {method} alone, call "
                f"patchslim.plan(model, images, {method!r}, latency_ms=...)."
            )
        budget = {"macs": macs, "keep": keep, "r": r, "keep_rate": keep_rate, "at": at}
        return slim_by_budget(
            model, method, schedule, tail=tail, adapter=adapter, **budget, **settings
        )
    given = {"schedule": schedule, "keep": keep, "r": r, "keep_rate": keep_rate, "at": at}
    unused = [name for name, value in {**given, "tail": tail}.items() if value is not None]
    if unused or images is None:
        wrong = f"leave out {', '.join(unused)}" if unused else "give images"
        raise BadSetting(
            f"'auto' finds method and schedule by itself: {wrong}. It takes images= (unlabelled), "
            "and latency_ms= or macs=."
        )
    options: Any = settings
    return plan(
        model, images, AUTO, macs=macs, latency_ms=latency_ms, adapter=adapter, **options
    ).model
