"""Settings: fields of a dataclass with a group and a short text, and a check of their values.

The command line and the docs list settings by group; this file has what they need for it.
"""

from __future__ import annotations

import math
from dataclasses import Field, field, fields
from typing import Any, get_args

from patchslim.errors import BadSetting, UnknownName


def setting(group: str, default: Any, about: str, *, usual: Any = None) -> Any:
    """Makes a dataclass field with the group it is listed in and one line about it.

    `usual` is the value to list if the default is worked out later.
    """
    shown = default if usual is None else usual
    return field(default=default, metadata={"group": group, "about": about, "usual": shown})


def group_settings(config: Any) -> dict[str, list[Field[Any]]]:
    """Groups the fields of a settings dataclass, groups in the order they first appear."""
    groups: dict[str, list[Field[Any]]] = {}
    for each in fields(config):
        groups.setdefault(each.metadata["group"], []).append(each)
    return groups


def check_kind(name: str, value: object, kind: Any) -> None:
    """Refuses a value of the wrong type, a choice that does not exist, and NaN."""
    choices = get_args(kind)
    if choices:
        if value not in choices:
            raise UnknownName.of(name, str(value), choices)
        return
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (isinstance(value, float) and math.isnan(value)):
        raise BadSetting(f"{name}={value!r}: {name} takes a {kind.__name__}.")
