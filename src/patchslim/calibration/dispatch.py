"""Finds the calibrator of a method by the method's type.

A calibrator is a function from a method and a `CalibrationTask` to a `CalibrationResult`. It stands
in a file of its own and registers itself for a type of method, and so for its subclasses:

    @register_calibrator(MyMethod)
    def calibrate_my_method(method: MyMethod, task: CalibrationTask) -> CalibrationResult: ...

A method of your own needs none of this if its images may keep different numbers of patches
(`adaptive`) or if it has a `tuned_threshold`: the calibrator of thresholds is registered for
`Method` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from patchslim.calibration.task import CalibrationResult, CalibrationTask
from patchslim.methods._method import Method

Calibrator = Callable[[Any, CalibrationTask], CalibrationResult]
C = TypeVar("C", bound=Calibrator)

_CALIBRATORS: dict[type, tuple[Calibrator, Callable[[Method], bool]]] = {}


def register_calibrator(
    kind: type[nn.Module],  # not type[Method], since mypy then refuses the abstract Method itself
    *,
    when: Callable[[Method], bool] = lambda _: True,
) -> Callable[[C], C]:
    """Registers the decorated function as the calibrator of a type of method.

    Args:
        kind: the type of Method. Subclasses are included, unless they have their own calibrator.
        when: whether the function can calibrate this instance; by default every one.
    """

    def register(calibrator: C) -> C:
        _CALIBRATORS[kind] = (calibrator, when)
        return calibrator

    return register


def find_calibrator(method: Method) -> Calibrator | None:
    """Returns the calibrator of the nearest type, or None if nothing calibrates this method."""
    for kind in type(method).__mro__:
        if kind in _CALIBRATORS:
            calibrator, when = _CALIBRATORS[kind]
            if when(method):
                return calibrator
    return None
