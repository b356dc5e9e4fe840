"""The search of Patch Slimming (Algorithm 1): from the last layer down, how many and which rows.

Each layer must give out what the next one gives out, and besides the positions of most influence,
until the next layer's features are those of the dense model within a tolerance. It runs the one
loop of `SlimModel`, block by block, on tokens in memory; it knows neither files nor budgets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.calibration.patch_slimming.config import Search
from patchslim.calibration.patch_slimming.importance import influence
from patchslim.calibration.patch_slimming.result import Found, Layer
from patchslim.errors import Diverged, ImpossibleBudget
from patchslim.methods._ranking import covering, ordered, worth
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.model.model import SlimModel
from patchslim.model.step import Step
from patchslim.schedules.schedule import Constant
from patchslim.tokens.attention import attention_map
from patchslim.tokens.reduction import Fixed
from patchslim.tokens.tokens import Tokens

HELD = 2**31  # bytes of the dense model's features that are kept rather than computed again
CURVE = 4  # further counts at which a layer's error is taken, for the figure

Say = Callable[[str], object]


class Features:
    """The dense model's tokens before each block, for all images, batch by batch."""

    def __init__(self, dense: SlimModel, images: Sequence[Tensor]) -> None:
        self.dense = dense
        self.depth = dense.shape().depth
        with torch.no_grad():
            self._known = {0: [dense.embed(batch, {}, track=False) for batch in images]}
        first = self._known[0]
        size = sum(each.x.numel() * each.x.element_size() for each in first)
        self._all = size * (self.depth + 1) <= HELD
        self.prefix, self.patches, self.grid = first[0].prefix, first[0].patches, first[0].grid

    def before(self, block: int) -> list[Tokens]:
        """The tokens that enter a block; after the last one for block = depth."""
        if block not in self._known:
            self._known = self._computed(block)
        return self._known[block]

    @torch.no_grad()
    def _computed(self, block: int) -> dict[int, list[Tokens]]:
        """All tokens where they fit, else those before a block, after it, and after the next."""
        first, last = (0, self.depth) if self._all else (block, min(block + 2, self.depth))
        tokens = self._known[0]
        known = {0: tokens}
        rows = self.prefix + self.patches
        for index in range(last):
            tokens = [self.dense.run(Step(index, rows, rows), each) for each in tokens]
            if index + 1 >= first:
                known[index + 1] = tokens
        return known


class Walk:
    """The search from the last block down, on one set of images.

    Args:
        dense: the dense model, unchanged, as a SlimModel that removes nothing.
        student: the host whose blocks are tuned; the dense host itself where none is.
        images: batches on the host's device.
        search: the settings.
        outputs: patch rows that the last block gives out; 0 where the head reads the prefix only.
    """

    def __init__(
        self,
        dense: SlimModel,
        student: nn.Module,
        images: Sequence[Tensor],
        search: Search,
        outputs: int,
    ) -> None:
        self.dense, self.student, self.search, self.outputs = dense, student, search, outputs
        self.features = Features(dense, images)
        self.depth, self.patches = self.features.depth, self.features.patches
        self.even = worth(covering(self.features.grid)).double()
        self.reads = None if outputs else dense.adapter.reads(dense.host)

    def begin(self) -> Found:
        """Before the first layer: what the head reads."""
        if not self.outputs:
            return Found(tuple(range(self.patches)))
        found = Found(tuple(range(self.patches)))
        cells = self._ranked(found, self.depth - 1, 0)
        return Found(cells, (Layer(self.depth - 1, self.outputs, 0.0, 1.0),))

    def blocks(self, found: Found) -> range:
        """The blocks that are still to be searched."""
        return range(self.depth - 2 - len(found.layers) + bool(self.outputs), -1, -1)

    def layer(
        self, found: Found, block: int, *, tolerance: float, kept: int | None, say: Say
    ) -> Found:
        """The pyramid with one more layer.

        Args:
            found: the layers above.
            block: the block.
            tolerance: the largest error of the next block's features.
            kept: patch rows that it has to give out, where that is known already.
            say: is called with a line of text for each candidate.
        """
        above = found.kept().get(block + 1, self.outputs)
        cells = self._ranked(found, block, above)
        trial = _Trial(self, replace(found, cells=cells), block, above)
        least = max(above, 1)
        if kept is None:
            tolerance *= trial.scale if self.search.error == "relative" else 1.0
            tolerance *= self.search.slack if self.before_the_head(block) else 1.0
            choose = self._by_steps if self.search.mode == "paper" else self._by_halves
            kept = choose(trial, least, tolerance, say)
        else:
            between = torch.linspace(least, self.patches, CURVE + 2).round().int().tolist()
            for count in {*between, kept}:
                trial.error(count)
        curve = tuple(sorted(trial.errors.items()))
        if self.search.mode == "fast":
            trial.tune(kept)
        error = trial.error(kept)
        say(f"block {block}: {kept} of {self.patches} patches, error {error:.3g}")
        layer = Layer(block, kept, error, trial.scale, curve)
        return Found(cells, (*found.layers, layer))

    def before_the_head(self, block: int) -> bool:
        """Whether the block after this one gives out what the head reads and no patches."""
        return block + 2 == self.depth and not self.outputs

    def _by_halves(self, trial: _Trial, least: int, tolerance: float, say: Say) -> int:
        """The fewest rows within the tolerance, as the error falls with every row."""
        step = self.search.step
        low, high = -1, -(-(self.patches - least) // step)
        self._insist(trial, trial.error(self.patches), tolerance)
        while high - low > 1:
            middle = (low + high) // 2
            count = min(least + middle * step, self.patches)
            error = trial.error(count)
            say(f"block {trial.block}: {count} patches give an error of {error:.3g}")
            low, high = (low, middle) if error <= tolerance else (middle, high)
        return min(least + high * step, self.patches)

    def _by_steps(self, trial: _Trial, least: int, tolerance: float, say: Say) -> int:
        """The first of the candidates, in steps, that tuning brings within the tolerance."""
        count = least
        while True:
            trial.tune(count)
            error = trial.error(count)
            say(f"block {trial.block}: {count} patches, tuned, give an error of {error:.3g}")
            if error <= tolerance:
                return count
            if count == self.patches:
                self._insist(trial, error, tolerance)
            count = min(count + self.search.step, self.patches)

    def _insist(self, trial: _Trial, error: float, tolerance: float) -> None:
        """Refuses a tolerance that no number of patches meets."""
        if not error <= tolerance:
            raise ImpossibleBudget(
                f"tolerance: block {trial.block} has an error of {error:.3g} even with all its "
                f"{self.patches} patches, since later blocks were tuned, or by rounding; with this "
                f"tolerance it may be {tolerance:.3g}. Give a larger one, or a budget (macs=)."
            )

    @torch.no_grad()
    def scores(self, found: Found, block: int) -> list[Tensor]:
        """The exact score of every patch of every image, batch by batch (B, n)."""
        model = self.model(found)
        prefix = self.features.prefix
        scores = []
        entering, leaving = self.features.before(block), self.features.before(block + 1)
        for before, after in zip(entering, leaving, strict=True):
            weights = self._map(model, block, before, before)
            tokens, later = after, []
            for index in range(block + 1, self.depth):
                step = self.step(found, index, tokens)
                later.append(self._map(model, index, self._asking(model, step, tokens), tokens))
                tokens = model.run(step, tokens)
            scores.append(influence(weights, before.x, later)[:, prefix:])
        return scores

    def _ranked(self, found: Found, block: int, above: int) -> tuple[int, ...]:
        """All cells: first those that the next block gives out, then the best of the others.

        The score does not know that neighbours tell the same, so that even coverage counts too.
        """
        scores = torch.cat(self.scores(found, block)).double().mean(dim=0).cpu()
        scores = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
        scores += self.search.cover * self.even
        first = found.cells[:above]
        scores[list(first)] = torch.inf
        best = scores.argsort(descending=True, stable=True).tolist()
        return (*first, *best[above:])

    def model(self, found: Found) -> SlimModel:
        """The student, with the order of cells as far as it is known."""
        reducer = PatchSlimming(order=ordered(self.features.grid, list(found.cells)))
        reducer.to(next(self.student.parameters()).device)
        return SlimModel(self.student, self.dense.adapter, reducer, Constant(0), "full").eval()

    def step(self, found: Found, index: int, tokens: Tokens) -> Step:
        """What a block does to these tokens, by what is known."""
        rows, prefix = tokens.x.shape[1], self.features.prefix
        if index == self.depth - 1 and not self.outputs:
            return Step(index, rows, rows, self.reads)
        return Step(index, rows, prefix + found.kept()[index])

    def _asking(self, model: SlimModel, step: Step, tokens: Tokens) -> Tokens:
        """The rows that ask in a block."""
        if step.read is not None:
            return tokens.leading(step.read)
        if step.left == step.entering:
            return tokens
        return self.reduction(model, step.left - tokens.prefix, tokens).apply(tokens)

    def reduction(self, model: SlimModel, count: int, tokens: Tokens) -> Fixed:
        """The first rows of the order, where they are not in it yet."""
        cells = None if tokens.position is not None else model.reducer.get_buffer("cells")
        return Fixed(count, cells)

    def _map(self, model: SlimModel, index: int, queries: Tokens, keys: Tokens) -> Tensor:
        """The attention map of a block."""
        adapter, host = model.adapter, model.host
        (q,) = adapter.project(host, index, queries, "q")
        k, _ = adapter.project(host, index, keys, "kv")
        return attention_map(q, k, scale=adapter.scale(host, index))


class _Trial:
    """One block on trial: its candidates' errors, and its tuning."""

    def __init__(self, walk: Walk, found: Found, block: int, above: int) -> None:
        self.walk, self.block, self.found = walk, block, found
        self.model = walk.model(found)
        self.entering = walk.features.before(block)
        prefix = walk.features.prefix
        self.rows = prefix + walk.patches
        asked = slice(0, walk.reads) if walk.before_the_head(block) else None
        kept = Fixed(above, self.model.reducer.get_buffer("cells"))
        # Where the next block keeps all rows it leaves them in place, in the order of the grid.
        whole = asked or (slice(None) if above == walk.patches else None)
        self.taught = [
            tokens.x[:, whole] if whole else kept.move(tokens.x, prefix=prefix)
            for tokens in walk.features.before(block + 2)
        ]
        count = sum(each.numel() for each in self.taught)
        self.scale = sum(float(each.double().square().sum()) for each in self.taught) / count
        self.errors: dict[int, float] = {}
        self._left: list[Tokens] | None = walk.features.before(block + 1)

    @torch.no_grad()
    def error(self, count: int) -> float:
        """The mean squared error of the next block's features with `count` patch rows."""
        if count not in self.errors:
            if self._left is None:
                step = Step(self.block, self.rows, self.rows)
                self._left = [self.model.run(step, tokens) for tokens in self.entering]
            total, numbers = 0.0, 0
            for tokens, taught in zip(self._left, self.taught, strict=True):
                off = self._next(count, tokens) - taught
                total, numbers = total + float(off.double().square().sum()), numbers + off.numel()
            self.errors[count] = total / numbers
        return self.errors[count]

    def tune(self, count: int) -> None:
        """Fits the block, with `count` rows given out, to the dense features after the next one."""
        search = self.walk.search
        block = self.walk.dense.adapter.blocks(self.walk.student)[self.block]
        parameters = list(block.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=search.lr, weight_decay=0.0)
        noise = torch.Generator().manual_seed(search.seed * 1_000 + self.block)
        prefix = self.walk.features.prefix
        with _learning(self.walk.student, parameters):
            for _ in range(search.epochs):
                for number in torch.randperm(len(self.entering), generator=noise).tolist():
                    step = Step(self.block, self.rows, prefix + count)
                    tokens = self.model.run(step, self.entering[number])
                    off = self._next(count, tokens) - self.taught[number]
                    loss = off.square().mean()
                    if not bool(loss.isfinite()):
                        raise Diverged(
                            f"Tuning block {self.block} with {count} patches: the error is no "
                            f"number. Give a smaller rate than lr={search.lr:g}, or the host in "
                            "float32."
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
        self.errors, self._left = {}, None

    def _next(self, count: int, tokens: Tokens) -> Tensor:
        """The features that the next block gives out, of `count` rows of these tokens."""
        if tokens.patches > count:
            tokens = self.walk.reduction(self.model, count, tokens).apply(tokens)
        step = self.walk.step(self.found, self.block + 1, tokens)
        return self.model.run(step, tokens).x


@contextlib.contextmanager
def _learning(host: nn.Module, parameters: Sequence[nn.Parameter]) -> Any:
    """While it lasts, these parameters of the host take gradients, and no others do."""
    before = [(each, each.requires_grad) for each in host.parameters()]
    chosen = set(parameters)
    for each, _ in before:
        each.requires_grad_(each in chosen)
    try:
        yield
    finally:
        for each, wanted in before:
            each.requires_grad_(wanted)
            each.grad = None
