"""Checks that the fields of a dataclass that was read from a file have the types that they say."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


def check_field_types(value: Any) -> None:
    """Refuses a dataclass with a field of another type than it was declared with.

    Raises:
        TypeError: it names the field. Whole numbers do for fractions; NaN and infinity do not.
    """
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        if not _fits(found, hints[field.name]):
            raise TypeError(f"{type(value).__name__}.{field.name} is {found!r:.100}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, as an annotation writes it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is ...:
            return isinstance(value, tuple) and all(_fits(each, args[0]) for each in value)
        alike = isinstance(value, tuple) and len(value) == len(args)
        return alike and all(map(_fits, value, args))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, args[0]) and _fits(each, args[1]) for key, each in value.items()
        )
    if dataclasses.is_dataclass(kind):
        if type(value) is kind:
            check_field_types(value)
            return True
        return False
    if kind is float:
        return _is_number(value) and math.isfinite(value)
    if kind is int:
        return _is_number(value) and isinstance(value, int)
    return isinstance(value, kind)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that can be written as one."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float(2**63)
    )
