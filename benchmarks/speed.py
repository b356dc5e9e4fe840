"""Speed as a ratio inside one run: DeiT-S in eager mode, dense and slimmed interleaved.

    python benchmarks/speed.py                # batch 1 and 8 on this machine's cores
    python benchmarks/speed.py --device cuda --dtype bfloat16 --batches 1,8,64,256

Conversion is measured speed-up times the share of operations: 1 means that time falls as much as
operations do. Weights and positions are random: they do not matter for speed. Writes
benchmarks/results/speed_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import timm
import torch
from torch import nn

import patchslim
from patchslim.errors import Untrained
from patchslim.measurement.measure import measure
from patchslim.methods._ranking import format_order
from patchslim.model.model import SlimModel

RESULTS = Path(__file__).parent / "results"


def uncalibrated(host: nn.Module, method: str, macs: float) -> SlimModel:
    """Slims by a method whose gates choose at random, which takes as long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Untrained)
        return patchslim.slim(host, method, macs=macs)


def at_once(host: nn.Module, order: str, macs: float) -> SlimModel:
    """Removes all in the first block, by constants: the most that fewer rows can gain here."""
    shape = patchslim.find_adapter(host).shape(host)
    rows = shape.entering
    while True:
        rows -= 1
        keep = [rows] * shape.depth
        model = patchslim.slim(host, "patch_slimming", keep=keep, tail="exact", order=order)
        if model.macs().total <= macs * model.dense_macs().total:
            return model


def main() -> None:
    """Measures each batch size and writes one file with a report for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves the default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    host = timm.create_model(options.model).eval()
    host = host.to(options.device, getattr(torch, options.dtype))
    grid = patchslim.find_adapter(host).shape(host).grid
    order = format_order(grid, torch.randperm(grid[0] * grid[1]).tolist())
    slimmed = {
        "identity": patchslim.slim(host, "identity"),
        "tome r=13": patchslim.slim(host, "tome", r=13),
        "evit 0.7": patchslim.slim(host, "evit", keep_rate=0.7),
        "topk 0.7": patchslim.slim(host, "topk", keep_rate=0.7),
        "tome macs=0.6": patchslim.slim(host, "tome", macs=0.6),
        "evit macs=0.6": patchslim.slim(host, "evit", macs=0.6),
        "similarity macs=0.6": patchslim.slim(host, "similarity", macs=0.6),
        "patch_slimming 0.7": patchslim.slim(host, "patch_slimming", keep_rate=0.7, order=order),
        "patch_slimming macs=0.6": patchslim.slim(host, "patch_slimming", macs=0.6, order=order),
        "at once macs=0.6": at_once(host, order, macs=0.6),
        "patch_slimming_dynamic macs=0.6": uncalibrated(host, "patch_slimming_dynamic", macs=0.6),
    }
    reports = []
    for batch in map(int, options.batches.split(",")):
        repeats = max(options.repeats if batch == 1 else options.repeats // 2, 10)
        report = measure(slimmed, batch=batch, repeats=repeats)
        print(report.table(), "\n", flush=True)
        reports.append(report.to_json())
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"speed_{options.device}.json"
    out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
