"""Tables of models: which are served, by library and family, why others not, and how exactly."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

# Reasons that many models have in common, and how they are called in the table.
GROUPS = {
    re.compile(r"^slim model\S* \((\S+)\)$"): "a part is served",
    re.compile(r"does not build it here: (\S+)$"): "not built here, since the library raises",
    re.compile(r"No adapter knows (\S+)\.$"): "no adapter for this kind",
}
MOST = 12  # kinds that are named
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


def laws(rows: dict[str, Any]) -> str:
    """Writes how far each family is off, over all variants that its library builds."""
    lines = [
        "| family | variants | equal | off by | costs off by | ONNX | OpenVINO |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for family, row in rows.items():
        exported = [_exported(row["exported"][target]) for target in ("onnx", "openvino")]
        lines.append(
            f"| [{family}](families/{family}.md) | {row['variants']} | {row['equal']} | "
            f"{row['off']:.0e} | {row['costs_off']:.2%} | {' | '.join(exported)} |"
        )
    return "\n".join(lines)


def _exported(checked: dict[str, Any]) -> str:
    """Writes how far an exported model is off, or that it was refused."""
    return "refused" if "refused" in checked else f"{checked['largest_difference']:.0e}"


def reasons(told: dict[str, Any]) -> str:
    """Counts the reasons of refusals; what many models have in common is counted together."""
    lines = ["| library | why | models |", "|---|---|--:|"]
    for library, found in told["libraries"].items():
        own: Counter[str] = Counter()
        grouped: dict[str, Counter[str]] = {start: Counter() for start in GROUPS.values()}
        for reason, names in found["refused"].items():
            for pattern, start in GROUPS.items():
                match = pattern.search(reason)
                if match:
                    grouped[start][_architecture(match[1])] += len(names)
                    break
            else:
                first = reason.partition(". ")[0].rstrip(".").replace("|", r"\|")
                own[first.partition(" is not slimmed: ")[2] or first] += len(names)
        lines += [f"| {library} | {reason} | {count} |" for reason, count in own.most_common()]
        for start, kinds in grouped.items():
            if kinds:
                lines.append(f"| {library} | {start}: {_most(kinds)} | {kinds.total()} |")
    return "\n".join(lines)


def _most(kinds: Counter[str]) -> str:
    """Names the most frequent kinds, and counts the others."""
    named = kinds.most_common(MOST)
    others = kinds.total() - sum(count for _, count in named)
    shown = ", ".join(f"{name} {count}" for name, count in named)
    return f"{shown}, {others} others" if others else shown


def _architecture(dotted: str) -> str:
    """Says what a class is called here: timm by its class, transformers by its model's folder."""
    parts = dotted.split(".")
    return parts[2] if parts[0] == "transformers" else parts[-1]


def _versions(told: dict[str, Any]) -> str:
    """Says what was asked, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return f"<sub>{versions}: `python benchmarks/coverage.py`</sub>"
