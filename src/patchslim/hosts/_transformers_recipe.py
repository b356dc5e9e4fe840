"""Recipes of models of transformers: class, configuration and optional parts, and the way back."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from patchslim.errors import WrongInput
from patchslim.hosts._libraries.transformers import check_config
from patchslim.hosts._transformers_layout import Layout

# Options of a class that a recipe notes by the part that they make.
OPTIONAL_PARTS = {"pooler": "add_pooling_layer", "mask_token": "use_mask_token"}


def describe_host(host: Any) -> dict[str, Any]:
    """Notes class and configuration, and which optional parts a bare model has."""
    recipe = {"class": type(host).__name__, "config": host.config.to_diff_dict()}
    for part in _optional_parts(type(host)):
        owner = host if part == "pooler" else host.embeddings
        recipe[part] = getattr(owner, part) is not None
    return recipe


def rebuild_host(recipe: Mapping[str, Any], layouts: Mapping[str, Layout]) -> nn.Module:
    """Builds a class of these layouts from its configuration, with random weights."""
    from transformers import CONFIG_MAPPING

    host_class = _find_class(recipe["class"], layouts)
    given = {
        OPTIONAL_PARTS[part]: bool(recipe[part])
        for part in _optional_parts(host_class)
        if part in recipe
    }
    check_config(recipe["config"], "the recipe of the host")
    kind = recipe["config"]["model_type"]
    config_class = getattr(host_class, "config_class", None) or CONFIG_MAPPING[kind]
    config = config_class.from_dict(dict(recipe["config"]))
    host: nn.Module = host_class(config, **given)
    return host


def _find_class(name: Any, layouts: Mapping[str, Layout]) -> Any:
    """Finds a class of the layouts by its name; transformers does not show all of them."""
    import transformers

    for kind, layout in layouts.items():
        if name in layout.classes and hasattr(transformers, name):
            return getattr(transformers, name)
        if name in layout.classes:
            module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
            return getattr(module, name)
    raise WrongInput(f"{name!r} is not a model class that this family can rebuild.")


def _optional_parts(host_class: Any) -> list[str]:
    """Lists the parts that arguments of the class make or leave out."""
    arguments = inspect.signature(host_class.__init__).parameters
    return [part for part, name in OPTIONAL_PARTS.items() if name in arguments]
