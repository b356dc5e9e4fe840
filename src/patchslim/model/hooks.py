"""Hooks of the user's on modules of the host that a slimmed forward pass does not call.

The pass calls the parts of a block, and some layers by their weights alone. A hook on what it goes
around never fires, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from patchslim.errors import BypassedHook, warn_caller

SHOWN = 5  # modules that the warning names
KINDS = "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks".split()


def warn_of_bypassed_hooks(host: nn.Module, slimmed: nn.Module, images: Tensor) -> None:
    """Warns once of the modules whose hooks fire in the host and do not in its slimmed form.

    Costs nothing where the host has no hooks. Hooks that are added later are not seen. Those of the
    host's own library are no user's: transformers records by them what a slimmed model refuses.
    """
    library = _package(type(host))
    hooked = {name: each for name, each in host.named_modules() if _has_hooks(each, library)}
    if not hooked:
        return
    called, still_called = _called_modules(host, images), _called_modules(slimmed, images)
    names = [
        name or type(module).__name__
        for name, module in hooked.items()
        if module in called and module not in still_called
    ]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        warn_caller(
            f"The host has hooks that the slimmed model never calls, on {', '.join(names[:SHOWN])}"
            f"{more}: it goes around these modules. Hook the modules inside of a block (norms, "
            "feed-forward), or read `slimmed.trace(images)`.",
            BypassedHook,
        )


def _has_hooks(module: nn.Module, library: str) -> bool:
    """Whether anybody but this library hooked the module."""
    hooks = (hook for kind in KINDS for hook in getattr(module, kind).values())
    return any(_package(hook) != library for hook in hooks)


def _package(defined: Any) -> str:
    """The package in which a class or function is defined."""
    return str(getattr(defined, "__module__", "")).partition(".")[0]


def _called_modules(model: Callable[[Tensor], Any], images: Tensor) -> set[nn.Module]:
    """The modules that are called in a forward pass."""
    called: set[nn.Module] = set()
    handle = register_module_forward_pre_hook(lambda module, _: called.add(module))
    try:
        with torch.no_grad():
            model(images)
    finally:
        handle.remove()
    return called
