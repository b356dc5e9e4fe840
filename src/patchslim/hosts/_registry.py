"""Finds the adapter of a host, and the library that it comes from: folders are the registries."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchslim.errors import UnsupportedModel
from patchslim.files import list_modules
from patchslim.guides import locate_guide
from patchslim.hosts._library import Library

if TYPE_CHECKING:
    from torch import nn

    from patchslim.hosts._adapter import Adapter


# Where wrappers keep the one model in them: torch.compile, DDP, DataParallel, averages, PEFT. They
# may hold on to the call of that model, so that another in its place would never run.
LOW_RANK = "base_model.model"
WRAPPED = re.compile(rf"((_orig_mod|module)\.)*(_orig_mod|module|{re.escape(LOW_RANK)})")
MERGING = " Or merge its updates into the weights first: model.merge_and_unload()."


def adapter_names() -> list[str]:
    """Lists the families that ship with the package: the files of `patchslim/hosts`.

    Files whose names begin with an underscore hold what several families of a library share.
    """
    return list_modules("patchslim.hosts")


@functools.cache
def load_adapter(name: str) -> Adapter:
    """Loads the adapter in the file `name`, after checking the version of its library.

    There is one for all hosts, since it holds nothing of any.
    """
    find_family_library(name).check_version()
    from patchslim.hosts._adapter import Adapter

    adapter: Adapter = _only_class(f"patchslim.hosts.{name}", Adapter)()
    return adapter


def find_adapter(host: nn.Module) -> Adapter:
    """Finds the adapter that serves `host`, after making sure that it can serve it exactly."""
    adapter = _find_family(host, _families_by_library())
    reason = None if adapter is None else adapter.unsupported_reason(host)
    if adapter is not None and reason is None:
        return adapter
    own = type(host).__name__
    advice = _advise_on_parts(host)
    if adapter is not None:
        said = f"{adapter.family}: this model cannot be slimmed: {reason}"
    elif advice:
        said = f"{type(host).__module__}.{own} is not slimmed as a whole."
    elif (known := _refusal_reason(host)) is not None:
        said = f"{own} is not slimmed: {known}"
    else:
        said = (
            f"No adapter knows {type(host).__module__}.{own}. Known families: "
            f"{', '.join(adapter_names())}; `patchslim models` lists what they serve. To add one: "
            f"{locate_guide('adding-a-family')}"
        )
    raise UnsupportedModel(f"{said}{advice}")


def find_parts(host: nn.Module) -> dict[str, nn.Module]:
    """Finds the parts of a model that are served by themselves, by their names; outermost first."""
    found: dict[str, nn.Module] = {}
    families = _families_by_library()
    for name, part in host.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        adapter = _find_family(part, families)
        if adapter is not None and adapter.unsupported_reason(part) is None:
            found[name] = part
    return found


def _families_by_library() -> dict[str, list[str]]:
    """Lists the families of each library, by the library's name."""
    found: dict[str, list[str]] = {}
    for family in adapter_names():
        found.setdefault(_family_owner(family), []).append(family)
    return found


def _find_family(host: nn.Module, families: Mapping[str, list[str]]) -> Adapter | None:
    """Finds the adapter for hosts of this class; None if no family is of its library, or it."""
    names = [name for package in _packages(host) for name in families.get(package, ())]
    return next((each for each in map(load_adapter, names) if each.serves(host)), None)


def _refusal_reason(host: nn.Module) -> str | None:
    """Says why the library of a host knows that it cannot be slimmed; None if it does not say."""
    library = find_host_library(host)
    return None if library is None else library.refusal_reason(host)


def _advise_on_parts(host: nn.Module) -> str:
    """Says which parts of a model can be slimmed and how they are put back; "" for none."""
    lines = []
    for name, part in find_parts(host).items():
        place = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"model.{name}")
        if WRAPPED.fullmatch(name):
            return (
                f" It wraps a {type(part).__name__}: slim that, patchslim.slim({place}, ...), and "
                f"wrap the result again.{MERGING if name.endswith(LOW_RANK) else ''}"
            )
        lines.append(f"{type(part).__name__}, {place} = patchslim.slim({place}, ...)")
    if not lines:
        return ""
    return (
        f" Slim the encoder in it and put that back: {'; '.join(lines)}. Then call the model as "
        "before."
    )


def library_names() -> list[str]:
    """Lists the libraries that hosts may come from: the files of `patchslim/hosts/_libraries`."""
    return list_modules("patchslim.hosts._libraries")


@functools.cache
def load_library(name: str) -> Library:
    """Loads the library in the file `name`, without importing the library itself."""
    library: Library = _only_class(f"patchslim.hosts._libraries.{name}", Library)()
    library.check_definition()
    return library


def find_libraries() -> list[Library]:
    """Loads all libraries, in the order in which they are asked for a name."""
    every = map(load_library, library_names())
    return sorted(every, key=lambda library: (library.precedence, library.name))


def find_host_library(host: nn.Module) -> Library | None:
    """Finds the library that a host comes from; None if it is none of ours."""
    owners = _host_owners(host)
    return load_library(owners[0]) if owners else None


def find_family_library(family: str) -> Library:
    """Finds the library of a family, by the family's name: `timm` for `timm_vit`."""
    return load_library(_family_owner(family))


def _family_owner(family: str) -> str:
    """Finds the name of a family's library."""
    fitting = [name for name in library_names() if family.startswith(f"{name}_")]
    if not fitting:
        raise UnsupportedModel(
            f"The family {family} is of no library that is known: {', '.join(library_names())}. "
            "A family's file is named <library>_<family>.py. To add one: "
            f"{locate_guide('adding-a-family')}"
        )
    return max(fitting, key=len)


def _host_owners(host: nn.Module) -> list[str]:
    """Lists the libraries, by name, of the host's class and of those it derives from, in order.

    Nothing is loaded to know them: a library's file is named as the module that is imported.
    """
    names = library_names()
    return [package for package in _packages(host) if package in names]


def _packages(host: nn.Module) -> list[str]:
    """Lists the packages of the host's class and of those it derives from, in order."""
    return list(dict.fromkeys(cls.__module__.partition(".")[0] for cls in type(host).__mro__))


def installed_libraries() -> dict[str, str]:
    """Lists the distribution and version of each library that is installed."""
    every = ((each.distribution, each.installed_version()) for each in find_libraries())
    return {name: version for name, version in every if version is not None}


def _only_class(module_name: str, base: type) -> Any:
    """Finds the one class that derives from `base`, can be made, and is defined in the module."""
    module = importlib.import_module(module_name)
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base)
        and not inspect.isabstract(value)
        and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise UnsupportedModel(
            f"{module.__file__} defines {len(own)} classes of {base.__name__}; a file has one."
        )
    return own[0]
