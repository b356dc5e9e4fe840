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

from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.patch_slimming.importance import importance_scores
from patchslim.calibration.patch_slimming.result import LayerResult, PatchSlimmingResult
from patchslim.errors import Diverged, ImpossibleBudget
from patchslim.methods._ranking import cell_worth, covering_order, format_order
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.model.step import BlockStep
from patchslim.schedules.schedule import Constant
from patchslim.tokens.attention import attention_map
from patchslim.tokens.reduction import Fixed
from patchslim.tokens.tokens import Tokens

MAX_FEATURE_BYTES = (
    2**31
)  # bytes of the dense model's features that are kept rather than computed again
CURVE_POINTS = 4  # further counts at which a layer's error is taken, for the figure

Progress = Callable[[str], object]


class Features:
    """The dense model's tokens before each block, for all images, batch by batch."""

    def __init__(self, dense: SlimModel, images: Sequence[Tensor]) -> None:
        self.dense = dense
        self.depth = dense.plan.shape.depth
        with torch.no_grad():
            forward = dense.start_pass()
            self._known = {0: [forward.embed(batch, {}, track=False) for batch in images]}
        first = self._known[0]
        size = sum(each.x.numel() * each.x.element_size() for each in first)
        self._keeps_all = size * (self.depth + 1) <= MAX_FEATURE_BYTES
        self.prefix, self.patches, self.grid = first[0].prefix, first[0].patches, first[0].grid

    def tokens_before(self, block: int) -> list[Tokens]:
        """The tokens that enter a block; after the last one for block = depth."""
        if block not in self._known:
            self._known = self._compute(block)
        return self._known[block]

    @torch.no_grad()
    def _compute(self, block: int) -> dict[int, list[Tokens]]:
        """All tokens where they fit, else those before a block, after it, and after the next."""
        first, last = (0, self.depth) if self._keeps_all else (block, min(block + 2, self.depth))
        tokens = self._known[0]
        known = {0: tokens}
        rows = self.prefix + self.patches
        for index in range(last):
            tokens = [
                self.dense.start_pass().run_block(BlockStep(index, rows, rows), each)
                for each in tokens
            ]
            if index + 1 >= first:
                known[index + 1] = tokens
        return known


class LayerSearch:
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
        search: PatchSlimmingConfig,
        outputs: int,
    ) -> None:
        self.dense, self.student, self.search, self.outputs = dense, student, search, outputs
        self.features = Features(dense, images)
        self.depth, self.patches = self.features.depth, self.features.patches
        self.coverage = cell_worth(covering_order(self.features.grid)).double()
        self.rows_read = None if outputs else dense.plan.shape.read

    def begin(self) -> PatchSlimmingResult:
        """Before the first layer: what the head reads."""
        if not self.outputs:
            return PatchSlimmingResult(tuple(range(self.patches)))
        found = PatchSlimmingResult(tuple(range(self.patches)))
        cells = self._rank_cells(found, self.depth - 1, 0)
        return PatchSlimmingResult(cells, (LayerResult(self.depth - 1, self.outputs, 0.0, 1.0),))

    def blocks(self, found: PatchSlimmingResult) -> range:
        """The blocks that are still to be searched."""
        return range(self.depth - 2 - len(found.layers) + bool(self.outputs), -1, -1)

    def search_layer(
        self,
        found: PatchSlimmingResult,
        block: int,
        *,
        tolerance: float,
        kept: int | None,
        say: Progress,
    ) -> PatchSlimmingResult:
        """The pyramid with one more layer.

        Args:
            found: the layers above.
            block: the block.
            tolerance: the largest error of the next block's features.
            kept: patch rows that it has to give out, where that is known already.
            say: is called with a line of text for each candidate.
        """
        above = found.kept().get(block + 1, self.outputs)
        cells = self._rank_cells(found, block, above)
        trial = _BlockTrial(self, replace(found, cells=cells), block, above)
        least = max(above, 1)
        if kept is None:
            tolerance *= trial.scale if self.search.error == "relative" else 1.0
            tolerance *= self.search.slack if self.is_before_head(block) else 1.0
            choose = self._step_rows if self.search.mode == "paper" else self._bisect_rows
            kept = choose(trial, least, tolerance, say)
        else:
            between = torch.linspace(least, self.patches, CURVE_POINTS + 2).round().int().tolist()
            for count in {*between, kept}:
                trial.error(count)
        curve = tuple(sorted(trial.errors.items()))
        if self.search.mode == "fast":
            trial.tune(kept)
        error = trial.error(kept)
        say(f"block {block}: {kept} of {self.patches} patches, error {error:.3g}")
        layer = LayerResult(block, kept, error, trial.scale, curve)
        return PatchSlimmingResult(cells, (*found.layers, layer))

    def is_before_head(self, block: int) -> bool:
        """Whether the block after this one gives out what the head reads and no patches."""
        return block + 2 == self.depth and not self.outputs

    def _bisect_rows(self, trial: _BlockTrial, least: int, tolerance: float, say: Progress) -> int:
        """The fewest rows within the tolerance, as the error falls with every row."""
        step = self.search.step
        low, high = -1, -(-(self.patches - least) // step)
        self._check_reachable(trial, trial.error(self.patches), tolerance)
        while high - low > 1:
            middle = (low + high) // 2
            count = min(least + middle * step, self.patches)
            error = trial.error(count)
            say(f"block {trial.block}: {count} patches give an error of {error:.3g}")
            low, high = (low, middle) if error <= tolerance else (middle, high)
        return min(least + high * step, self.patches)

    def _step_rows(self, trial: _BlockTrial, least: int, tolerance: float, say: Progress) -> int:
        """The first of the candidates, in steps, that tuning brings within the tolerance."""
        count = least
        while True:
            trial.tune(count)
            error = trial.error(count)
            say(f"block {trial.block}: {count} patches, tuned, give an error of {error:.3g}")
            if error <= tolerance:
                return count
            if count == self.patches:
                self._check_reachable(trial, error, tolerance)
            count = min(count + self.search.step, self.patches)

    def _check_reachable(self, trial: _BlockTrial, error: float, tolerance: float) -> None:
        """Refuses a tolerance that no number of patches meets."""
        if not error <= tolerance:
            raise ImpossibleBudget(
                f"tolerance: block {trial.block} has an error of {error:.3g} even with all its "
                f"{self.patches} patches, since later blocks were tuned, or by rounding; with this "
                f"tolerance it may be {tolerance:.3g}. Give a larger one, or a budget (macs=)."
            )

    @torch.no_grad()
    def scores(self, found: PatchSlimmingResult, block: int) -> list[Tensor]:
        """The exact score of every patch of every image, batch by batch (B, n)."""
        model = self.model(found)
        prefix = self.features.prefix
        scores = []
        entering, leaving = (
            self.features.tokens_before(block),
            self.features.tokens_before(block + 1),
        )
        for before, after in zip(entering, leaving, strict=True):
            weights = self._attention_map(model, block, before, before)
            tokens, later = after, []
            for index in range(block + 1, self.depth):
                step = self.step(found, index, tokens)
                later.append(
                    self._attention_map(
                        model, index, self._query_tokens(model, step, tokens), tokens
                    )
                )
                tokens = model.start_pass().run_block(step, tokens)
            scores.append(importance_scores(weights, before.x, later)[:, prefix:])
        return scores

    def _rank_cells(self, found: PatchSlimmingResult, block: int, above: int) -> tuple[int, ...]:
        """All cells: first those that the next block gives out, then the best of the others.

        The score does not know that neighbours tell the same, so that even coverage counts too.
        """
        scores = torch.cat(self.scores(found, block)).double().mean(dim=0).cpu()
        scores = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
        scores += self.search.cover * self.coverage
        first = found.cells[:above]
        scores[list(first)] = torch.inf
        best = scores.argsort(descending=True, stable=True).tolist()
        return (*first, *best[above:])

    def model(self, found: PatchSlimmingResult) -> SlimModel:
        """The student, with the order of cells as far as it is known."""
        method = PatchSlimming(order=format_order(self.features.grid, list(found.cells)))
        method.to(next(self.student.parameters()).device)
        return SlimModel(
            self.student,
            plan_schedule(self.student, self.dense.plan.adapter, method, Constant(0), "full"),
        ).eval()

    def step(self, found: PatchSlimmingResult, index: int, tokens: Tokens) -> BlockStep:
        """What a block does to these tokens, by what is known."""
        rows, prefix = tokens.x.shape[1], self.features.prefix
        if index == self.depth - 1 and not self.outputs:
            return BlockStep(index, rows, rows, self.rows_read)
        return BlockStep(index, rows, prefix + found.kept()[index])

    def _query_tokens(self, model: SlimModel, step: BlockStep, tokens: Tokens) -> Tokens:
        """The rows that ask in a block."""
        if step.read is not None:
            return tokens.leading_rows(step.read)
        if step.left == step.entering:
            return tokens
        return self.reduction(model, step.left - tokens.prefix, tokens).apply(tokens)

    def reduction(self, model: SlimModel, count: int, tokens: Tokens) -> Fixed:
        """The first rows of the order, where they are not in it yet."""
        cells = None if tokens.position is not None else model.method.get_buffer("cells")
        return Fixed(count, cells)

    def _attention_map(self, model: SlimModel, index: int, queries: Tokens, keys: Tokens) -> Tensor:
        """The attention map of a block."""
        adapter, host = model.plan.adapter, model.host
        scale = adapter.describe(host).scales[index]
        (q,) = adapter.project(host, index, queries, "q")
        k, _ = adapter.project(host, index, keys, "kv")
        return attention_map(q, k, scale=scale)


class _BlockTrial:
    """One block on trial: its candidates' errors, and its tuning."""

    def __init__(
        self, walk: LayerSearch, found: PatchSlimmingResult, block: int, above: int
    ) -> None:
        self.layer_search, self.block, self.found = walk, block, found
        self.model = walk.model(found)
        self.entering = walk.features.tokens_before(block)
        prefix = walk.features.prefix
        self.rows = prefix + walk.patches
        asked = slice(0, walk.rows_read) if walk.is_before_head(block) else None
        kept = Fixed(above, self.model.method.get_buffer("cells"))
        # Where the next block keeps all rows it leaves them in place, in the order of the grid.
        whole = asked or (slice(None) if above == walk.patches else None)
        self.targets = [
            tokens.x[:, whole] if whole else kept.move(tokens.x, prefix=prefix)
            for tokens in walk.features.tokens_before(block + 2)
        ]
        count = sum(each.numel() for each in self.targets)
        self.scale = sum(float(each.double().square().sum()) for each in self.targets) / count
        self.errors: dict[int, float] = {}
        self._block_outputs: list[Tokens] | None = walk.features.tokens_before(block + 1)

    @torch.no_grad()
    def error(self, count: int) -> float:
        """The mean squared error of the next block's features with `count` patch rows."""
        if count not in self.errors:
            if self._block_outputs is None:
                step = BlockStep(self.block, self.rows, self.rows)
                self._block_outputs = [
                    self.model.start_pass().run_block(step, tokens) for tokens in self.entering
                ]
            total, numbers = 0.0, 0
            for tokens, taught in zip(self._block_outputs, self.targets, strict=True):
                off = self._next_features(count, tokens) - taught
                total, numbers = total + float(off.double().square().sum()), numbers + off.numel()
            self.errors[count] = total / numbers
        return self.errors[count]

    def tune(self, count: int) -> None:
        """Fits the block, with `count` rows given out, to the dense features after the next one."""
        search = self.layer_search.search
        block = self.layer_search.dense.plan.adapter.blocks(self.layer_search.student)[self.block]
        parameters = list(block.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=search.lr, weight_decay=0.0)
        noise = torch.Generator().manual_seed(search.seed * 1_000 + self.block)
        prefix = self.layer_search.features.prefix
        with _train_only(self.layer_search.student, parameters):
            for _ in range(search.epochs):
                for number in torch.randperm(len(self.entering), generator=noise).tolist():
                    step = BlockStep(self.block, self.rows, prefix + count)
                    tokens = self.model.start_pass().run_block(step, self.entering[number])
                    off = self._next_features(count, tokens) - self.targets[number]
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
        self.errors, self._block_outputs = {}, None

    def _next_features(self, count: int, tokens: Tokens) -> Tensor:
        """The features that the next block gives out, of `count` rows of these tokens."""
        if tokens.patches > count:
            tokens = self.layer_search.reduction(self.model, count, tokens).apply(tokens)
        step = self.layer_search.step(self.found, self.block + 1, tokens)
        return self.model.start_pass().run_block(step, tokens).x


@contextlib.contextmanager
def _train_only(host: nn.Module, parameters: Sequence[nn.Parameter]) -> Any:
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
