"""Finds targets by name: a file of the folder `targets` is a target of that name.

Listing names imports no torch, since the command line checks and completes them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from patchslim.errors import UnknownName
from patchslim.files import list_modules

if TYPE_CHECKING:
    from patchslim.deployment.target import Target


def target_names() -> list[str]:
    """The targets that ship with the package, in the order of the alphabet."""
    return list_modules("patchslim.deployment.targets")


def find_target(name: str) -> Target:
    """The target called `name`, which is `TARGET` in its file."""
    if name not in target_names():
        raise UnknownName.of("target", name, target_names(), "`patchslim export --help` says more.")
    made: Target = importlib.import_module(f"patchslim.deployment.targets.{name}").TARGET
    return made


def target_of_path(path: Path) -> Target | None:
    """The target that writes paths with this ending, if one does."""
    targets = map(find_target, target_names())
    return _longest(each for each in targets if each.suffix and path.name.endswith(each.suffix))


def target_of_artefact(path: Path) -> Target | None:
    """The target that may have written what is at `path`, by its looks."""
    return _longest(each for each in map(find_target, target_names()) if each.looks_written(path))


def _longest(targets: Iterable[Target]) -> Target | None:
    """The target with the longest suffix: what ends in .aoti.pt2 ends in .pt2, too."""
    return max(targets, key=lambda each: len(each.suffix), default=None)
