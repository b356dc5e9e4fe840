"""What makes a run of training this run and no other, as plain data that a checkpoint carries."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

from patchslim.hosts._answers import noise_logits
from patchslim.methods._method import Method
from patchslim.model.model import SlimModel
from patchslim.model.recipe import make_recipe
from patchslim.training.config import TrainConfig
from patchslim.training.loader import TrainingLoader
from patchslim.training.losses import Teacher


def run_fingerprint(
    slimmed: SlimModel, teacher: Teacher | None, feed: TrainingLoader, course: TrainConfig
) -> dict[str, Any]:
    """The course, the method, the images by their names, and a few answers of the models."""
    known = make_recipe(slimmed.host, slimmed.plan)
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
        "teacher": teacher and noise_logits(slimmed.plan.adapter, teacher.model, slimmed.host),
    }


def fill_defaults(begun: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """What is known of a run that an earlier version may have begun.

    Settings that it did not have count as their defaults: without them it did the same.
    """
    parameters = inspect.signature(type(method)).parameters.values()
    usual = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {
        **begun,
        "course": TrainConfig().to_json() | begun["course"],
        "settings": usual | begun["settings"],
    }
