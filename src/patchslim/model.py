"""`SlimModel`: adapter, reducer and schedule around the untouched host.

The loop over the blocks is written here, once. The host's modules stay as they are and are called,
never copied or hooked. A forward pass keeps all it knows in values that it passes on, so that
threads may share one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchslim.adapter import Adapter
from patchslim.attention import attention, attention_bias, attention_map
from patchslim.cost import Cost, HostShape, dense_macs, skips, slim_macs
from patchslim.errors import WrongInput
from patchslim.ragged import each_image, packed, padded, ragged_attention
from patchslim.reducer import Decision, Place, Reducer, Signals
from patchslim.reduction import Reduction
from patchslim.schedule import Schedule, Tail
from patchslim.step import Attended, Lesson, Step
from patchslim.surface import Surface
from patchslim.tokens import Borders, Tokens, take, with_leading


class SlimModel(Surface):
    """The host with fewer tokens: the same call, the same kind of output.

    Made by `patchslim.slim`. `host` is the model that was given, unchanged; dropping the SlimModel
    leaves nothing behind. `trained` says how the weights were trained for it, and `calibrated` how
    its method was fitted to images; None where they were not. `packs` may be switched off, to run
    images of different numbers of patches padded and masked, as an exported graph does.
    """

    def __init__(
        self, host: nn.Module, adapter: Adapter, reducer: Reducer, schedule: Schedule, tail: Tail
    ) -> None:
        super().__init__()
        self.host = host
        self.adapter = adapter
        self.reducer = reducer
        self.schedule = schedule
        self.tail: Tail = tail
        self.trained: dict[str, Any] | None = None
        self.calibrated: dict[str, Any] | None = None
        self.packs = True
        shape = adapter.shape(host)
        reducer.prepare(shape.blocks[0].width, self.deciding())
        reducer.train(host.training)
        self.training = host.training

    def forward(self, images: Tensor | None = None, **options: Any) -> Any:
        """What the host returns for `images`; keyword arguments are the host's own."""
        if images is None:
            images = options.pop("pixel_values", None)
        return self._forward(images, self.adapter.options(self.host, options), None)

    def _forward(
        self, images: Tensor | None, options: Mapping[str, Any], left: list[list[int]] | None
    ) -> Any:
        """What the host returns; `left`, where given, is told the rows of each image."""
        tokens = self.embed(images, options, track=self.adapter.returns_rows(self.host))
        for step in self.steps(tokens, tail=self.tail):
            tokens = self._remembered(step, tokens)
            if left is not None:
                left.append(tokens.lengths())
        return self.adapter.head(self.host, padded(tokens), options)

    def learn(
        self, images: Tensor, *, tail: Tail, eased: float = 1.0, recompute: bool = False
    ) -> Lesson:
        """A forward pass for training: the answer, and what the losses look at.

        Args:
            images: as in a call.
            tail: "full" where a loss looks at the patch rows, else the model's own.
            eased: the share in (0, 1] of what the schedule removes that is removed now.
            recompute: whether activations are computed again in the backward pass, not kept.
        """
        tokens = self.embed(images, {}, track=self.adapter.returns_rows(self.host))
        entered = tokens.patches
        decisions: list[Decision] = []
        last = self.steps(tokens, tail=tail, eased=eased)[-1]  # if it decides, a loss looks at it
        for step in self.steps(tokens, tail="full" if self._place(last) else tail, eased=eased):
            tokens = self._remembered(step, tokens, recompute=recompute)
            if self._place(step) is not None:
                share = (step.left - tokens.prefix) / entered
                decisions.append(Decision(step.index, share, tokens.alive))
        output = self.adapter.head(self.host, tokens, {})
        normed = tokens.with_x(self.adapter.norm(self.host, tokens.x))
        return Lesson(output, normed, tuple(decisions))

    def steps(self, tokens: Tokens, *, tail: Tail, eased: float = 1.0) -> list[Step]:
        """What will happen in each block to `tokens` that enter the first."""
        depth = len(self.adapter.blocks(self.host))
        rows = tokens.x.shape[1]
        schedule = self.schedule if eased == 1 else self.schedule.eased(eased)
        counts = schedule.counts(rows, tokens.prefix, depth, self.reducer)
        entering = (rows, *counts[:-1])
        reads = self.adapter.reads(self.host) if tail == "exact" else None
        named = self.named(depth)
        last = [None] * (depth - 1) + [reads]
        return [
            Step(index, entering[index], left, last[index], index in named)
            for index, left in enumerate(counts)
        ]

    def trace(self, images: Tensor, blocks: int | None = None) -> list[Tokens]:
        """The tokens after each of the first `blocks` blocks, with the map from cells to rows."""
        tokens = self.embed(images, {}, track=True)
        every: list[Tokens] = []
        for step in self.steps(tokens, tail="full")[:blocks]:
            tokens = self.run(step, tokens)
            every.append(tokens)
        return every

    def shape(self, image_size: tuple[int, int] | None = None) -> HostShape:
        """Rows and costs of the host."""
        return self.adapter.shape(self.host, image_size)

    def counts(self, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Rows left after each block, prefix included."""
        shape = self.shape(image_size)
        return self.schedule.counts(shape.entering, shape.prefix, shape.depth, self.reducer)

    def deciding(self) -> tuple[int, ...]:
        """The blocks in which the method decides, for images of the host's own size."""
        shape, counts = self.shape(), self.counts()
        entering = (shape.entering, *counts[:-1])
        reads = [None] * (shape.depth - 1) + [shape.read if self.tail == "exact" else None]
        named = [block in self.named(shape.depth) for block in range(shape.depth)]
        steps = map(Step, range(shape.depth), entering, counts, reads, named)
        return tuple(step.index for step in steps if self._place(step) is not None)

    def named(self, depth: int) -> tuple[int, ...]:
        """The blocks in which the method decides even where the schedule would leave all rows."""
        return self.schedule.places(depth) if self.reducer.adaptive else ()

    def macs(self, image_size: tuple[int, int] | None = None) -> Cost:
        """Multiply-adds of one image through this model; of an adaptive method, the most."""
        return self._macs(self.shape(image_size), self.counts(image_size))

    def macs_of(self, images: Tensor) -> list[Cost]:
        """Multiply-adds of each of these images: what an adaptive method really spends on them."""
        return self.answer(images)[1]

    def answer(self, images: Tensor) -> tuple[Any, list[Cost]]:
        """What a call returns, and what each image costs."""
        left: list[list[int]] = []
        output = self._forward(images, {}, left)
        shape = self.shape((images.shape[2], images.shape[3]))
        return output, [self._macs(shape, counts) for counts in zip(*left, strict=True)]

    def counted(self, images: Tensor) -> list[tuple[int, ...]]:
        """The rows of each image after each block, prefix included."""
        left: list[list[int]] = []
        self._forward(images, {}, left)
        return list(zip(*left, strict=True))

    def _macs(self, shape: HostShape, counts: Sequence[int]) -> Cost:
        exact, named = self.tail == "exact", self.named(shape.depth)
        return slim_macs(shape, self.reducer, counts, tail=exact, named=named)

    def dense_macs(self, image_size: tuple[int, int] | None = None) -> Cost:
        """Multiply-adds of one image through the untouched host."""
        return dense_macs(self.shape(image_size))

    def save(self, path: str | Path) -> None:
        """Writes weights and recipe to the folder `path`: all of it, or nothing."""
        from patchslim.io import save

        save(self, path)

    def save_pretrained(self, path: str | Path) -> None:
        """The same as `save`, by Hugging Face's name."""
        self.save(path)

    @staticmethod
    def from_pretrained(name: str | Path, model: nn.Module | None = None) -> SlimModel:
        """The model saved in a folder or in a Hugging Face Hub repository."""
        from patchslim.hub import from_pretrained

        return from_pretrained(name, model)

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Uploads weights and recipe to a Hub repository and returns its address."""
        from patchslim.hub import push_to_hub

        return push_to_hub(self, repository, private=private)

    def unslim(self) -> nn.Module:
        """The host as it was given."""
        return self.host

    def extra_repr(self) -> str:
        """Schedule and costs, as shown by print()."""
        share = self.macs().total / self.dense_macs().total
        return f"{self.schedule}, tail={self.tail!r}, {self.macs()} ({share:.0%} of the host)"

    def embed(self, images: Tensor | None, options: Mapping[str, Any], *, track: bool) -> Tokens:
        """The tokens that enter the first block, or one clear error about the images."""
        channels, height, width = self.adapter.image_shape(self.host)
        made_for = f"this host takes float images of shape (batch, {channels}, {height}, {width})"
        if not isinstance(images, Tensor):
            raise WrongInput(f"Got {type(images).__name__} instead of images: {made_for}.")
        got = f"Got images of shape {tuple(images.shape)} and type {images.dtype}"
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise WrongInput(f"{got}: {made_for}.")
        reason = self.adapter.misfit(self.host, (images.shape[2], images.shape[3]), options)
        if reason is not None:
            raise WrongInput(f"{got}: {reason}")
        placed = self.calibrated is not None and "threshold" not in self.calibrated
        if placed and tuple(images.shape[2:]) != (height, width):
            raise WrongInput(
                f"{got}: this model was calibrated for {height}x{width} pixels, and its positions "
                "are of these. Resize the images, or calibrate the model at their size."
            )
        tokens = self.adapter.embed(self.host, images, options)
        if self.reducer.shows is not None:
            shown = partial(self.adapter.content, self.host, images, self.reducer.shows)
            tokens = tokens.showing(shown)
        return tokens.tracked() if track else tokens

    def _remembered(self, step: Step, tokens: Tokens, *, recompute: bool = False) -> Tokens:
        """The tokens after one block, recomputed in the backward pass where that is asked for."""
        recompute = recompute or self.adapter.checkpoints(self.host)
        if recompute and self.training and torch.is_grad_enabled():
            after: Tokens = checkpoint(self.run, step, tokens, use_reentrant=False)
            return after
        return self.run(step, tokens)

    def run(self, step: Step, tokens: Tokens) -> Tokens:
        """The tokens after one block."""
        place = self._place(step)
        if place is Place.BEFORE_BLOCK:
            tokens = padded(tokens)
            signals = Signals(tokens.prefix, block=step.index)
            tokens = self._packed(tokens.reduce(self._choose(step, tokens, signals)))
        tokens = self._before_feed(step, place, tokens)
        return tokens.with_x(self.adapter.feed(self.host, step.index, tokens.x))

    def _before_feed(self, step: Step, place: Place | None, tokens: Tokens) -> Tokens:
        """The tokens between attention and feed-forward.

        Queries, keys and values end with this call: kept any longer, they would raise the peak
        memory of the feed-forward above that of the dense block.
        """
        attended = self._attend(step, place, tokens)
        tokens, signals = attended.queries, attended.signals
        tokens = tokens.with_x(self.adapter.mix(self.host, step.index, tokens, attended.values))
        del attended  # its values are not needed to choose
        if place is Place.BEFORE_FEED and signals is not None:
            tokens = padded(tokens)
            tokens = self._packed(tokens.reduce(self._choose(step, tokens, signals)))
        return tokens

    def _packed(self, tokens: Tokens) -> Tokens:
        """Rows packed behind one another, where images have different numbers and nothing forbids.

        Not in a graph, whose shapes are constant; not in training; and not where the map back to
        the pixels is asked for, which counts the rows of an image.
        """
        graph = torch.compiler.is_compiling()
        if graph or self.training or not self.packs or tokens.origin is not None:
            return tokens
        return packed(tokens) if self.reducer.adaptive else tokens

    def _place(self, step: Step) -> Place | None:
        """Where this block decides, or None where it does not.

        The schedule says so, not the rows at hand: a method that masks leaves them all in place.
        """
        if skips(self.reducer, step.read) or (step.left >= step.entering and not step.named):
            return None
        return self.reducer.place

    def _choose(self, step: Step, tokens: Tokens, signals: Signals) -> Reduction:
        """The method's decision about `tokens`."""
        return self.reducer.choose(tokens, signals, step.left - tokens.prefix)

    def _attend(self, step: Step, place: Place | None, tokens: Tokens) -> Attended:
        """Attention in one block, for the rows that are to come out of it."""
        if place is Place.ON_QUERIES:
            return self._attend_by_some(step, tokens)
        if place is Place.ON_MAP:
            return self._attend_by_map(step, tokens)
        project = partial(self.adapter.project, self.host, step.index)
        bias = attention_bias(tokens, proportional=self.reducer.proportional)
        if step.read is None:
            queries = tokens
            q, k, v = project(tokens, "qkv")
        else:
            queries = tokens.leading(step.read)
            (q,), (k, v) = project(queries, "q"), project(tokens, "kv")
            bias = bias if bias is None else bias[:, :, : step.read]
        signals = None if place is None else self._signals(step, tokens, q, k, v, bias)
        return Attended(queries, self._values(step, queries, tokens, (q, k, v), bias), signals)

    def _attend_by_some(self, step: Step, tokens: Tokens) -> Attended:
        """P2: all rows are keys and values, only the surviving ones ask."""
        project = partial(self.adapter.project, self.host, step.index)
        bias = attention_bias(tokens, proportional=self.reducer.proportional)
        k, v = project(tokens, "kv")
        side = padded(tokens)
        asking = self.reducer.needs_class_token and side.prefix > 0
        q = project(side.leading(side.prefix), "q")[0] if asking else None
        signals = self._signals(step, tokens, q, k, v, bias)
        reduction = self._choose(step, side, signals)
        queries = self._packed(side.reduce(reduction))
        if bias is not None and bias.shape[2] > 1:
            rows = with_leading(reduction.represent(tokens.rows()), tokens.prefix)
            bias = take(bias[:, 0], rows).unsqueeze(1)
        (q,) = project(queries, "q")
        return Attended(queries, self._values(step, queries, tokens, (q, k, v), bias), signals)

    def _attend_by_map(self, step: Step, tokens: Tokens) -> Attended:
        """P3: the query-key map decides and is folded; values come from the rows that are left."""
        tokens = padded(tokens)
        project = partial(self.adapter.project, self.host, step.index)
        bias = attention_bias(tokens, proportional=self.reducer.proportional)
        q, k = project(tokens, "qk")
        signals = self._signals(step, tokens, q, k, None, bias)
        reduction = self._choose(step, tokens, signals)
        weights = attention_map(q, k, scale=signals.scale, bias=bias)
        queries = tokens.reduce(reduction)
        (v,) = project(queries, "v")
        weights = reduction.fold(weights, tokens.prefix)
        if step.read is not None:
            queries, weights = queries.leading(step.read), weights[:, :, : step.read]
        return Attended(queries, weights @ v, signals)

    def _signals(
        self,
        step: Step,
        tokens: Tokens,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        bias: Tensor | None,
    ) -> Signals:
        """What the reducer may look at in this block, of images side by side."""
        if tokens.borders is not None:
            q, k, v = self._looked_at(tokens.borders, q, k, v)
            tokens = padded(tokens)
            bias = attention_bias(tokens, proportional=self.reducer.proportional)
        readout = None
        if self.reducer.needs_class_token and not self.adapter.has_class_token(self.host):
            readout = partial(self.adapter.readout, self.host, tokens)
        scale = self.adapter.scale(self.host, step.index)
        return Signals(tokens.prefix, scale, q, k, v, bias, readout, step.index)

    def _looked_at(
        self, borders: Borders, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Of packed q, k, v what the method looks at, side by side; of q the prefix at least."""
        looks = self.reducer.looks
        if q is not None and q.shape[0] == 1 and "q" not in looks:
            batch = len(borders.counts)
            leading = q[0, :, : borders.prefix * batch]
            q = leading.unflatten(1, (borders.prefix, batch)).permute(2, 0, 1, 3)
        return (
            each_image(q, borders),
            each_image(k, borders) if "k" in looks else None,
            each_image(v, borders) if "v" in looks else None,
        )

    def _values(
        self,
        step: Step,
        queries: Tokens,
        keys: Tokens,
        qkv: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """What attention gives to the queries."""
        scale = self.adapter.scale(self.host, step.index)
        if queries.borders is not None or keys.borders is not None:
            proportional = self.reducer.proportional
            return ragged_attention(
                qkv, queries=queries, keys=keys, scale=scale, proportional=proportional
            )
        dropout = self.adapter.dropout(self.host, step.index)
        return attention(*qkv, scale=scale, bias=bias, dropout=dropout)
