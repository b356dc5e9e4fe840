"""Checks that the state in a checkpoint has the form of the run that goes on from it.

The checksum of a checkpoint says that it is as it was written, and not that it fits. What does not
fit is refused here, before anything of the run is changed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchslim.errors import BadFile

CURE = "Give another checkpoint, or begin again in another folder."


@contextlib.contextmanager
def refuse_misfits(file: Path) -> Iterator[None]:
    """Within the block, a state that is not what the code expects raises a BadFile."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise BadFile(
            f"{file} is of another kind of run, or was damaged before it was written: "
            f"{type(error).__name__}: {str(error)[:300]}. {CURE}"
        ) from error


def check_alike(name: str, value: Any, like: Any) -> None:
    """Refuses a value that has not the form of another: other names, shapes or types.

    Args:
        name: what the value is called in the message.
        value: what was read.
        like: what it has to resemble. Its tensors say shape and type, its dictionaries the names, a
            list or tuple the form of its entries, and a number only that there is a finite one.

    Raises:
        TypeError: it says where they differ.
    """
    if isinstance(like, Tensor):
        _check_tensor(name, value, like)
    elif isinstance(like, Mapping):
        _check_names(name, value, like)
        for key in like:
            check_alike(f"{name}.{key}", value[key], like[key])
    elif isinstance(like, list | tuple):
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} is a {type(value).__name__}, not a list")
        for each in value:
            check_alike(f"{name}[]", each, like[0])
    elif isinstance(like, bool) or like is None:
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r:.100}, not true, false or nothing")
    elif not _is_finite(value):
        raise TypeError(f"{name} is {value!r:.100}, not a number")


def _check_names(name: str, value: Any, like: Mapping[Any, Any]) -> None:
    """Refuses what has not the same names."""
    if not isinstance(value, Mapping) or value.keys() != like.keys():
        names = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        raise TypeError(f"{name} has {names!s:.100}, and not {sorted(map(str, like))!s:.100}")


def _check_tensor(name: str, value: Any, like: Tensor) -> None:
    """Refuses a tensor of another shape or kind of numbers, or with NaN or infinity in it."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise TypeError(f"{name} is a {type(value).__name__}, not a tensor")
    if value.shape != like.shape or value.is_floating_point() != like.is_floating_point():
        raise TypeError(
            f"{name} is {value.dtype} of shape {tuple(value.shape)}, and not {like.dtype} of "
            f"{tuple(like.shape)}"
        )
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise TypeError(f"{name} holds NaN or infinity")


def _is_finite(value: Any) -> bool:
    """Whether a value is a number that is finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < float(2**63) and math.isfinite(value)
