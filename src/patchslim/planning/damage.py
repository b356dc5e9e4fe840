"""Estimates from unlabelled images what it costs in answers to remove tokens after each block.

The dense model runs up to a block, one cut is made there, and the rest runs with fewer rows. The KL
divergence from the dense answers is the damage. A curve of few parameters is fitted to all these
probes, since a table that is searched freely learns the images that it was measured on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchslim.measurement.score import kl_divergence
from patchslim.model.model import SlimModel
from patchslim.model.step import BlockStep
from patchslim.planning.search import Table
from patchslim.runs.progress import Progress
from patchslim.tokens.packing import pad
from patchslim.tokens.tokens import Tokens

CUTS = (0.1, 0.25, 0.5, 0.75)  # shares of the patches that the probes remove
PROBED_BLOCKS = 6  # evenly spread; the curve between them is smooth
LEAST_KL = 1e-7  # nats; below it the logarithm of a probe says nothing
LEAST_POWER = 1.0  # a second cut at the same place does at least as much damage as the first
RIDGE = 1e-2  # pulls the curve to a straight line where the probes say little


@dataclass(frozen=True)
class Damage:
    """The damage of keeping only a share of the patches after a block, as a curve.

    Removing the share r after the block at depth x (0 first, 1 last) costs
    exp(level + slope x + bend x² + (power + twist x) log r). A step costs what its own cut would
    cost by itself, and what all that is removed costs more after it than before. With the former
    alone, what has gone already would cost nothing; with the latter alone, one deep cut would be as
    good as many small ones.

    Attributes:
        level, slope, bend, power, twist: the parameters of the curve.
    """

    level: float
    slope: float
    bend: float
    power: float
    twist: float

    def of_cut(self, depth: float, removed: float) -> float:
        """Returns the damage of removing a share of the patches at a depth between 0 and 1."""
        if removed <= 0:
            return 0.0
        power = max(self.power + self.twist * depth, LEAST_POWER)
        at_depth = self.level + self.slope * depth + self.bend * depth**2
        return math.exp(at_depth + power * math.log(removed))

    def table(self, levels: Sequence[int], blocks: int) -> Table:
        """Returns the damage of each step between levels (numbers of patches) in each block."""
        made = np.zeros((blocks, len(levels), len(levels)))
        rows = np.array(levels, dtype=np.float64)
        for block in range(blocks):
            depth = block / max(blocks - 1, 1)
            cut = np.array([self.of_cut(depth, 1 - each / levels[0]) for each in levels])
            step = np.vectorize(self.of_cut)(depth, 1 - rows[None, :] / rows[:, None])
            made[block] = np.maximum(cut[None, :] - cut[:, None], 0) + step
        return made


def fit_damage(probes: Sequence[tuple[float, float, float]]) -> Damage:
    """Fits the curve to probes: depth, removed share, and KL divergence."""
    depth, removed, kl = np.array(probes, dtype=np.float64).T
    log_removed = np.log(removed)
    columns = np.stack(
        [np.ones_like(depth), depth, depth**2, log_removed, depth * log_removed], axis=1
    )
    # Bend and twist are pulled to 0, so that noise in few probes does not bend the curve.
    ridge = np.diag(np.sqrt(RIDGE * len(kl)) * np.array([0.0, 0.0, 1.0, 0.0, 1.0]))
    target = np.concatenate([np.log(np.maximum(kl, LEAST_KL)), np.zeros(5)])
    solved = np.linalg.lstsq(np.concatenate([columns, ridge]), target, rcond=None)[0]
    return Damage(*map(float, solved))


def probe_damage(
    dense: SlimModel, cutting: SlimModel, batches: Sequence[Tensor], show: Progress
) -> list[tuple[float, float, float]]:
    """Cuts once after some blocks, by several shares, and returns what that changes.

    Args:
        dense: the host with nothing removed.
        cutting: the host with the method that cuts.
        batches: the images.
        show: is called with one line of text at a time.
    """
    depth = cutting.plan.shape.depth
    sums: dict[tuple[int, float], float] = {}
    step = max(depth - 2, 1) / max(PROBED_BLOCKS - 1, 1)
    probed = {round(number * step) for number in range(PROBED_BLOCKS)}
    total = sum(len(batch) for batch in batches)
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            wanted = dense.plan.adapter.logits(dense(batch))
            whole = dense.start_pass()
            tokens = whole.embed(batch, {}, track=whole.facts.returns_rows)
            plain = whole.steps(tokens)
            for block in range(depth - 1):
                show(f"damage: images {number + 1}/{len(batches)}, block {block + 1}/{depth}")
                for cut in CUTS if block in probed else ():
                    answer = _answer_with_cut(cutting, block, cut, tokens, plain)
                    kl = float(kl_divergence(wanted, answer).sum()) / total
                    sums[block, cut] = sums.get((block, cut), 0.0) + kl
                tokens = whole.run_block(plain[block], tokens)
    last = max(depth - 1, 1)
    return [
        (block / last, _cut_rows(cutting, cut) / _patches(cutting), kl)
        for (block, cut), kl in sums.items()
    ]


def _answer_with_cut(
    cutting: SlimModel, block: int, cut: float, tokens: Tokens, plain: Sequence[BlockStep]
) -> Tensor:
    """Answers with one cut after a block, from the tokens that enter the block."""
    forward = cutting.start_pass()
    rows = plain[block].entering
    left = rows - _cut_rows(cutting, cut)
    place = cutting.method.place
    steps = [BlockStep(block, rows, left, place=place)]
    steps += [BlockStep(each.index, left, left, read=each.read) for each in plain[block + 1 :]]
    for step in steps:
        tokens = forward.run_block(step, tokens)
    output = forward.adapter.head(forward.host, pad(tokens), {})
    return forward.adapter.logits(output)


def _patches(model: SlimModel) -> int:
    return model.plan.shape.entering - model.plan.shape.prefix


def _cut_rows(model: SlimModel, cut: float) -> int:
    """Returns how many patches a probe removes: a share, within what the method can at once."""
    patches = _patches(model)
    return min(max(1, round(cut * patches)), patches - model.method.fewest(patches))
