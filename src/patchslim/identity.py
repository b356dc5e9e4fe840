"""What makes a run of training this run and no other, as plain data that a checkpoint carries."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from patchslim.course import Course
from patchslim.errors import BadFile
from patchslim.feed import Feed
from patchslim.losses import Teacher
from patchslim.model import SlimModel
from patchslim.recipe import answers_of, describe
from patchslim.reducer import Reducer

SLACK = 1e-3  # how far the answers of the same weights may differ between machines


def identity(
    slimmed: SlimModel, teacher: Teacher | None, feed: Feed, course: Course
) -> dict[str, Any]:
    """The course, the method, the images by their names, and a few answers of the models."""
    known = describe(slimmed)
    names = hashlib.sha256()
    for place in range(feed.count):
        names.update(feed.name(place).encode() + b"\n")
    return {
        "method": known["method_class"].rpartition(".")[2],
        "settings": known["settings"],
        "schedule": known["schedule"],
        "tail": known["tail"],
        "course": course.to_json(),
        "images": f"{feed.count} named {names.hexdigest()[:12]}",
        "model": known["answers"],
        "teacher": teacher and answers_of(slimmed.adapter, teacher.model, slimmed.host),
    }


def completed(begun: Mapping[str, Any], reducer: Reducer) -> dict[str, Any]:
    """What is known of a run that an earlier version may have begun.

    Settings that it did not have count as their defaults: without them it did the same.
    """
    parameters = inspect.signature(type(reducer)).parameters.values()
    usual = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {
        **begun,
        "course": Course().to_json() | begun["course"],
        "settings": usual | begun["settings"],
    }


def refuse_other(file: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of another run, and says what is different."""
    for name, there in saved.items():
        here = now.get(name)  # none where a later version knew more
        if there == here or (isinstance(there, Sequence) and _alike(there, here)):
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


def _alike(there: Sequence[Any], here: object) -> bool:
    """Whether these are the same answers, up to the rounding of another machine."""
    if isinstance(there, str) or not isinstance(here, Sequence) or len(there) != len(here):
        return False
    largest = max(1.0, *(abs(each) for each in there))
    return all(abs(a - b) <= SLACK * largest for a, b in zip(there, here, strict=True))
