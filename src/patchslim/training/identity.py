"""What makes a run of training this run and no other, as plain data that a checkpoint carries."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from patchslim.hosts._answers import answers_of
from patchslim.methods._method import Reducer
from patchslim.model.model import SlimModel
from patchslim.training.config import Course
from patchslim.training.loader import Feed
from patchslim.training.losses import Teacher


def identity(
    slimmed: SlimModel, teacher: Teacher | None, feed: Feed, course: Course
) -> dict[str, Any]:
    """The course, the method, the images by their names, and a few answers of the models."""
    known = slimmed.describe()
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
