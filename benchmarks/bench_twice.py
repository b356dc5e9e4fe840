"""Whether a second run of `bench`, at another hour, finds what the first one found.

    python benchmarks/bench_twice.py runs/bench-first runs/bench

Both folders are from the same command; the second may have begun with the answers of the first, so
that times alone are measured again. For each row it is told whether the second median lies between
the quartiles of the first run, and how far the medians are apart. Writes
benchmarks/results/bench_twice.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patchslim.report.report import Report
from patchslim.report.row import Row

RESULT = Path(__file__).parent / "results" / "bench_twice.json"


def compare(first: Row, second: Row) -> dict[str, Any]:
    """Compares one row of both runs."""
    one, two = first.speedup, second.speedup
    return {
        "name": first.name,
        "method": first.method,
        "first": None if one is None else asdict(one),
        "second": None if two is None else asdict(two),
        "inside": one is not None and two is not None and one.low <= two.median <= one.high,
        "apart": None if one is None or two is None else two.median / one.median - 1,
    }


def main() -> None:
    """Compares two folders and writes what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    one, two = (Report.load(each / "report.json") for each in (options.first, options.second))
    others = {row.name: row for row in two.rows}
    if {row.name for row in one.rows} != others.keys():
        parser.error("the folders have other rows: they are not of one command")
    pairs = [(row, others[row.name]) for row in one.rows[1:]]
    rows = [compare(*pair) for pair in pairs]
    timed = [row for row in rows if row["apart"] is not None]
    facts = {
        "rows": len(rows),
        "timed": len(timed),
        "inside": sum(row["inside"] for row in timed),
        "within_5_percent": sum(abs(row["apart"]) <= 0.05 for row in timed),
        "median_apart": statistics.median(abs(row["apart"]) for row in timed),
        "command": two.provenance.command,
        "runs": [
            {name: getattr(each.provenance, name) for name in ("processor", "date", "load")}
            for each in (one, two)
        ],
        "each": rows,
    }
    options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for name, fact in facts.items():
        if not isinstance(fact, list):
            print(f"{name}: {fact}")
    for row in timed:
        if not row["inside"]:
            first, second = row["first"]["median"], row["second"]["median"]
            print(f"{row['name']}: {first:.3f}, then {second:.3f}")


if __name__ == "__main__":
    main()
