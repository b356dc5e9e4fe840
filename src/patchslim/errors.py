"""Every error that patchslim raises on purpose, in one tree: `PatchslimError` catches them all.

PatchslimError
├── UnsupportedModel      a host that cannot be slimmed without changing its answers
│   └── NeedsClassToken   a method that reads the class token, on a host without one
├── UnknownName           no such method, model or option; the message has the nearest names
├── BadSetting            a setting or an argument of the wrong type, or out of its range
├── BadSchedule           a schedule that cannot be run on this host
│   └── ImpossibleBudget  a budget outside what the method can reach
├── WrongInput            images of the wrong shape, type or size, or with NaN in them
├── BadData               a folder, archive or dataset that cannot be used as it is
├── BadFile               a file that is truncated, not ours, or of a newer version
├── MissingExtra          an optional dependency that is not installed
├── OldVersion            a library older than the oldest one that is tested
├── WrongExport           a model that another runtime cannot hold, or holds otherwise
├── BrokenLaw             a method or family, perhaps your own, that breaks its contract
├── TrainingStopped       training that was stopped by a signal, or because a process died
└── Diverged              training whose loss or gradient is NaN, infinite, or exploded
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable

MOST_LISTED = 60  # names that are known; of more, the number is told
LONGEST_WORD = 300  # characters of a name that somebody gave
LONGEST_MESSAGE = 2000


def shorten(text: str, most: int) -> str:
    """The text, with its middle left out where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    side = most // 2
    return f"{text[:side]}[{len(text) - 2 * side} characters left out]{text[-side:]}"


def shorten_message(text: str) -> str:
    """A message that can be read: what is given in it may be of any length."""
    if len(text) > LONGEST_WORD:
        words = (shorten(word, LONGEST_WORD) for word in text.split(" "))
        text = shorten(" ".join(words), LONGEST_MESSAGE)
    return text


class PatchslimError(Exception):
    """Base of all errors that this package raises on purpose.

    A message repeats what was given, so its long words are shortened in the middle.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(
            *(shorten_message(each) if isinstance(each, str) else each for each in args)
        )


class UnsupportedModel(PatchslimError):
    """The host cannot be slimmed without changing its answers."""


class NeedsClassToken(UnsupportedModel):
    """The method scores patches by the class token, and the host has none."""


class UnknownName(PatchslimError):
    """A name is not known; the message lists the nearest ones."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], cure: str = "") -> UnknownName:
        """Makes the error for `name`, with the nearest of `known` first."""
        names, name = sorted(known), shorten(name, LONGEST_WORD)
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        listed = ", ".join(names) if len(names) <= MOST_LISTED else f"{len(names)} names"
        return cls(f"Unknown {kind} {name!r}.{hint} Known: {listed}.{' ' + cure if cure else ''}")


class BadSetting(PatchslimError):
    """A setting or an argument has the wrong type, or is out of its range."""


class BadSchedule(PatchslimError):
    """The schedule cannot be run on this host."""


class ImpossibleBudget(BadSchedule):
    """The budget is more, or less, than this method can reach on this host."""


class WrongInput(PatchslimError):
    """The images do not fit the host."""


class BadData(PatchslimError):
    """A folder, archive or dataset cannot be used as it is."""


class BadFile(PatchslimError):
    """A file is truncated, not ours, or written by a newer version."""


class MissingExtra(PatchslimError, ImportError):
    """An optional dependency is needed, and it is not installed."""


class OldVersion(PatchslimError):
    """An installed library is older than the oldest supported one."""


class WrongExport(PatchslimError):
    """Another runtime cannot hold the model, or keeps other tokens or answers otherwise."""


class BrokenLaw(PatchslimError):
    """A method or a family breaks a law that the core relies on; `law` is its name."""

    def __init__(self, message: str, law: str = "") -> None:
        super().__init__(message)
        self.law = law


class TrainingStopped(PatchslimError):
    """Training was stopped by a signal, or because another of its processes died."""


class Diverged(PatchslimError):
    """Training was stopped: the loss or the gradient is NaN or infinite, or it exploded."""


class ShortSchedule(UserWarning):
    """A method could not remove as many tokens at some block as the schedule asked for."""


class Untrained(UserWarning):
    """A method that has to be trained is used untrained."""


class BypassedHook(UserWarning):
    """The host has hooks on modules that the slimmed model does not call."""


class DeepCut(UserWarning):
    """More than half of the MACs are removed without any training."""


class UnusedTable(UserWarning):
    """A table of latencies was found that cannot be used here, so that it is measured anew."""


class UnsteadyTimes(UserWarning):
    """Times differed so much from round to round that a plan made of them may be wrong."""


class OldArtefact(UserWarning):
    """An exported model has a fault that later versions do not write any more."""


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns at the line that called this package, however many of our functions lie between.

    The command line is a caller, too.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_ours(module: str) -> bool:
    """Tells whether a module is of this package, and not of its command line."""
    return module.split(".")[0] == "patchslim" and not module.startswith("patchslim.cli")
