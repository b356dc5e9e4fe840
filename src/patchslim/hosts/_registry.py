"""Finds the adapter of a host: the files of this folder are the registry."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from torch import nn

from patchslim.errors import UnsupportedModel
from patchslim.hosts._adapter import Adapter
from patchslim.versions import check_version


def adapter_names() -> list[str]:
    """The families that ship with the package: the files of `patchslim/hosts`.

    A file whose name begins with an underscore is what several families of a library share.
    """
    package = importlib.import_module("patchslim.hosts")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def load_adapter(name: str) -> Adapter:
    """The adapter in the file `name`."""
    module = importlib.import_module(f"patchslim.hosts.{name}")
    own = [
        found
        for found in vars(module).values()
        if isinstance(found, type)
        and issubclass(found, Adapter)
        and not inspect.isabstract(found)
        and found.__module__ == module.__name__
    ]
    return own[0]()


def find_adapter(host: nn.Module) -> Adapter:
    """The adapter that serves `host`, after making sure that it can serve it exactly."""
    libraries = {cls.__module__.partition(".")[0] for cls in type(host).__mro__}
    for name in adapter_names():
        library = name.partition("_")[0]
        if library not in libraries:
            continue
        check_version(library)
        adapter = load_adapter(name)
        if adapter.serves(host):
            reason = adapter.unsupported_reason(host)
            if reason is not None:
                raise UnsupportedModel(f"{adapter.family}: this model cannot be slimmed: {reason}")
            return adapter
    raise UnsupportedModel(
        f"No adapter knows {type(host).__module__}.{type(host).__name__}. Known families: "
        f"{', '.join(adapter_names())}. To add one, see docs/adding-a-family.md."
    )
