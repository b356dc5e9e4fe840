"""The folder of methods, one a file, and what somebody who writes one imports.

A file here whose name has no underscore is a method of that name; nothing else lists it. Names are
imported when they are first used, so that the command line can list the methods without torch.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # importing it from typing would take longer than all else here
if TYPE_CHECKING:  # for type checkers and editors; a test compares it with the table below
    from typing import Any

    from patchslim.methods._learned import Decision as Decision
    from patchslim.methods._learned import LearnedMethod as LearnedMethod
    from patchslim.methods._learned import ModulePerBlock as ModulePerBlock
    from patchslim.methods._method import Method as Method
    from patchslim.methods._method import Place as Place
    from patchslim.methods._method import Placement as Placement
    from patchslim.methods._method import Threshold as Threshold
    from patchslim.methods._signals import Signals as Signals

# Where each name is defined.
_MODULES = {
    "Decision": "patchslim.methods._learned",
    "LearnedMethod": "patchslim.methods._learned",
    "Method": "patchslim.methods._method",
    "ModulePerBlock": "patchslim.methods._learned",
    "Place": "patchslim.methods._method",
    "Placement": "patchslim.methods._method",
    "Signals": "patchslim.methods._signals",
    "Threshold": "patchslim.methods._method",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    """Imports a name from the module that defines it, when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
