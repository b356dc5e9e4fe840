"""The door for arguments: what a value must be, and the check of one against it.

Settings of methods, of training and of calibration, budgets, schedules, and the numbers that verbs
and commands take are all checked by `check_value`, so that wrong ones end in the same words. The
command line and the docs list settings by group; this file has what they need for it.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from patchslim.errors import BadSetting, PatchslimError, UnknownName, shorten

LARGEST_INT = 2**63 - 1  # beyond it no tensor can hold a whole number


@dataclass(frozen=True)
class Range:
    """The numbers that a value may be, both ends included unless `above` or `below` is set.

    Attributes:
        low: the smallest number.
        high: the largest number. Every number has one, so that infinity is never meant.
        above: whether the value must be above `low`.
        below: whether the value must be below `high`.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether a number is in the range; NaN is in none."""
        enough = value > self.low if self.above else value >= self.low
        return enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        """The range in words, such as "above 0 and at most 1"."""
        low, high = _show_number(self.low), _show_number(self.high)
        if self.high <= 1 and self.above == self.below:
            return f"between {low} and {high}"
        low = f"above {low}" if self.above else f"at least {low}"
        return f"{low} and {'below' if self.below else 'at most'} {high}"


def _show_number(number: float) -> str:
    """A bound as people write it."""
    return f"{number:,.0f}" if number == int(number) and abs(number) < 1e12 else f"{number:g}"


SEED = Range(0, 2**32 - 1)
BATCH = Range(1, 2**16)
WHOLE = Range(-LARGEST_INT, LARGEST_INT)
FINITE = Range(-1e300, 1e300)


def setting(
    group: str, default: Any, about: str, within: Range | None = None, *, usual: Any = None
) -> Any:
    """Makes a dataclass field with the group it is listed in and one line about it.

    `within` are the numbers that it may be; `usual` is the value to list where the default is
    worked out later.
    """
    shown = default if usual is None else usual
    facts = {"group": group, "about": about, "usual": shown, "within": within}
    return field(default=default, metadata=facts)


def group_settings(config: Any) -> dict[str, list[Field[Any]]]:
    """Groups the fields of a settings dataclass, groups in the order they first appear."""
    groups: dict[str, list[Field[Any]]] = {}
    for each in fields(config):
        groups.setdefault(each.metadata["group"], []).append(each)
    return groups


def check_settings(config: Any) -> None:
    """Refuses a settings dataclass with a value of the wrong type or out of its range."""
    kinds = get_type_hints(type(config))
    for each in fields(config):
        value = getattr(config, each.name)
        check_setting(each.name, value, kinds[each.name], each.metadata["within"])


def check_setting(name: str, value: object, kind: Any, within: Range | None = None) -> None:
    """Refuses a value that is not of this very type, a choice that does not exist, and NaN.

    A setting is saved and read again, so a number of another library's type is no setting.
    """
    choices = get_args(kind)
    if choices:
        check_choice(name, value, choices)
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise BadSetting(f"{name}={show_value(value)}: {name} takes {_describe(kind)}.")
    elif kind in (int, float):
        check_value(name, value, kind, within)


def check_value(
    name: str,
    value: object,
    kind: type,
    within: Range | None = None,
    error: type[PatchslimError] = BadSetting,
    cure: str = "",
) -> Any:
    """The value as a plain number, truth value or text; an error if it is of another type.

    Numbers of numpy's types are numbers too. True is none, and neither are NaN and infinity.

    Args:
        name: what the caller calls the value.
        value: what was given.
        kind: bool, int, float or str.
        within: the numbers that it may be; by default all that a tensor can hold.
        error: the class of the error.
        cure: the end of the message, where type and range do not say enough.
    """
    plain = _as_plain(value, kind)
    cure = f" {cure}" if cure else ""
    if plain is None:
        bounds = f", {within}" if within else ""
        raise error(f"{name}={show_value(value)}: {name} takes {_describe(kind)}{bounds}.{cure}")
    if isinstance(plain, int | float) and kind is not bool:
        within = within or (WHOLE if kind is int else FINITE)
        if plain not in within:
            raise error(f"{name}={show_value(value)}: {name} must be {within}.{cure}")
    return plain


def check_type(
    name: str,
    value: object,
    kind: Any,
    cure: str,
    error: type[PatchslimError] = BadSetting,
) -> None:
    """Refuses an argument that is not of a class; `cure` says what to give."""
    if not isinstance(value, kind):
        given = f"{type(value).__name__} {show_value(value)}"
        raise error(f"{name} is the {given}. {cure}")


def check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    """Refuses what is not one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise UnknownName.of(name, value if isinstance(value, str) else show_value(value), choices)


def show_value(value: object) -> str:
    """A value as it is shown in an error: as Python would write it, but short."""
    try:
        return shorten(repr(value), 200)
    except ValueError:  # a whole number of more than 4,300 digits
        return f"a {type(value).__name__} that is too long to be shown"


def _as_plain(value: object, kind: type) -> Any:
    """The value in Python's own type; None if it is of another kind."""
    if kind in (bool, str):
        return value if type(value) is kind else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    if kind is int:
        return None
    number = float(value)
    return None if math.isnan(number) else number


def _describe(kind: type) -> str:
    """What a type is called in an error."""
    words = {
        bool: "True or False",
        int: "a whole number (int)",
        float: "a number (float)",
        str: "a text (str)",
    }
    return words.get(kind, f"a {kind.__name__}")
