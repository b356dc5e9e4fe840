"""Checks of settings: one value, its name and the type that it must have."""

from __future__ import annotations

import math
from typing import Any, get_args

from patchslim.errors import BadSetting, UnknownName


def check_kind(name: str, value: object, kind: Any) -> None:
    """Refuses a value of the wrong type, a choice that there is not, and NaN."""
    choices = get_args(kind)
    if choices:
        if value not in choices:
            raise UnknownName.of(name, str(value), choices)
        return
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (isinstance(value, float) and math.isnan(value)):
        raise BadSetting(f"{name}={value!r}: {name} takes a {kind.__name__}.")
