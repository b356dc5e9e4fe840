"""Hooks of the user's on modules of the host that a slimmed forward pass does not call.

The pass calls the parts of a block, and some layers by their weights alone. A hook on what it goes
around never fires, and nothing would say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from patchslim.errors import BypassedHook, UnsupportedModel, warn_caller

SHOWN = 5  # modules that the warning names
# The hooks of a module, of each kind by their numbers.
read_hooks = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)


class HookWatch:
    """Tells of hooks that are added to modules which a pass goes around, each of them once.

    Attributes:
        modules: the modules that the host calls and its slimmed form does not.
        newest: number of the newest hook that was looked at; PyTorch counts hooks as they come.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.newest = max(map(_newest_hook, modules), default=-1)

    def warn_of_new_hooks(self, host: nn.Module) -> None:
        """Warns of hooks that were added since the last look: at every call, so it is quick."""
        if not any(map(any, map(read_hooks, self.modules))):
            return
        found = [each for each in self.modules if _newest_hook(each) > self.newest]
        if found:
            refuse_shards(host, found)
            self.newest = max(map(_newest_hook, found))
            library = _package(type(host))
            _warn(host, [each for each in found if _has_hooks(each, library)])


def refuse_shards(host: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Refuses modules that are sharded by themselves, since hooks gather their weights (FSDP2)."""
    places = {module: name for name, module in host.named_modules()}
    sharded = [places[each] or type(each).__name__ for each in modules if hasattr(each, "unshard")]
    if sharded:
        raise UnsupportedModel(
            f"{', '.join(sharded[:SHOWN])} of the host {'is' if len(sharded) == 1 else 'are'} "
            "sharded by fully_shard, which gathers the weights of a module when that is called, "
            "and a slimmed model calls the parts of a block. Slim the host first, and shard the "
            "slimmed model as a whole: fully_shard(slimmed)."
        )


def warn_of_bypassed_hooks(
    host: nn.Module, slimmed: nn.Module, images: Tensor, called: set[nn.Module]
) -> None:
    """Warns once of the modules whose hooks fire in the host and do not in its slimmed form.

    Costs nothing where the host has no hooks. Those of the host's own library are no user's:
    transformers records by them what a slimmed model refuses.

    Args:
        host: the host.
        slimmed: its slimmed form.
        images: to run it on.
        called: the modules that the host calls.
    """
    library = _package(type(host))
    hooked = [each for each in host.modules() if _has_hooks(each, library)]
    if not hooked:
        return
    with record_calls() as still_called, torch.no_grad():
        slimmed(images)
    _warn(host, [each for each in hooked if each in called and each not in still_called])


@contextlib.contextmanager
def record_calls() -> Iterator[set[nn.Module]]:
    """Collects the modules that are called meanwhile."""
    called: set[nn.Module] = set()
    handle = register_module_forward_pre_hook(lambda module, _: called.add(module))
    try:
        yield called
    finally:
        handle.remove()


def _warn(host: nn.Module, hooked: list[nn.Module]) -> None:
    """Warns of hooks that never fire, by the names of their modules."""
    places = {module: name for name, module in host.named_modules()}
    names = [places[each] or type(each).__name__ for each in hooked if each in places]
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        warn_caller(
            f"The host has hooks that the slimmed model never calls, on {', '.join(names[:SHOWN])}"
            f"{more}: it goes around these modules. Hook the modules inside of a block (norms, "
            "feed-forward), or read `slimmed.trace(images)`.",
            BypassedHook,
        )


def _newest_hook(module: nn.Module) -> int:
    """The number of the newest hook on a module; -1 if it has none."""
    return max((max(each) for each in read_hooks(module) if each), default=-1)


def _has_hooks(module: nn.Module, library: str) -> bool:
    """Whether anybody but this library hooked the module."""
    hooks = (hook for each in read_hooks(module) for hook in each.values())
    return any(_package(hook) != library for hook in hooks)


def _package(defined: Any) -> str:
    """The package in which a class or function is defined."""
    return str(getattr(defined, "__module__", "")).partition(".")[0]
