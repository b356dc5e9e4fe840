"""Our methods beside their authors' own code: DeiT-Ti, real weights, nothing trained.

    python benchmarks/peers.py --shared ../shared

`peer_figures.py` has what the official code reached on 1,000 images, at the same token counts; 500
of these images are measured here. Writes benchmarks/results/peers.json, from which tables in docs
are made. A setting that is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peer_figures import LATER, PEERS
from real_model import load_deit_tiny

import patchslim
from patchslim.data.images import Images
from patchslim.errors import DeepCut, ShortSchedule
from patchslim.hosts._preprocessing import find_preprocessing
from patchslim.measurement.measure import measure

RESULT = Path(__file__).parent / "results" / "peers.json"
AT_ONCE = 4  # settings that are measured in one pass over the images, and then written
OURS = {f"topk+tome r={r}": {"r": r, "at": LATER} for r in (9, 15)}


def main() -> None:
    """Measures what is missing, one setting after the other, and writes the file after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--limit", type=int, help="fewer images, for a try")
    parser.add_argument("--only", nargs="+", help="methods, such as gtp; the others wait")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeepCut)
    warnings.simplefilter("ignore", ShortSchedule)
    data = options.shared / "data"
    host = load_deit_tiny(options.shared)
    images = Images.for_host(
        host,
        data / "imagenet-sample-500.zip",
        prepared=find_preprocessing(host, patchslim.find_adapter(host)),
        classes=data / "imagenet-classes.txt",
        limit=options.limit,
        batch=50,
    )
    results: dict[str, Any] = {}
    if options.out.exists():
        results = json.loads(options.out.read_text(encoding="utf-8"))
    asked = {**{peer.name: peer.settings for peer in PEERS}, **OURS}
    wanted = options.only or [name.split()[0] for name in asked]
    missing = [name for name in asked if name not in results and name.split()[0] in wanted]
    for start in range(0, len(missing), AT_ONCE):
        names = missing[start : start + AT_ONCE]
        models = {name: patchslim.slim(host, name.split()[0], **asked[name]) for name in names}
        report = measure(models, images, batch=1, repeats=0, baseline=False)
        for row in report.rows[1:]:
            only = replace(report, rows=(report.dense, row))
            results[row.name] = only.to_json()
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(report.table(), flush=True)


if __name__ == "__main__":
    main()
