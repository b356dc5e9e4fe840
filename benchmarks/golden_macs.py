"""Published and computed operation counts of ten methods, rebuilt and compared to three decimals.

Dense hosts, ToMe, EViT, DynamicViT and Patch Slimming are counted by the package itself: real timm
models (without weights), its own methods and schedules. Methods that do not ship yet are traces:
how many rows pass through each part of each block. LeViT and LV-ViT are shapes of their own. One
image, one multiply-add counts 1; bias, norm, softmax, activation, similarities, sorting and
gathering count 0.

    python benchmarks/golden_macs.py [facts.json]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

import patchslim
from patchslim.methods.dynamicvit import DynamicViT
from patchslim.methods.evit import EViT
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Counts, Rate
from patchslim.tokens.shapes import BlockShape, Flow, HostShape, host_macs

FACTS = Path(__file__).parent.parent / "tests" / "reference" / "golden_macs.json"
TWO_DECIMALS = {
    "/dense/vit_large_patch16_384",
    "/tome_constant_r/L16_384/23",
    "/tome_constant_r/B16_384/45",
}  # the facts give these with two decimals, all others with three, or in whole numbers

DEIT = {
    "T": "deit_tiny_patch16_224",
    "S": "deit_small_patch16_224",
    "B": "deit_base_patch16_224",
}
OTHERS = (
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "deit_small_patch16@384",
    "deit_base_patch16_384",
    "vit_large_patch16_384",
)
RATES = ("0.9", "0.8", "0.7", "0.6", "0.5")
PLACES = (3, 6, 9)
TOME = {
    "T": ("deit_tiny_patch16_224", (8, 12, 13, 16, 20)),
    "S": ("deit_small_patch16_224", (8, 12, 13, 16, 20)),
    "B": ("deit_base_patch16_224", (8, 10, 11, 12, 13, 14, 16)),
    "L16_224": ("vit_large_patch16_224", (4, 5, 6, 7, 8)),
    "H14_224": ("vit_huge_patch14_224", (7,)),
    "L16_384": ("vit_large_patch16_384", (23,)),
    "B16_384": ("deit_base_patch16_384", (45,)),
}
SLIMMING = (197, 197, 187, 167, 147, 127, 107, 87, 67, 47, 27, 1)  # the last is the class token
DIFFRATE = {
    "deit_small_2.9": (
        "S",
        (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
        (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
    ),
    "deit_base_11.5": (
        "B",
        (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3),
        (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3),
    ),
}


@cache
def host(name: str) -> nn.Module:
    """Builds the timm model without weights; `name@384` is the 224-pixel model built for 384."""
    architecture, _, size = name.partition("@")
    options = {"num_classes": 1000}
    if size:
        architecture, options["img_size"] = f"{architecture}_224", int(size)
    with torch.device("meta"):
        model: nn.Module = timm.create_model(architecture, **options)
    return model


@cache
def deit(name: str) -> HostShape:
    """Makes the shape of a DeiT."""
    model = host(DEIT[name])
    return patchslim.find_adapter(model).shape(model)


def giga(macs: int) -> float:
    """Rounds to billions with three decimals."""
    return round(macs / 1e9, 3)


def total(shape: HostShape, flows: Sequence[Flow]) -> float:
    """Counts billions of multiply-adds of a host through which `flows` pass."""
    return giga(host_macs(shape, flows).total)


def dense() -> dict[str, object]:
    """Counts the untouched hosts, by the package."""
    names = (*DEIT.values(), *OTHERS)
    return {name: giga(patchslim.macs(host(name)).total) for name in names}


def evit(*, fuse: bool) -> dict[str, object]:
    """Counts EViT, by the package; the token lists belong to the fused variant only."""
    costs = {
        name: {
            rate: patchslim.macs(host(full), EViT(fuse=fuse), keep_rate=float(rate), at=PLACES)
            for rate in RATES
        }
        for name, full in DEIT.items()
    }
    rows = {rate: [cost.rows[block] for block in PLACES] for rate, cost in costs["T"].items()}
    table: dict[str, object] = {"tokens": rows} if fuse else {}
    for name, by_rate in costs.items():
        table[name] = {rate: giga(cost.total) for rate, cost in by_rate.items()}
    return table


def tome() -> dict[str, object]:
    """Counts ToMe with a constant r, by the package."""
    return {
        name: {str(r): giga(patchslim.macs(host(full), "tome", r=r).total) for r in every}
        for name, (full, every) in TOME.items()
    }


def dynamicvit() -> dict[str, object]:
    """Counts DynamicViT with its predictors, by the package, choosing included."""
    costs = {
        name: {
            rate: patchslim.macs(host(full), "dynamicvit", keep_rate=float(rate), at=PLACES)
            for rate in RATES
        }
        for name, full in DEIT.items()
    }
    table: dict[str, object] = {
        name: {rate: giga(cost.total + cost.choosing) for rate, cost in by_rate.items()}
        for name, by_rate in costs.items()
    }
    table["tokens"] = {
        rate: [cost.rows[block] for block in PLACES] for rate, cost in costs["T"].items()
    }
    return table


def evo() -> dict[str, object]:
    """Counts Evo-ViT: dense up to block 4, then half of all patches (placeholders stay)."""

    def flows(shape: HostShape) -> list[Flow]:
        slow = shape.prefix + (shape.entering - shape.prefix) // 2
        return [Flow.uniform(rows) for rows in [shape.entering] * 4 + [slow] * (shape.depth - 4)]

    return {name: total(deit(name), flows(deit(name))) for name in DEIT}


def mctf() -> dict[str, object]:
    """Counts MCTF: from block 1 on, the map is of the old rows, all else of merged ones."""

    def flows(shape: HostShape, r: int, floor: int = 10) -> list[Flow]:
        rows = shape.entering
        made = [Flow.uniform(rows)]
        for _ in range(1, shape.depth):
            left = rows - max(0, min(r, rows - floor, (rows - shape.prefix) // 2))
            made.append(Flow(rows, rows, left, left, left))
            rows = left
        return made

    return {
        name: {str(r): total(deit(name), flows(deit(name), r)) for r in (8, 16, 20)}
        for name in ("T", "S")
    }


def before_feed(entering: int, left: Sequence[int]) -> list[Flow]:
    """Makes flows at P1: attention on the rows that enter, feed-forward on those that are left."""
    return [Flow.uniform(rows, feed=after) for rows, after in pairwise((entering, *left))]


def pitome() -> dict[str, object]:
    """Counts PiToMe: merges the whole part of T - T * ratio of the T patches in every block."""

    def flows(shape: HostShape, ratio: float) -> list[Flow]:
        patches, left = shape.entering - shape.prefix, []
        for _ in range(shape.depth):
            patches -= math.floor(patches - patches * ratio)
            left.append(patches + shape.prefix)
        return before_feed(shape.entering, left)

    rates = ("0.95", "0.925", "0.90")
    return {
        name: {rate: total(deit(name), flows(deit(name), float(rate))) for rate in rates}
        for name in DEIT
    }


def slimming() -> dict[str, object]:
    """Counts Patch Slimming, by the package: the last block outputs the class token alone."""
    rule = Counts((*SLIMMING[:-1], SLIMMING[-2]), entering=197, prefix=1)
    costs = {
        name: patchslim.macs(host(full), PatchSlimming(), rule, tail="exact")
        for name, full in DEIT.items()
    }
    table: dict[str, object] = {name: giga(cost.total) for name, cost in costs.items()}
    return {"out": list(costs["T"].rows), **table}


def diffrate() -> dict[str, object]:
    """Counts DiffRate (P1) with two published schedules."""
    table: dict[str, object] = {}
    for key, (name, prune, merge) in DIFFRATE.items():
        left = list(map(min, prune, merge))
        macs = total(deit(name), before_feed(deit(name).entering, left))
        table[key] = {"prune": list(prune), "merge": list(merge), "gmacs": macs}
    return table


def convolution(side: int, kernel: int, entering: int, leaving: int) -> int:
    """Counts a square convolution that outputs a grid of `side` by `side`."""
    return side * side * kernel * kernel * entering * leaving


def lvvit() -> dict[str, object]:
    """Counts DynamicViT on LV-ViT-S without predictors; a head for the class token alone."""
    stem = convolution(112, 7, 3, 64) + 2 * convolution(112, 3, 64, 64)
    shape = HostShape(
        grid=(14, 14),
        prefix=1,
        embed=stem + convolution(14, 8, 64, 384),
        blocks=(BlockShape.standard(384, 6, ratio=3),) * 16,
        head=384 * 1000,
    )
    method = DynamicViT()

    def macs(rate: str) -> float:
        counts = Rate(float(rate), (4, 8, 12)).counts(shape.entering, 1, shape.depth, method)
        return giga(slim_macs(shape, method, counts, tail=False).total)

    return {rate: macs(rate) for rate in ("0.9", "0.8", "0.7", "0.5")}


class Levit(NamedTuple):
    """Three stages of LeViT; feed-forward of twice the width, one key width for all."""

    widths: tuple[int, int, int]
    key: int
    heads: tuple[int, int, int]
    depths: tuple[int, int, int]


LEVITS = {
    "128S": Levit((128, 256, 384), 16, (4, 6, 8), (2, 3, 4)),
    "128": Levit((128, 256, 384), 16, (4, 8, 12), (4, 4, 4)),
    "192": Levit((192, 288, 384), 32, (3, 5, 6), (4, 4, 4)),
    "256": Levit((256, 384, 512), 32, (4, 6, 8), (4, 4, 4)),
    "384": Levit((384, 512, 768), 32, (6, 9, 12), (4, 4, 4)),
}


def levit_block(width: int, out: int, inner: int, key: int, values: int) -> BlockShape:
    """Makes a block with values `values` times as wide as keys, from `width` to `out` channels."""
    return BlockShape(
        width=width,
        q=width * inner,
        k=width * inner,
        v=width * inner * values,
        query_width=inner,
        value_width=inner * values,
        key_width=key,
        out=inner * values * out,
        feed=4 * out * out,
        score=inner,
    )


def levit(keep: float) -> dict[str, object]:
    """Counts LeViT at 224 pixels in millions; `keep` below 1 is Evo-LeViT, stage by stage.

    Evo-LeViT runs the first two blocks on patches and class token, the later ones on the class
    token, the whole part of patches * keep, and one representative. Between stages the restored
    grid is subsampled: all rows are keys and values, those of the smaller grid are queries.
    """
    return {name: round(_levit_macs(shape, keep) / 1e6) for name, shape in LEVITS.items()}


def _levit_macs(shape: Levit, keep: float) -> int:
    """Counts the multiply-adds of one LeViT with its two heads."""
    blocks: list[BlockShape] = []
    flows: list[Flow] = []
    side, prefix = 14, int(keep < 1)
    for stage, (width, heads) in enumerate(zip(shape.widths, shape.heads, strict=True)):
        patches = side * side
        slow = int(patches * keep) + 2 if prefix else patches
        rows = [
            patches + prefix if stage == 0 and i < 2 else slow for i in range(shape.depths[stage])
        ]
        blocks += [levit_block(width, width, shape.key * heads, shape.key, 2)] * len(rows)
        flows += map(Flow.uniform, rows)
        if stage + 1 < len(shape.widths):
            side = (side + 1) // 2
            inner = shape.key * (width // shape.key)
            blocks.append(levit_block(width, shape.widths[stage + 1], inner, shape.key, 4))
            entering, leaving = patches + prefix, side * side + prefix
            flows.append(Flow(leaving, entering, entering, leaving, leaving))
    channels = [3, *(shape.widths[0] // part for part in (8, 4, 2, 1))]
    sides = (112, 56, 28, 14)
    stem = sum(convolution(s, 3, a, b) for s, (a, b) in zip(sides, pairwise(channels), strict=True))
    head = 2 * shape.widths[-1] * 1000
    return host_macs(HostShape((14, 14), prefix, stem, tuple(blocks), head), flows).total


def rebuilt() -> dict[str, object]:
    """Computes every number of the facts, under the same keys."""
    return {
        "dense": dense(),
        "evit_fuse_blocks_3_6_9": evit(fuse=True),
        "evit_nofuse": evit(fuse=False),
        "dynamicvit_with_predictor_blocks_3_6_9": dynamicvit(),
        "tome_constant_r": tome(),
        "evo_deit_p0.5_blocks_4_8_no_representative": evo(),
        "mctf": mctf(),
        "pitome_every_block": pitome(),
        "patch_slimming_example_out": slimming(),
        "diffrate": diffrate(),
        "evo_levit_224_stagewise_mmacs": levit(0.5),
        "levit_dense_mmacs": levit(1.0),
        "dynamicvit_lvvit_s_blocks_4_8_12_no_predictor": lvvit(),
    }


def numbers(node: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Lists all numbers of a tree of dictionaries and lists, with their paths; skips texts."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from numbers(value, f"{path}/{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from numbers(value, f"{path}/{index}")
    elif isinstance(node, int | float):
        yield path, node


def compare(facts: object) -> tuple[int, list[str]]:
    """Counts the numbers compared, and writes a line for each that differs."""
    stored, computed = dict(numbers(facts)), dict(numbers(rebuilt()))
    lines: list[str] = []
    for path in sorted({*stored, *computed}):
        wanted, got = stored.get(path), computed.get(path)
        if got is not None and path in TWO_DECIMALS:
            got = round(got, 2)
        if wanted is None or got is None or abs(wanted - got) > 0.0005:
            lines.append(f"{path}: stored {wanted}, computed {got}")
    return len({*stored, *computed}), lines


def main(arguments: Sequence[str]) -> int:
    """Compares a file of facts, by default the tests' own; returns 1 if a number differs."""
    path = Path(arguments[0]) if arguments else FACTS
    count, lines = compare(json.loads(path.read_text(encoding="utf-8")))
    print(f"compared {count} values, {len(lines)} differ")
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
