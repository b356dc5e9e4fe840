"""Searches one layer after another for the rows to keep: Patch Slimming, Algorithm 1.

The search goes from the last layer down. Each layer has to output the rows of the layer above it.
The most important other rows are added until the next layer's features are those of the dense model
within a tolerance. It runs the loop of `SlimModel`, block by block, on tokens in memory. It knows
neither files nor budgets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

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
from patchslim.runs.progress import Progress
from patchslim.schedules.schedule import Constant
from patchslim.tokens.attention import attention_map
from patchslim.tokens.reduction import Fixed
from patchslim.tokens.tokens import Tokens

MAX_FEATURE_BYTES = 2**31  # larger sets of dense features are computed again for each layer
CURVE_POINTS = 4  # further counts at which a layer's error is measured, for the figure


class Features:
    """Tokens of the dense model before each block, for all images, in batches.

    They stay in memory if they are small enough (`MAX_FEATURE_BYTES`).
    """

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
        """Returns the tokens that enter a block; for `block=depth`, those after the last block."""
        if block not in self._known:
            self._known = self._compute(block)
        return self._known[block]

    @torch.no_grad()
    def _compute(self, block: int) -> dict[int, list[Tokens]]:
        """Computes all tokens if they fit, else those before a block and after the next two."""
        first, last = (0, self.depth) if self._keeps_all else (block, min(block + 2, self.depth))
        tokens = self._known[0]
        known = {0: tokens}
        rows = self.prefix + self.patches
        for index in range(last):
            step = BlockStep(index, rows, rows)
            tokens = [self.dense.start_pass().run_block(step, each) for each in tokens]
            if index + 1 >= first:
                known[index + 1] = tokens
        return known


class LayerSearch:
    """Search from the last block down, on one set of images.

    Args:
        dense: the dense model, as a SlimModel that removes nothing.
        student: the host whose blocks are tuned. The dense host itself if nothing is tuned.
        images: batches on the host's device.
        config: how to search.
        outputs: patch rows that the last block outputs; 0 if the head reads only the prefix.
    """

    def __init__(
        self,
        dense: SlimModel,
        student: nn.Module,
        images: Sequence[Tensor],
        config: PatchSlimmingConfig,
        outputs: int,
    ) -> None:
        self.dense, self.student, self.config, self.outputs = dense, student, config, outputs
        self.features = Features(dense, images)
        self.depth, self.patches = self.features.depth, self.features.patches
        self.coverage = cell_worth(covering_order(self.features.grid)).double()
        self.rows_read = None if outputs else dense.plan.shape.read

    def begin(self) -> PatchSlimmingResult:
        """Returns the result before the first layer: the patch rows that the head reads."""
        nothing = PatchSlimmingResult(tuple(range(self.patches)))
        if not self.outputs:
            return nothing
        cells = self._rank_cells(nothing, self.depth - 1, 0)
        return PatchSlimmingResult(cells, (LayerResult(self.depth - 1, self.outputs, 0.0, 1.0),))

    def blocks(self, result: PatchSlimmingResult) -> range:
        """Returns the blocks that are still to be searched, the next one first."""
        return range(self.depth - 2 - len(result.layers) + bool(self.outputs), -1, -1)

    def search_layer(
        self,
        result: PatchSlimmingResult,
        block: int,
        *,
        tolerance: float,
        kept: int | None,
        progress: Progress,
    ) -> PatchSlimmingResult:
        """Searches one more block, and tunes it if the mode says so.

        Args:
            result: the blocks above.
            block: the number of the block.
            tolerance: the largest error of the next block's features.
            kept: the patch rows that the block has to output, if that is known already.
            progress: is called with one line of text for each candidate.

        Returns:
            The result with this block added.

        Raises:
            ImpossibleBudget: the error is above the tolerance even with all patches.
        """
        above = result.kept().get(block + 1, self.outputs)
        cells = self._rank_cells(result, block, above)
        trial = _BlockTrial(self, replace(result, cells=cells), block, above)
        least = max(above, 1)
        if kept is None:
            tolerance *= trial.scale if self.config.error == "relative" else 1.0
            tolerance *= self.config.slack if self.is_before_head(block) else 1.0
            choose = self._step_rows if self.config.mode == "paper" else self._bisect_rows
            kept = choose(trial, least, tolerance, progress)
        else:
            between = torch.linspace(least, self.patches, CURVE_POINTS + 2).round().int().tolist()
            for count in {*between, kept}:
                trial.error(count)
        curve = tuple(sorted(trial.errors.items()))
        if self.config.mode == "fast":
            trial.tune(kept)
        error = trial.error(kept)
        progress(f"block {block}: {kept} of {self.patches} patches, error {error:.3g}")
        layer = LayerResult(block, kept, error, trial.scale, curve)
        return PatchSlimmingResult(cells, (*result.layers, layer))

    def is_before_head(self, block: int) -> bool:
        """Tells whether the block after this one is the last, and outputs no patches."""
        return block + 2 == self.depth and not self.outputs

    def _bisect_rows(
        self, trial: _BlockTrial, least: int, tolerance: float, progress: Progress
    ) -> int:
        """Finds the fewest rows within the tolerance by bisection: more rows, smaller error."""
        step = self.config.step
        low, high = -1, -(-(self.patches - least) // step)
        self._check_reachable(trial, trial.error(self.patches), tolerance)
        while high - low > 1:
            middle = (low + high) // 2
            count = min(least + middle * step, self.patches)
            error = trial.error(count)
            progress(f"block {trial.block}: {count} patches give an error of {error:.3g}")
            low, high = (low, middle) if error <= tolerance else (middle, high)
        return min(least + high * step, self.patches)

    def _step_rows(
        self, trial: _BlockTrial, least: int, tolerance: float, progress: Progress
    ) -> int:
        """Tunes candidates with more and more rows until one is within the tolerance."""
        count = least
        while True:
            trial.tune(count)
            error = trial.error(count)
            progress(f"block {trial.block}: {count} patches, tuned, give an error of {error:.3g}")
            if error <= tolerance:
                return count
            if count == self.patches:
                self._check_reachable(trial, error, tolerance)
            count = min(count + self.config.step, self.patches)

    def _check_reachable(self, trial: _BlockTrial, error: float, tolerance: float) -> None:
        """Refuses a tolerance that not even all patches meet."""
        if not error <= tolerance:
            raise ImpossibleBudget(
                f"tolerance: block {trial.block} has an error of {error:.3g} even with all its "
                f"{self.patches} patches, since later blocks were tuned, or by rounding; with this "
                f"tolerance it may be {tolerance:.3g}. Give a larger one, or a budget (macs=)."
            )

    @torch.no_grad()
    def scores(self, result: PatchSlimmingResult, block: int) -> list[Tensor]:
        """Returns the exact score of every patch of every image, in batches (B, n)."""
        model = self.model(result)
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
                step = self.step(result, index, tokens)
                later.append(
                    self._attention_map(
                        model, index, self._query_tokens(model, step, tokens), tokens
                    )
                )
                tokens = model.start_pass().run_block(step, tokens)
            scores.append(importance_scores(weights, before.x, later)[:, prefix:])
        return scores

    def _rank_cells(self, result: PatchSlimmingResult, block: int, above: int) -> tuple[int, ...]:
        """Ranks all cells: first those that the next block outputs, then the best of the others.

        Neighbouring patches hold much the same information, which the score does not know. So
        even coverage of the image counts as well.
        """
        scores = torch.cat(self.scores(result, block)).double().mean(dim=0).cpu()
        scores = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
        scores += self.config.cover * self.coverage
        first = result.cells[:above]
        scores[list(first)] = torch.inf
        best = scores.argsort(descending=True, stable=True).tolist()
        return (*first, *best[above:])

    def model(self, result: PatchSlimmingResult) -> SlimModel:
        """Returns the student with the order of cells as far as it is known."""
        method = PatchSlimming(order=format_order(self.features.grid, list(result.cells)))
        method.to(next(self.student.parameters()).device)
        adapter = self.dense.plan.adapter
        plan = plan_schedule(self.student, adapter, method, Constant(0), "full")
        return SlimModel(self.student, plan).eval()

    def step(self, result: PatchSlimmingResult, index: int, tokens: Tokens) -> BlockStep:
        """Returns what a block does to these tokens, given the blocks that were searched."""
        rows, prefix = tokens.x.shape[1], self.features.prefix
        if index == self.depth - 1 and not self.outputs:
            return BlockStep(index, rows, rows, self.rows_read)
        left = prefix + result.kept()[index]
        return BlockStep(index, rows, left, place=PatchSlimming.place if left < rows else None)

    def _query_tokens(self, model: SlimModel, step: BlockStep, tokens: Tokens) -> Tokens:
        """Returns the rows whose queries a block computes."""
        if step.read is not None:
            return tokens.leading_rows(step.read)
        if step.left == step.entering:
            return tokens
        return self.reduction(model, step.left - tokens.prefix, tokens).apply(tokens)

    def reduction(self, model: SlimModel, count: int, tokens: Tokens) -> Fixed:
        """Returns the reduction to the first rows of the order."""
        # Tokens that know their positions are in that order already.
        cells = None if tokens.position is not None else model.method.get_buffer("cells")
        return Fixed(count, cells)

    def _attention_map(self, model: SlimModel, index: int, queries: Tokens, keys: Tokens) -> Tensor:
        """Computes the attention map of a block."""
        adapter, host = model.plan.adapter, model.host
        scale = adapter.describe(host).scales[index]
        (q,) = adapter.project(host, index, queries, "q")
        k, _ = adapter.project(host, index, keys, "kv")
        return attention_map(q, k, scale=scale)


class _BlockTrial:
    """One block while it is searched: measures the errors of candidates, and tunes the block."""

    def __init__(
        self, search: LayerSearch, result: PatchSlimmingResult, block: int, above: int
    ) -> None:
        self.search, self.block, self.result = search, block, result
        self.model = search.model(result)
        self.entering = search.features.tokens_before(block)
        prefix = search.features.prefix
        self.rows = prefix + search.patches
        read = slice(0, search.rows_read) if search.is_before_head(block) else None
        kept = Fixed(above, self.model.method.get_buffer("cells"))
        # A block that keeps all rows leaves them in the order of the grid.
        rows = read or (slice(None) if above == search.patches else None)
        self.targets = [
            tokens.x[:, rows] if rows else kept.move(tokens.x, prefix=prefix)
            for tokens in search.features.tokens_before(block + 2)
        ]
        count = sum(each.numel() for each in self.targets)
        self.scale = sum(float(each.double().square().sum()) for each in self.targets) / count
        self.errors: dict[int, float] = {}
        self._block_outputs: list[Tokens] | None = search.features.tokens_before(block + 1)

    @torch.no_grad()
    def error(self, count: int) -> float:
        """Measures the mean squared error of the next block's features with `count` patch rows."""
        if count not in self.errors:
            if self._block_outputs is None:
                step = BlockStep(self.block, self.rows, self.rows)
                self._block_outputs = [
                    self.model.start_pass().run_block(step, tokens) for tokens in self.entering
                ]
            total, numbers = 0.0, 0
            for tokens, target in zip(self._block_outputs, self.targets, strict=True):
                error = self._next_features(count, tokens) - target
                total += float(error.double().square().sum())
                numbers += error.numel()
            self.errors[count] = total / numbers
        return self.errors[count]

    def tune(self, count: int) -> None:
        """Tunes the block with `count` rows, towards the dense features after the next block."""
        config, student = self.search.config, self.search.student
        block = self.search.dense.plan.adapter.blocks(student)[self.block]
        parameters = list(block.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
        noise = torch.Generator().manual_seed(config.seed * 1_000 + self.block)
        prefix = self.search.features.prefix
        with _train_only(student, parameters):
            for _ in range(config.epochs):
                for number in torch.randperm(len(self.entering), generator=noise).tolist():
                    left = prefix + count
                    place = PatchSlimming.place if left < self.rows else None
                    step = BlockStep(self.block, self.rows, left, place=place)
                    tokens = self.model.start_pass().run_block(step, self.entering[number])
                    error = self._next_features(count, tokens) - self.targets[number]
                    loss = error.square().mean()
                    if not bool(loss.isfinite()):
                        raise Diverged(
                            f"Tuning block {self.block} with {count} patches: the error is no "
                            f"number. Give a smaller rate than lr={config.lr:g}, or the host in "
                            "float32."
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
        self.errors, self._block_outputs = {}, None

    def _next_features(self, count: int, tokens: Tokens) -> Tensor:
        """Computes the features that the next block outputs for `count` rows of these tokens."""
        if tokens.patches > count:
            tokens = self.search.reduction(self.model, count, tokens).apply(tokens)
        step = self.search.step(self.result, self.block + 1, tokens)
        return self.model.start_pass().run_block(step, tokens).x


@contextlib.contextmanager
def _train_only(host: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block, only these parameters of the host take gradients."""
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
