"""Refuses the checkpoint of another run: what makes a run this one is plain data in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile

ANSWER_TOLERANCE = 1e-3  # how far the answers of the same weights may differ between machines


def check_same_run(file: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of another run, and says what is different."""
    for name, there in saved.items():
        here = now.get(name)  # none where a later version knew more
        if there == here or (isinstance(there, Sequence) and _are_close(there, here)):
            continue
        what = f"its {name} is {there}, and now it is {here}"
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            both = ((key, there.get(key), here.get(key)) for key in {**there, **here})
            what = "; ".join(f"there {key}={a!r}, now {b!r}" for key, a, b in both if a != b)
        elif name in ("model", "teacher"):
            what = f"the {name} answers otherwise than the one it was begun with"
        raise BadFile(
            f"{file} is of another run: {what}. Go on with what the run was begun with, or give "
            "another folder."
        )


def _are_close(there: Sequence[Any], here: object) -> bool:
    """Whether these are the same answers, up to the rounding of another machine."""
    if isinstance(there, str) or not isinstance(here, Sequence) or len(there) != len(here):
        return False
    largest = max(1.0, *(abs(each) for each in there))
    return all(abs(a - b) <= ANSWER_TOLERANCE * largest for a, b in zip(there, here, strict=True))
