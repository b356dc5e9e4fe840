"""Checks of a slimmed model against its host: with nothing removed, the answers must be equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchslim.errors import UnsupportedModel
from patchslim.hosts._answers import TOLERANCE, eval_mode, relative_difference
from patchslim.hosts._library import first_line
from patchslim.methods._registry import find_method
from patchslim.model.hooks import HookWatch, record_calls, warn_of_bypassed_hooks
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.schedules.schedule import Constant


def check_identity(slimmed: SlimModel) -> None:
    """Refuses a host whose answer changes when nothing is removed: it would run wrongly."""
    host, adapter = slimmed.host, slimmed.plan.adapter
    parameter = next(host.parameters())
    if parameter.device.type == "meta":
        raise UnsupportedModel(
            "The model has no weights yet (meta device), so it cannot be checked."
        )
    exactly = torch.autocast(parameter.device.type, enabled=False)
    with eval_mode(host), torch.no_grad(), exactly:
        shape = (1, *adapter.describe(host).image_shape)
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=noise).to(parameter.device, parameter.dtype)
        identity = find_method("identity")()
        plan = plan_schedule(host, adapter, identity, Constant(0), slimmed.plan.tail)
        same = SlimModel(host, plan)
        with record_calls() as called:
            wanted = adapter.logits(_ask_host(host, images)).double()
        with record_calls() as still_called:
            got = adapter.logits(same(images)).double()
        warn_of_bypassed_hooks(host, slimmed, images, called)
    bypassed = [each for each in host.modules() if each in called and each not in still_called]
    slimmed._hook_watch = HookWatch(bypassed)  # noqa: SLF001 (this check alone knows what is called)
    off = relative_difference(got, wanted)
    if not off <= TOLERANCE.get(parameter.dtype, 1e-2):
        raise UnsupportedModel(
            f"With nothing removed, the slimmed {type(host).__name__} differs from the model by "
            f"{off:.2g} ({parameter.dtype}). {_advise_on_difference(slimmed, images, wanted)}"
        )


def _advise_on_difference(slimmed: SlimModel, images: Tensor, wanted: Tensor) -> str:
    """Says why the answers may differ: rows that depend on each other, or an unknown part."""
    host, adapter = slimmed.host, slimmed.plan.adapter
    if slimmed.plan.tail == "exact":
        plan = plan_schedule(host, adapter, find_method("identity")(), Constant(0), "full")
        exactly = torch.autocast(images.device.type, enabled=False)
        with eval_mode(host), torch.no_grad(), exactly:
            got = adapter.logits(SlimModel(host, plan)(images)).double()
        if relative_difference(got, wanted) <= TOLERANCE.get(images.dtype, 1e-2):
            return (
                "With tail='full' it does not differ: a row of the last block depends on rows that "
                "the head does not read, as where all rows are quantised by one scale. Give "
                "tail='full' (--tail full), or quantise the model after it was slimmed."
            )
    return (
        f"It has a part that the adapter for {adapter.family} does not know; results would be "
        "wrong, so it is refused. Please report the model."
    )


def _ask_host(host: nn.Module, images: Tensor) -> Any:
    """Returns what the host answers. A host that cannot answer itself is refused.

    Its settings may make no sense, or ask for outputs that its own library does not give.
    """
    try:
        return host(images)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModel(
            f"The model itself fails on noise of shape {tuple(images.shape)}: "
            f"{type(error).__name__}: {first_line(error)[:300]}. Mend it before it is slimmed."
        ) from error
