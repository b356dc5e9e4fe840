"""What a host may be built with: plain arguments of its architecture, and no endless amount of it.

A recipe, a configuration or a command line says how a host is built. None of them may name a file,
an address or a function, and none may ask for more weights than there are. torch is imported only
where modules are built.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from patchslim.errors import BadFile, PatchslimError, UnknownName

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGEST = 1 << 20  # of a whole number: more classes, channels or pixels a side has no model
LONGEST = 1000  # characters of a text, and entries of a list
DEEPEST = 3  # lists within each other
MOST_TENSORS = 20_000  # a transformer of a thousand blocks
MOST_PIXELS = 1 << 24  # of an image, 4096 x 4096
SIZES = frozenset(
    """img_size image_size patch_size in_chans embed_dim hidden_dim mlp_dim depth num_layers
    num_heads""".split()
)  # of these none is 0
# Where weights are kept, what is fetched, what is run, and on which machine: all said otherwise.
NEVER = frozenset(
    """pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict pretrained_filter_fn
    checkpoint_path cache_dir device dtype weights progress""".split()
)


def class_arguments(classes: Iterable[type]) -> frozenset[str]:
    """The names of the arguments that make these classes, of those that are classifiers.

    The arguments of their base classes are among them.
    """
    names: set[str] = set()
    for cls in classes:
        own: set[str] = set()
        for base in cls.__mro__:
            if "__init__" in vars(base) and not base.__module__.startswith(("torch.", "builtins")):
                parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
                own |= {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
        names |= own if "num_classes" in own else set()
    return frozenset(names - NEVER - {"self", "args"})


def check_arguments(model: str, given: Mapping[str, Any], known: Collection[str] | None) -> None:
    """Refuses arguments that a host is not built with: unknown ones, and values that are not plain.

    Args:
        model: what is built, for the message.
        given: the arguments.
        known: their names; None where the library does not say.

    Raises:
        UnknownName: the model has no such setting, or it is not one of its architecture.
        PatchslimError: a value is no number, text, or tuple of such, or out of all proportion.
    """
    for name, value in given.items():
        if name in NEVER:
            raise UnknownName(
                f"{model} takes no setting {name!r} here: settings are those of its architecture. "
                "Weights are given by --weights FILE or --pretrained."
            )
        if known is not None and name not in known:
            raise UnknownName.of(f"setting of {model}", str(name)[:100], known)
        if not _is_plain(value) or (name in SIZES and not _is_size(value)):
            raise PatchslimError(
                f"{model}: {name}={str(value)[:100]} is not a setting. Give a number from 0 to "
                f"{LARGEST:,} (of a size, from 1), True, False, None, a word, or a tuple of these."
            )


def _is_size(value: Any) -> bool:
    """Whether a value is a size, or a list of sizes; None leaves it to the library."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(map(_is_size, value))
    return value is None or (type(value) is int and value > 0)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is plain, of a usual size, and not negative."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return 0 <= value <= LARGEST
    if isinstance(value, float):
        return math.isfinite(value) and 0 <= value <= LARGEST
    if isinstance(value, str):
        return len(value) <= LONGEST
    if isinstance(value, list | tuple):
        short = len(value) <= LONGEST and depth < DEEPEST
        return short and all(_is_plain(each, depth + 1) for each in value)
    return False


@contextlib.contextmanager
def limit_building(elements: int) -> Iterator[None]:
    """Within the block, this thread may build modules with so many elements, and no more.

    Built on the meta device, a host that is too large is refused before it takes any memory.

    Raises:
        BadFile: there were more, or more than 20,000 tensors.
    """
    from torch.nn.modules.module import (
        register_module_buffer_registration_hook,
        register_module_parameter_registration_hook,
    )

    thread, counted, tensors = threading.get_ident(), 0, 0

    def count(_module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal counted, tensors
        if tensor is None or threading.get_ident() != thread:
            return
        counted, tensors = counted + tensor.numel(), tensors + 1
        if counted > elements or tensors > MOST_TENSORS:
            raise BadFile(
                f"A host is described that is too large for its weights: more than {elements:,} "
                f"numbers, or more than {MOST_TENSORS:,} tensors."
            )

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
