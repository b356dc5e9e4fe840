"""Outputs of models of transformers, in the host's own classes."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from torch import Tensor

from patchslim.errors import WrongInput


def add_states(output: Any, states: tuple[Tensor, ...]) -> Any:
    """Returns the output with its hidden states, its entries in the order of its class."""
    own = vars(output)
    entries = {each.name: own[each.name] for each in fields(output)}
    made = type(output)(**{**entries, "hidden_states": states})
    for name in own.keys() - entries.keys():
        setattr(made, name, own[name])
    return made


def output_class(host: Any, name: str) -> Any:
    """Finds an output class in the module of the host, which fills it itself."""
    for cls in type(host).__mro__:
        found = getattr(sys.modules[cls.__module__], name, None)
        if found is not None:
            return found
    raise WrongInput(f"{type(host).__name__} comes from a module that has no {name}.")
