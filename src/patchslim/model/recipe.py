"""The recipe of a saved model: all that its weights do not tell, as plain data.

It names a family, a method and settings, never code. It also holds a few answers of the host to
one fixed image, so that a host that takes the weights but is another model is found out.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from patchslim.hosts._adapter import Adapter
from patchslim.hosts._answers import answers_of
from patchslim.hosts._preprocessing import find_preparation
from patchslim.methods._method import Reducer
from patchslim.methods._registry import reducer_name
from patchslim.saving.folder import FORMAT, Recipe
from patchslim.schedules.schedule import Schedule, Tail
from patchslim.versions import OLDEST, installed


def describe(
    host: nn.Module,
    adapter: Adapter,
    reducer: Reducer,
    schedule: Schedule,
    tail: Tail,
    trained: dict[str, Any] | None = None,
    calibrated: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe of a slimmed model, without what only its weights file can tell."""
    package, _, family = type(adapter).__module__.rpartition(".")
    persistent = host.state_dict().keys()
    return {
        "patchslim": FORMAT,
        "package": installed("patchslim"),
        "library": family if package == "patchslim.hosts" else None,
        "host": adapter.recipe(host),
        "method": reducer_name(reducer),
        "method_class": f"{type(reducer).__module__}.{type(reducer).__qualname__}",
        "settings": plain(reducer.settings()),
        "schedule": plain(schedule.to_json()),
        "tail": tail,
        "trained": plain(trained),
        "calibrated": plain(calibrated),
        "images": plain(find_preparation(host, adapter).to_json()),
        "dtype": _name(next(host.parameters()).dtype),
        # Tables that are rebuilt with the host, not stored; their type decides how they round.
        "buffers": {
            name: _name(buffer.dtype)
            for name, buffer in host.named_buffers()
            if name not in persistent and buffer.is_floating_point()
        },
        "answers": answers_of(adapter, host),
        "versions": {name: installed(name) for name in OLDEST if installed(name) is not None},
    }


def plain(data: Any) -> Any:
    """The data as JSON gives it back."""
    return json.loads(json.dumps(data, default=repr))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
