"""Checks that the fields of a dataclass that was read from a file have the types that they say."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

NUMBERS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float)}


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
    if not isinstance(value, NUMBERS.get(kind, origin or kind)):
        return False
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is ... else args
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if origin is Mapping:
        return all(_fits(key, args[0]) and _fits(each, args[1]) for key, each in value.items())
    if dataclasses.is_dataclass(kind):
        check_field_types(value)
    return kind not in NUMBERS or _is_number(value)


def _is_number(value: Any) -> bool:
    """Whether a number is one, and finite, and of a size that anything counts to."""
    return not isinstance(value, bool) and math.isfinite(value) and abs(value) < float(2**63)
