"""Packs a whole report into a page: every number once, compressed to letters that end no markup."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

from patchslim.report.report import Report


def pack_report(report: Report) -> str:
    """Returns the report for a `<script>` element: JSON, by gzip, in base64.

    In `columns` is, by names such as "latency.median", a list with the value of each row; null is
    what was not measured. The script of the page makes the usual JSON of it.
    """
    data = report.to_json()
    flat = [_flatten(row) for row in data.pop("rows")]
    names = dict.fromkeys(name for row in flat for name in row)
    packed = {"report": data, "columns": {name: [row.get(name) for row in flat] for name in names}}
    text = json.dumps(packed, separators=(",", ":"), allow_nan=False)
    # The same report is the same page, whenever it is written.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a row by their dotted names, without those that were not measured."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{part}": each for part, each in value.items()})
        elif value is not None:
            flat[name] = value
    return flat
