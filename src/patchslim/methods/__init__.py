"""The folder of methods, one a file, and what somebody who writes one imports.

A file here whose name has no underscore is a method of that name; nothing else lists it.
"""

from patchslim.methods._learned import Decision, LearnedMethod, ModulePerBlock
from patchslim.methods._method import Method, Place, Placement, Threshold
from patchslim.methods._signals import Signals

__all__ = [
    "Decision",
    "LearnedMethod",
    "Method",
    "ModulePerBlock",
    "Place",
    "Placement",
    "Signals",
    "Threshold",
]
