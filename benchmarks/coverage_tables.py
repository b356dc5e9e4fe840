"""Tables of `coverage.json`: which models are served, by library and family, and why others not."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

UNKNOWN = re.compile(r"No adapter knows (\S+)\.$")
MOST = 12  # reasons of one library that have a line of their own
KINDS = ("served", "refused, a part is served", "refused", "not built", "unclear")


def libraries(told: dict[str, Any]) -> str:
    """Counts the models of each library by what happens to them."""
    lines = [
        "| library | models | served | before | a part is served | refused | not built | unclear |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for library, found in told["libraries"].items():
        counts, before = found["counts"], found.get("before", {}).get("served", "-")
        served, *others = [counts.get(kind, 0) for kind in KINDS]
        cells = [counts["models"], served, before, *others]
        lines.append(f"| {library} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", _versions(told)])


def families(told: dict[str, Any]) -> str:
    """Counts the models that each family serves."""
    lines = ["| family | models |", "|---|--:|"]
    for found in told["libraries"].values():
        lines += [f"| {family} | {len(names)} |" for family, names in found["served"].items()]
    return "\n".join(lines)


def reasons(told: dict[str, Any]) -> str:
    """Counts the reasons of refusals; kinds without an adapter are named, the most frequent."""
    lines = ["| library | refused because | models |", "|---|---|--:|"]
    for library, found in told["libraries"].items():
        said: Counter[str] = Counter()
        unknown: Counter[str] = Counter()
        for reason, names in found["refused"].items():
            match = UNKNOWN.search(reason)
            if match:
                unknown[_architecture(match[1])] += len(names)
            else:
                said[reason.replace("|", r"\|")] += len(names)
        lines += [f"| {library} | {reason} | {count} |" for reason, count in said.most_common(MOST)]
        rest = said.total() - sum(count for _, count in said.most_common(MOST))
        if rest:
            lines.append(f"| {library} | other reasons of this kind | {rest} |")
        named = ", ".join(f"{name} {count}" for name, count in unknown.most_common(MOST))
        others = unknown.total() - sum(count for _, count in unknown.most_common(MOST))
        lines.append(
            f"| {library} | no adapter for this kind: {named}, and {others} others "
            f"| {unknown.total()} |"
        )
    return "\n".join(lines)


def _architecture(dotted: str) -> str:
    """Says what a class is called here: timm by its class, transformers by its model's folder."""
    parts = dotted.split(".")
    return parts[2] if parts[0] == "transformers" else parts[-1]


def _versions(told: dict[str, Any]) -> str:
    """Says what was asked, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return f"<sub>{versions}: `python benchmarks/coverage.py`</sub>"
