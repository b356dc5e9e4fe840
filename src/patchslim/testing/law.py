"""A *law* is a function whose name says what must hold. It raises if it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from patchslim.errors import BrokenLaw

Subject = TypeVar("Subject")
Law = Callable[[Subject], None]


class Violation(Exception):
    """Observation that a law does not allow."""


def require(holds: bool, observed: str) -> None:  # noqa: FBT001
    """Raises a violation with what was observed, unless the law `holds`."""
    if not holds:
        raise Violation(observed)


def require_close(got: Tensor, wanted: Tensor, within: float, what: str) -> None:
    """Raises a violation unless tensors agree, relative to the largest value if that is above 1."""
    require(got.shape == wanted.shape, f"{what}: shape {(*got.shape,)}, wanted {(*wanted.shape,)}")
    off = (got.double() - wanted.double()).abs().max().item() if got.numel() else 0.0
    most = within * max(1.0, wanted.double().abs().max().item() if got.numel() else 0.0)
    require(off <= most, f"{what} differs by {off:.2g}, more than {most:.2g}")


def check_law(law: Law[Subject], subject: Subject, who: str) -> None:
    """Checks one law. Any error in it becomes a `BrokenLaw` with the law's name."""
    try:
        law(subject)
    except Violation as error:
        raise _broken_law(law, who, str(error)) from None
    except Exception as error:
        raise _broken_law(law, who, f"{type(error).__name__}: {error}") from error


def _broken_law(law: Law[Subject], who: str, observed: str) -> BrokenLaw:
    """Makes the error for a law that did not hold."""
    name = law.__name__
    sentence = (law.__doc__ or name).partition("\n")[0]
    return BrokenLaw(f"{who} breaks the law {name}: {sentence} Observed: {observed}", law=name)
