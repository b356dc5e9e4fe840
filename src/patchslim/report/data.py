"""Packs a whole report into a page: every number once, as JSON that no markup can end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from patchslim.report.report import Report


def pack_report(report: Report) -> str:
    """Returns the report as JSON for a `<script>` element.

    Names of fields stand once, in `columns`, as "latency.median"; each row is a list of values, and
    null is what was not measured. The script of the page makes the usual JSON of it.
    """
    data = report.to_json()
    flat = [_flatten(row) for row in data.pop("rows")]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    packed = {
        "report": data,
        "columns": columns,
        "rows": [[row.get(name) for name in columns] for row in flat],
    }
    text = json.dumps(packed, separators=(",", ":"), allow_nan=False)
    # JSON within a script is read as it stands; only the beginning of a tag could end it.
    return text.replace("<", "\\u003c")


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a row by their dotted names, without those that were not measured."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{part}": each for part, each in value.items()})
        elif value is not None:
            flat[name] = value
    return flat
