"""The checksums of a recipe: one for each entry, so that an edit is noticed and named.

They guard against edits and damage, not against an author who means harm: anybody can compute them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchslim.errors import BadFile

CHECKSUMS = "checksums"
DIGITS = 16  # hexadecimal, of a SHA-256
# Versions up to this one wrote recipes without checksums.
LAST_UNSEALED = (0, 7, 0)


def seal_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe with a checksum for each of its entries."""
    entries = {name: value for name, value in recipe.items() if name != CHECKSUMS}
    return {**entries, CHECKSUMS: {name: _checksum(name, entries[name]) for name in entries}}


def check_seal(file: Path, recipe: Mapping[str, Any]) -> None:
    """Refuses a recipe that was edited after it was saved, and names the entries.

    A recipe without checksums passes if a version wrote it that had none.
    """
    if CHECKSUMS not in recipe:
        if _is_older(recipe.get("package")):
            return
        raise BadFile(f"{file} was edited: its {CHECKSUMS} were taken out. {_cure(file)}")
    if not isinstance(recipe[CHECKSUMS], dict):
        raise BadFile(f"{file} was edited: its {CHECKSUMS} are no longer there. {_cure(file)}")
    changed = changed_entries(recipe)
    if changed:
        names = ", ".join(name[:50] for name in changed[:5])
        raise BadFile(
            f"{file} was edited or damaged after it was saved; this is not what was written: "
            f"{names}. {_cure(file)}"
        )


def changed_entries(sealed: Mapping[str, Any]) -> list[str]:
    """Lists the entries that are not those that were sealed."""
    saved, now = sealed[CHECKSUMS], seal_recipe(sealed)[CHECKSUMS]
    return sorted(name for name in {*saved, *now} if saved.get(name) != now.get(name))


def _checksum(name: str, value: Any) -> str:
    """The first digits of the SHA-256 of an entry, however it is laid out in the file."""
    plain = json.dumps([name, value], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()[:DIGITS]


def _is_older(package: object) -> bool:
    """Whether a version of patchslim wrote no checksums. Source that is not installed has none."""
    if not isinstance(package, str):
        return package is None
    numbers = package.split(".")[:3]
    return all(map(str.isdecimal, numbers)) and tuple(map(int, numbers)) <= LAST_UNSEALED


def _cure(file: Path) -> str:
    return (
        "A recipe cannot be changed by hand, since nobody could say any more what the model "
        f"answers. Take back the change, or copy {file.parent} again; for another method, setting "
        "or schedule slim the host again (patchslim.slim) and save that."
    )
