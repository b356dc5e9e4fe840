"""Checks of a slimmed model against its host: with nothing removed, the answers must be equal."""

from __future__ import annotations

import torch
from torch import nn

from patchslim.errors import NeedsClassToken, UnsupportedModel
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import TOLERANCE, eval_mode, relative_difference
from patchslim.methods._method import Method
from patchslim.methods._registry import find_method, method_names
from patchslim.model.model import SlimModel
from patchslim.schedules.schedule import Constant


def check_class_token(model: nn.Module, adapter: Adapter, method: Method) -> None:
    """Refuses a method that scores by the class token where nothing can stand in for one."""
    if not method.needs_class_token or adapter.has_class_token(model):
        return
    if not adapter.has_query_pooling(model):
        free = [name for name in method_names() if not find_method(name).needs_class_token]
        raise NeedsClassToken(
            f"{type(method).__name__} scores patches by the class token, and this model has "
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
    with eval_mode(host), torch.no_grad(), exactly:
        shape = (1, *adapter.image_shape(host))
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=noise).to(parameter.device, parameter.dtype)
        same = SlimModel(host, adapter, find_method("identity")(), Constant(0), slimmed.tail)
        wanted = adapter.logits(host(images)).double()
        got = adapter.logits(same(images)).double()
    off = relative_difference(got, wanted)
    if not off <= TOLERANCE.get(parameter.dtype, 1e-2):
        raise UnsupportedModel(
            f"With nothing removed, the slimmed {type(host).__name__} differs from the model by "
            f"{off:.2g} ({parameter.dtype}). It has a part that the adapter for {adapter.family} "
            "does not know; results would be wrong, so it is refused. Please report the model."
        )
