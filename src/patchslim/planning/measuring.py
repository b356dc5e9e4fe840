"""Measures a latency table: every kind of block beside the whole dense model, round by round."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from patchslim.errors import BadSchedule
from patchslim.measurement.latency import interleave
from patchslim.methods._method import Method
from patchslim.model.forward_pass import ForwardPass
from patchslim.model.model import SlimModel
from patchslim.model.plan import make_plan
from patchslim.model.slim import untouched_model
from patchslim.model.step import BlockStep
from patchslim.planning.latency_table import LatencyTable, Point, SelfCheck
from patchslim.planning.runtimes import Runtime
from patchslim.report.row import Quartiles
from patchslim.runs.progress import Progress
from patchslim.tokens.tokens import Tokens

# Shares of the patches that blocks are measured with. The first is the fewest that were reduced.
ROWS = (0.97, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.125)
TAIL_ROWS = (1.0, 0.6, 0.3, 0.125)
CUTS = (0.03, 0.5)  # shares that one decision removes
CHECKED = (0.8, 0.65, 0.5)  # shares of the operations of the schedules that are checked
FEWEST_ROUNDS, MOST_ROUNDS = 5, 40
DECISION_ROUNDS = 15
MOST_BLOCKS = 4  # run in turn in one timing
WARMUP = 1
COPIES = 3  # of what every share is made of, in each round


class Key(NamedTuple):
    """What is timed: the dense model, the untouched one in the loop, a block, or a check."""

    kind: Literal["dense", "untouched", "block", "tail", "check"]
    entering: int = 0
    left: int = 0
    copy: int = 0


@dataclass(frozen=True)
class _Timed:
    """A call, and how many blocks it runs."""

    run: Callable[[], object]
    count: int = 1


def measure_table(
    model: SlimModel, runtime: Runtime, images: Tensor, seconds: float, show: Progress
) -> LatencyTable:
    """Measures the blocks of a model's host with the steps of its method, in about `seconds`.

    Three whole schedules are timed in the same rounds, to check sums over blocks against.

    Args:
        model: the host with the method; its schedule does not matter.
        runtime: what runs it.
        images: as many as run in one call.
        seconds: how long it may take; a few rounds are always timed.
        show: is called with one line of text at a time.
    """
    with torch.inference_mode():
        untouched = untouched_model(model.host, model.plan.adapter)
        dense = runtime.dense(untouched)
        dense(images)
        began = time.perf_counter()
        dense(images)
        estimate = time.perf_counter() - began
        checks = _checked_models(model)
        blocks = _Blocks(model, runtime, images)
        most = seconds * model.plan.shape.depth / (FEWEST_ROUNDS * len(blocks.keys()) * estimate)
        timed = blocks.calls(max(1, min(MOST_BLOCKS, int(most))), show)
        timed[Key("dense")] = _Timed(partial(dense, images))
        timed[Key("untouched")] = _Timed(partial(runtime.whole(untouched), images))
        often = [Key("dense"), Key("untouched"), blocks.keys()[0]]
        for copy in range(1, COPIES):
            timed |= {key._replace(copy=copy): timed[key] for key in often}
        for number, each in enumerate(checks):
            show(f"preparing check {number + 1} of {len(checks)}")
            timed[Key("check", number)] = _Timed(partial(runtime.whole(each), images))
        began = time.perf_counter()
        for call in timed.values():
            call.run()
        round_seconds = time.perf_counter() - began
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / round_seconds)))
        taken = _time_all(timed, rounds, show)
    return _make_table(model, checks, taken, rounds)


def time_decisions(
    models: Sequence[SlimModel], runtime: Runtime, images: Tensor, show: Progress
) -> list[float]:
    """Returns what one decision of each method takes among all patches, as shares of dense time.

    A block in which a method removes few patches is timed beside one that removes none.

    Args:
        models: one host with several methods; their schedules do not matter.
        runtime: what runs them.
        images: as many as run in one call.
        show: is called with one line of text at a time.
    """
    timed: dict[Key, _Timed] = {}
    with torch.inference_mode():
        for number, model in enumerate(models):
            show(f"preparing decision {number + 1} of {len(models)}")
            blocks = _Blocks(model, runtime, images)
            plain, cut = blocks.keys()[:2]
            made = blocks.calls(1, show, [cut] if number else [plain, cut])
            timed |= {key._replace(copy=number): call for key, call in made.items()}
        taken = remove_drift(_time_all(timed, DECISION_ROUNDS, show))
    typical = {key: median(seconds) for key, seconds in taken.items()}
    block = next(seconds for key, seconds in typical.items() if key.entering == key.left)
    cuts = [seconds for key, seconds in typical.items() if key.entering != key.left]
    depth = models[0].plan.shape.depth
    return [max(0.0, seconds / block - 1) / depth for seconds in cuts]


class _Blocks:
    """The kinds of blocks that a table holds, and calls that run them."""

    def __init__(self, model: SlimModel, runtime: Runtime, images: Tensor) -> None:
        self.model, self.runtime, self.images = model, runtime, images
        shape = model.plan.shape
        self.prefix, self.patches = shape.prefix, shape.entering - shape.prefix
        self.read = shape.read if model.plan.tail == "exact" else None
        self.fewest = max(2, _fewest_of_all(model.method, self.patches))

    def keys(self) -> list[Key]:
        """Lists the kinds of blocks."""
        shares = (*ROWS[: -1 : self.runtime.stride], ROWS[-1])
        fewer = {max(self.fewest, round(share * self.patches)) for share in shares} - {self.patches}
        rows = [self.patches, *sorted(fewer, reverse=True)]
        made = []
        for number, entering in enumerate(rows):
            made.append(Key("block", entering, entering))
            if number < len(rows) - 1:
                made += [Key("block", entering, self._left(entering, cut)) for cut in CUTS]
        if self.read is not None:
            tails = [max(self.fewest, round(share * self.patches)) for share in TAIL_ROWS]
            made += [Key("tail", entering, entering) for entering in tails]
        return list(dict.fromkeys(made))

    def calls(
        self, count: int, show: Progress, kinds: Sequence[Key] | None = None
    ) -> dict[Key, _Timed]:
        """Returns calls of at most `count` blocks of each kind, or of some kinds."""
        forward = self.model.start_pass()
        tokens = forward.embed(self.images, {}, track=False)
        made: dict[Key, _Timed] = {}
        keys = sorted(kinds or self.keys(), key=lambda key: -key.entering)
        for number, key in enumerate(keys):
            show(f"preparing block {number + 1} of {len(keys)}")
            tokens = self._reduce(forward, tokens, key.entering)
            step = BlockStep(0, key.entering + self.prefix, key.left + self.prefix)
            if key.kind == "tail":
                step = BlockStep(0, step.entering, step.left, read=self.read)
            elif key.left < key.entering:
                step = BlockStep(0, step.entering, step.left, place=self.model.method.place)
            blocks = self.runtime.blocks(forward, step, tokens, count)
            made[key] = _Timed(blocks.run, blocks.count)
        return made

    def _left(self, entering: int, cut: float) -> int:
        """Returns how many patches a decision leaves, within what the method can at once."""
        wanted = entering - max(1, round(cut * entering))
        return max(wanted, self.model.method.fewest(entering))

    def _reduce(self, forward: ForwardPass, tokens: Tokens, rows: int) -> Tokens:
        """Lets the method reduce tokens to a number of patches, as if in earlier blocks."""
        while tokens.patches > rows:
            left = max(rows, self.model.method.fewest(tokens.patches))
            entering = tokens.patches + self.prefix
            step = BlockStep(0, entering, left + self.prefix, place=self.model.method.place)
            tokens = forward.run_block(step, tokens)
        return tokens


def _fewest_of_all(method: Method, patches: int) -> int:
    """Finds how few patches a method can leave, however often it decides."""
    while method.fewest(patches) < patches:
        patches = method.fewest(patches)
    return patches


def _checked_models(model: SlimModel) -> list[SlimModel]:
    """Makes the schedules to check: the method's own rule at three budgets, where it can."""
    made = []
    for share in CHECKED:
        with contextlib.suppress(BadSchedule):
            plan = make_plan(
                model.host, model.method, macs=share, tail=model.plan.tail,
                adapter=model.plan.adapter,
            )  # fmt: skip
            made.append(SlimModel(model.host, plan).eval())
    return made


def _time_all(timed: dict[Key, _Timed], rounds: int, show: Progress) -> dict[Key, list[float]]:
    """Times every call in every round, in an order drawn anew, and returns seconds of a block."""
    wait: Callable[[], object]
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    def time_one(key: Key) -> float:
        wait()
        began = time.perf_counter()
        timed[key].run()
        wait()
        return (time.perf_counter() - began) / timed[key].count

    return interleave([*timed], time_one, rounds, WARMUP, draw=Random(0), progress=_say_calls(show))


def _say_calls(show: Progress) -> Progress:
    """Shows the progress of timing; what is timed here are mostly blocks, not models."""
    return lambda line: show(line.replace(" models:", " calls:"))


def remove_drift(taken: Mapping[Key, Sequence[float]]) -> dict[Key, list[float]]:
    """Divides all times of a round by how slow the round was: the median over all that was timed.

    One time of the dense model would say that less well than all times of the round together.
    """
    usual = {key: median(seconds) for key, seconds in taken.items()}
    rounds = range(len(next(iter(taken.values()))))
    slow = [median(seconds[each] / usual[key] for key, seconds in taken.items()) for each in rounds]
    return {
        key: [each / by for each, by in zip(seconds, slow, strict=True)]
        for key, seconds in taken.items()
    }


def _make_table(
    model: SlimModel,
    checks: Sequence[SlimModel],
    taken: dict[Key, list[float]],
    rounds: int,
) -> LatencyTable:
    """Makes the table of what was timed: medians over the rounds, divided by the dense one."""
    steady = remove_drift(taken)
    dense = [each for key, seconds in steady.items() if key.kind == "dense" for each in seconds]
    pooled: dict[Key, list[float]] = {}
    for key, seconds in steady.items():
        pooled.setdefault(key._replace(copy=0), []).extend(seconds)
    share = {
        key: Quartiles.of([each / median(dense) for each in seconds])
        for key, seconds in pooled.items()
    }

    def points(kind: str, rows: Callable[[int], bool]) -> tuple[Point, ...]:
        return tuple(
            Point(key.entering, key.left, each.median, each.low, each.high)
            for key, each in share.items()
            if key.kind == kind and rows(key.entering)
        )

    shape = model.plan.shape
    patches = shape.entering - shape.prefix
    whole = points("block", lambda rows: rows == patches)
    plain = next(each.share for each in whole if each.left == patches)
    table = LatencyTable(
        depth=shape.depth,
        rest=share[Key("untouched")].median - shape.depth * plain,
        whole=whole,
        reduced=points("block", lambda rows: rows < patches),
        tail=points("tail", lambda _: True),
        checks=(),
        dense_seconds=median(dense),
        rounds=rounds,
    )
    checked = tuple(
        SelfCheck(
            each.counts(),
            table.predict(each.plan.steps, shape.prefix),
            share[Key("check", number)].median,
        )
        for number, each in enumerate(checks)
    )
    return LatencyTable(**{**vars(table), "checks": checked})
