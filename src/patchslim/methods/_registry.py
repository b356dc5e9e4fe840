"""Finds and makes methods by name: a file of this folder is a method of that name.

Listing names imports no torch, since the command line checks and completes them. Methods do import
it, so they are imported inside the functions that need one.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from patchslim.errors import BadSetting, UnknownName
from patchslim.files import list_modules
from patchslim.settings import show_value

if TYPE_CHECKING:
    from patchslim.methods._method import Method, Setting

DEFAULT_METHOD = "tome"  # of a budget without a method: it works on every model, untrained


def method_names() -> list[str]:
    """Lists the methods that ship with the package: the files of `patchslim/methods`.

    Files whose names begin with an underscore are not methods.
    """
    return list_modules("patchslim.methods")


def check_method_name(name: str) -> None:
    """Refuses a name that no method has."""
    if not isinstance(name, str):
        raise UnknownName(f"A method is a name or a Method instance, not {show_value(name)}.")
    if "+" in name:
        for each in name.split("+"):
            check_method_name(each)
    elif name not in method_names():
        raise UnknownName.of("method", name, method_names(), "`patchslim methods` describes them.")


def find_method(name: str) -> type[Method]:
    """Returns the class of the method called `name`, the one `Method` that its file defines.

    A name such as "topk+tome" is that of two methods, one after the other.
    """
    from patchslim.methods._method import Method

    check_method_name(name)
    if "+" in name:
        sequences = importlib.import_module("patchslim.methods._sequence")
        sequence: type[Method] = sequences.find_sequence(name)
        return sequence
    module = importlib.import_module(f"patchslim.methods.{name}")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise UnknownName(f"{module.__file__} defines {len(own)} methods; a file is one method.")
    return own[0]


def make_method(method: str | Method, settings: Mapping[str, Setting]) -> Method:
    """Makes the method called `method` with these settings; returns a `Method` as it is."""
    from patchslim.methods._method import Method

    if inspect.isclass(method):
        raise BadSetting(f"{method.__name__} is a class. Give an instance: {method.__name__}().")
    if isinstance(method, Method):
        if "_parameters" not in vars(method):
            raise BadSetting(
                f"{type(method).__name__} does not call super().__init__() first in its __init__."
            )
        if settings:
            kind = type(method).__name__
            raise UnknownName(f"{sorted(settings)}: give settings to {kind}(...), which you made.")
        return method
    found = find_method(method)
    parameters = inspect.signature(found).parameters
    for name in settings:
        if name not in parameters:
            known = [*parameters, "macs", "keep", "r", "keep_rate", "at"]
            raise UnknownName.of(f"setting of {method} or budget", name, known)
    return found(**settings)


def method_name(method: Method) -> str | None:
    """Returns the name under which `method` ships with the package; None if it does not."""
    package, _, name = type(method).__module__.rpartition(".")
    if name == "_sequence":
        return type(method).__qualname__
    return name if package == "patchslim.methods" else None


def method_kind(method: type[Method]) -> str:
    """Returns what the literature calls such methods: "pruning", "merging" or "hybrid".

    It is read from the reductions that `choose` says it returns; "other" if it does not say.
    """
    names = str(inspect.signature(method.choose).return_annotation).split(" | ")
    known = vars(sys.modules[method.__module__])
    kinds = {getattr(known.get(name), "kind", None) for name in names} - {None}
    ranked = ("merging", "hybrid", "pruning")
    return next((kind for kind in ranked if kind in kinds), "other")


def method_label(method: Method) -> str:
    """Returns the name of one of our methods, or the class name of any other."""
    return method_name(method) or type(method).__name__
