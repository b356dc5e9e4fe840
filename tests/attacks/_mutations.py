"""Every small change of a JSON document: each key and each value, always in the same order."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]


class _Deleted:
    """Stands for an entry that is taken out."""


DELETED = _Deleted()
HUGE = 10**30


def list_paths(data: Any, path: Path = ()) -> Iterator[Path]:
    """Where the values of a document are; of a list, the first and the last entry."""
    if path:
        yield path
    if isinstance(data, dict):
        for key in data:
            yield from list_paths(data[key], (*path, key))
    elif isinstance(data, list) and data:
        for index in sorted({0, len(data) - 1}):
            yield from list_paths(data[index], (*path, index))


def get_value(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def replaced(data: Any, path: Path, value: Any) -> Any:
    """A copy of the document with another value at one place, or without it."""
    changed = copy.deepcopy(data)
    holder = get_value(changed, path[:-1])
    if value is DELETED:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return changed


def list_values(value: Any) -> list[tuple[str, Any]]:  # noqa: PLR0911 (one for each type)
    """Names and values of what may stand in the place of one value."""
    others: list[tuple[str, Any]] = [("deleted", DELETED), ("null", None)]
    if isinstance(value, int):
        if isinstance(value, bool):
            return [*others, ("flipped", not value), ("text", "yes"), ("two", 2)]
        return [*others, ("more", value + 1), ("minus", -7), ("huge", HUGE), ("text", str(value))]
    if isinstance(value, float):
        return [*others, ("half", value / 2 + 0.1), ("minus", -7.5), ("huge", 1e300), ("list", [1])]
    if isinstance(value, str):
        return [*others, ("other", value + "x"), ("escape", f"../{value}"), ("list", [value])]
    if isinstance(value, list):
        twice = [("longer", value + value[-1:])] if value else [("filled", [1, "x"])]
        return [*others, ("empty", []), *twice, ("text", "x"), ("nested", [value])]
    if isinstance(value, dict):
        return [*others, ("empty", {}), ("more", {**value, "unknown": 1}), ("list", [1])]
    return [("deleted", DELETED), ("zero", 0), ("text", "x"), ("object", {"a": 1}), ("list", [1])]


def list_mutations(data: Any, *under: str, every: int = 1) -> Iterator[tuple[str, Path, Any]]:
    """Names, places and documents with one change each; `under` chooses keys of the top level.

    With `every=3` about a third of them are taken, always the same, and other ones of each value.
    """
    for path in list_paths(data):
        if under and path[0] not in under:
            continue
        for name, value in list_values(get_value(data, path)):
            if zlib.crc32(f"{path} {name}".encode()) % every:
                continue
            if value is DELETED and isinstance(path[-1], int):
                name = "shorter"
            yield f"{'.'.join(map(str, path))} {name}", path, replaced(data, path, value)
