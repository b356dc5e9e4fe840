"""The fingerprint of a training run: plain data in its checkpoint that no other run has."""

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
    slimmed: SlimModel, teacher: Teacher | None, loader: TrainingLoader, config: TrainConfig
) -> dict[str, Any]:
    """Returns the settings, a hash of the images' names, and a few logits of the models."""
    recipe = make_recipe(slimmed.host, slimmed.plan)
    names = hashlib.sha256()
    for index in range(loader.count):
        names.update(loader.name(index).encode() + b"\n")
    return {
        "method": recipe["method_class"].rpartition(".")[2],
        "settings": recipe["settings"],
        "schedule": recipe["schedule"],
        "tail": recipe["tail"],
        "course": config.to_json(),
        "images": f"{loader.count} named {names.hexdigest()[:12]}",
        "model": recipe["answers"],
        "teacher": teacher and noise_logits(slimmed.plan.adapter, teacher.model, slimmed.host),
    }


def fill_defaults(saved: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """Returns a saved fingerprint with the default of every setting that it lacks.

    An earlier version that did not have a setting behaved as its default does today.
    """
    parameters = inspect.signature(type(method)).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    return {
        **saved,
        "course": TrainConfig().to_json() | saved["course"],
        "settings": defaults | saved["settings"],
    }
