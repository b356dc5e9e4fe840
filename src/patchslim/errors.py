"""Every error a user can meet, in one tree: catch `PatchslimError` and you catch them all.

PatchslimError
├── UnsupportedModel      a host we cannot serve exactly
│   └── NeedsClassToken   a method that reads a class token, a host that has none
├── UnknownName           no such method, model or option; the nearest names are given
├── BadSetting            a method's setting of the wrong type
├── BadSchedule           a schedule that cannot be run on this host
│   └── ImpossibleBudget  a budget outside what the method can reach
├── WrongInput            images of the wrong shape, type or size, or with NaN in them
├── BadData               a folder or archive without usable images
├── BadFile               a truncated, foreign or future file
├── MissingExtra          an optional dependency that is not installed
├── OldVersion            a library older than the oldest one that is tested
├── BrokenLaw             a method or family, perhaps your own, that breaks its contract
├── BrokenRun             training that was stopped: by a signal, or because a process was lost
└── Diverged              training whose loss or gradient is no number, or exploded
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PatchslimError(Exception):
    """Base of all errors raised on purpose by this package."""


class UnsupportedModel(PatchslimError):
    """The host is of a kind that cannot be served exactly."""


class NeedsClassToken(UnsupportedModel):
    """The method scores patches by the class token, and the host has none."""


class UnknownName(PatchslimError):
    """A name that is not known; the message lists the nearest ones."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], cure: str = "") -> UnknownName:
        """The error for `name`, with the nearest of `known` first."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        listed = ", ".join(names) if len(names) <= 30 else f"{len(names)} names"
        return cls(f"Unknown {kind} {name!r}.{hint} Known: {listed}.{' ' + cure if cure else ''}")


class BadSetting(PatchslimError):
    """A method's setting has the wrong type."""


class BadSchedule(PatchslimError):
    """The schedule cannot be run as given."""


class ImpossibleBudget(BadSchedule):
    """The budget is outside what this method can reach on this host."""


class WrongInput(PatchslimError):
    """The images do not fit the host."""


class BadData(PatchslimError):
    """The data set has nothing usable in it."""


class BadFile(PatchslimError):
    """A file is truncated, foreign, or written by a newer version."""


class MissingExtra(PatchslimError, ImportError):
    """An optional dependency is needed and not installed."""


class OldVersion(PatchslimError):
    """An installed library is older than the oldest supported one."""


class BrokenLaw(PatchslimError):
    """A method or a family does not keep a law that the core relies on; `law` is its name."""

    def __init__(self, message: str, law: str = "") -> None:
        super().__init__(message)
        self.law = law


class TrainingStopped(PatchslimError):
    """Training was stopped: by a signal, or because another of its processes was lost."""


class Diverged(PatchslimError):
    """Training was stopped: the loss or the gradient is no number, or it exploded."""


class ShortSchedule(UserWarning):
    """A method could not remove as many tokens as the schedule asked at some block."""


class Untrained(UserWarning):
    """A method that has to be trained is used as it was made."""


class DeepCut(UserWarning):
    """More than half of the operations are removed without any training."""
