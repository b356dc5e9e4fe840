"""Checks that a checkpoint belongs to the run that wants to continue from it.

A fingerprint is plain data that stands for a run: its settings, its images, answers of its models.
The checkpoint carries it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile

ANSWER_TOLERANCE = 1e-3  # how far the answers of the same weights may differ between machines


def check_same_run(file: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of another run, and names the first difference.

    Args:
        file: the checkpoint, for the error message.
        saved: the fingerprint in the checkpoint.
        now: the fingerprint of the run that wants to continue.

    Raises:
        BadFile: the two fingerprints differ.
    """
    for name, before in saved.items():
        current = now.get(name)  # None where a newer version wrote an entry we do not know
        if before == current or (isinstance(before, Sequence) and _are_close(before, current)):
            continue
        difference = f"its {name} is {before}, and now it is {current}"
        if isinstance(before, Mapping) and isinstance(current, Mapping):
            pairs = ((key, before.get(key), current.get(key)) for key in {**before, **current})
            difference = "; ".join(f"there {key}={a!r}, now {b!r}" for key, a, b in pairs if a != b)
        elif name in ("model", "teacher"):
            difference = f"the {name} answers otherwise than the one it was begun with"
        raise BadFile(
            f"{file} is of another run: {difference}. Go on with what the run was begun with, or "
            "give another folder."
        )


def _are_close(before: Sequence[Any], now: object) -> bool:
    """Tells whether two lists of logits are equal, up to the rounding of another machine."""
    if isinstance(before, str) or not isinstance(now, Sequence) or len(before) != len(now):
        return False
    largest = max(1.0, *(abs(each) for each in before))
    return all(abs(a - b) <= ANSWER_TOLERANCE * largest for a, b in zip(before, now, strict=True))
