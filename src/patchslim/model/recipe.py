"""The recipe of a saved model: all that its weights do not say, as plain data.

It names a family, a method and settings, never code. It also holds a few answers of the host to
one fixed image, so that a host which takes the weights but is another model is refused.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from patchslim.hosts._answers import noise_logits
from patchslim.hosts._preprocessing import find_preprocessing
from patchslim.hosts._registry import installed_libraries
from patchslim.methods._method import method_settings
from patchslim.methods._registry import method_name
from patchslim.model.plan import Plan
from patchslim.saving.folder import FORMAT_VERSION, Recipe
from patchslim.versions import installed_version


def make_recipe(
    host: nn.Module,
    plan: Plan,
    trained: dict[str, Any] | None = None,
    calibrated: dict[str, Any] | None = None,
) -> Recipe:
    """Makes the recipe of a slimmed model, without what only its weights file can tell."""
    adapter, method = plan.adapter, plan.method
    package, _, family = type(adapter).__module__.rpartition(".")
    persistent = host.state_dict().keys()
    return {
        "patchslim": FORMAT_VERSION,
        "package": installed_version("patchslim"),
        "library": family if package == "patchslim.hosts" else None,
        "host": adapter.recipe(host),
        "method": method_name(method),
        "method_class": f"{type(method).__module__}.{type(method).__qualname__}",
        "settings": to_plain_data(method_settings(method)),
        "schedule": to_plain_data(plan.schedule.to_json()),
        "tail": plan.tail,
        "trained": to_plain_data(trained),
        "calibrated": to_plain_data(calibrated),
        "images": to_plain_data(find_preprocessing(host, adapter).to_json()),
        "dtype": _dtype_name(next(host.parameters()).dtype),
        # Tables that are not stored but rebuilt with the host. Their type decides how they round.
        "buffers": {
            name: _dtype_name(buffer.dtype)
            for name, buffer in host.named_buffers()
            if name not in persistent and buffer.is_floating_point()
        },
        "answers": noise_logits(adapter, host),
        "versions": {"torch": installed_version("torch"), **installed_libraries()},
    }


def to_plain_data(data: Any) -> Any:
    """Converts the data to what JSON gives back."""
    return json.loads(json.dumps(data, default=repr))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
