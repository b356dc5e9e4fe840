"""`ForwardPass`: one pass through the blocks of a host, with a method's decisions in them.

The loop over the blocks is written here, once, and so is the place in a block where a decision
falls. All that a pass knows stands in values of its own, so that threads may share one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchslim.errors import UnsupportedModel, WrongInput
from patchslim.hosts._adapter import STATES, Adapter, HostFacts, patch_pixels
from patchslim.methods import Method, Place, Signals
from patchslim.methods._method import content_kind
from patchslim.model.images import check_images, explain_failure, show_images
from patchslim.model.plan import Plan, make_steps
from patchslim.model.step import AttentionOutput, BlockStep
from patchslim.schedules.schedule import Tail
from patchslim.tokens.attention import attention, attention_bias, attention_map
from patchslim.tokens.packing import packed_attention, pad, pad_heads, reduce_packed
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.rows import take, with_prefix
from patchslim.tokens.tokens import Borders, ContentKind, Tokens


@dataclass(frozen=True)
class ForwardPass:
    """Takes images through the blocks of a host, as a plan says.

    Attributes:
        host: the untouched model.
        adapter: takes the host apart.
        method: decides which tokens stay.
        plan: how many of them stay after each block.
        facts: what is true of the host now.
        training: whether the slimmed model is in training mode.
        packs: whether images of different numbers of tokens are packed; padded otherwise.
        fixed_size: whether images must have the size that the method was calibrated for.
    """

    host: nn.Module
    adapter: Adapter
    method: Method
    plan: Plan
    facts: HostFacts
    training: bool
    packs: bool = True
    fixed_size: bool = False

    def run(
        self, images: Any, options: Mapping[str, Any], counts: list[list[int]] | None = None
    ) -> Any:
        """Returns what the host returns for the images.

        If a list is given for `counts`, the token count of each image is appended to it after
        every block.
        """
        asks = self.adapter.asks_for_states(options)
        tokens = self.embed(images, options, track=self.facts.returns_rows or asks)
        states = [tokens.dense_features()] if asks else []
        for step in self.steps(tokens, tail="full" if asks else None):
            tokens = self.run_or_recompute(step, tokens)
            if asks:
                states.append(tokens.dense_features())
            if counts is not None:
                counts.append(tokens.lengths())
        options = {**options, STATES: states} if asks else options
        return self.adapter.head(self.host, pad(tokens.rejoin()), options)

    def count_rows(self, images: Tensor) -> list[tuple[int, ...]]:
        """Counts the tokens of each image after each block, prefix included."""
        counts: list[list[int]] = []
        self.run(images, {}, counts)
        return list(zip(*counts, strict=True))

    def steps(
        self,
        tokens: Tokens,
        *,
        tail: Tail | None = None,
        eased: float = 1.0,
        layered: bool = False,
    ) -> tuple[BlockStep, ...]:
        """Plans what happens in each block to `tokens` that enter the first.

        Args:
            tokens: the embedded images.
            tail: replaces the plan's own.
            eased: the share in (0, 1] of what the schedule removes that is removed now.
            layered: whether every block from the first decision on decides again.
        """
        plan, tail = self.plan, tail or self.plan.tail
        rows = tokens.x.shape[1]
        usual = tail == plan.tail and eased == 1.0 and not layered
        if usual and (rows, self.facts.rows_read) == (plan.steps[0].entering, plan.shape.read):
            return plan.steps
        schedule, resets, depth = plan.schedule, plan.shape.resets, plan.shape.depth
        if eased != 1:
            schedule = schedule.ease(eased)
        if layered:
            schedule = schedule.in_every_block(depth, resets)
        counts = schedule.counts(rows, tokens.prefix, depth, self.method, resets)
        return make_steps(rows, counts, self.facts, self.method, schedule, tail)

    def embed(self, images: Any, options: Mapping[str, Any], *, track: bool) -> Tokens:
        """Embeds the images to the tokens of the first block, or raises one clear error."""
        check_images(images, self.facts)
        size = (images.shape[-2], images.shape[-1])
        reason = self.adapter.size_mismatch(self.host, size, options)
        if reason is None and self.fixed_size and size != self.facts.image_size:
            height, width = self.facts.image_size
            reason = (
                f"this model was calibrated for {height}x{width} pixels, and its positions are of "
                "these. Resize the images, or calibrate the model at their size."
            )
        if reason is not None:
            raise WrongInput(f"{show_images(images)}: {reason}")
        tokens = self._embed(images, options)
        kind = content_kind(self.method)
        if kind is not None:
            tokens = tokens.with_content(self._content(kind, images, tokens))
        return tokens.with_origin() if track or self.facts.strides else tokens

    def _content(self, kind: ContentKind, images: Tensor, tokens: Tokens) -> Callable[[], Tensor]:
        """Makes the function that gives what each grid cell shows."""
        if kind == "embedding":
            return partial(self.adapter.embedding, self.host, images)
        if kind == "pixels":
            return partial(patch_pixels, images, tokens.grid)
        patches = tokens.x[:, tokens.prefix :]
        return lambda: patches

    def _embed(self, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """The host's own tokens; a clear error where type or device of the images forbid it."""
        if torch.compiler.is_compiling():
            return self.adapter.embed(self.host, images, options)
        try:
            return self.adapter.embed(self.host, images, options)
        except (RuntimeError, TypeError) as error:
            reason = explain_failure(images, self.host)
            if reason is None:
                raise
            raise reason from error

    def run_or_recompute(
        self, step: BlockStep, tokens: Tokens, *, recompute: bool = False
    ) -> Tokens:
        """Runs one block; recomputes it in the backward pass if `recompute` says so."""
        recompute = recompute or self.facts.recomputes_activations
        if recompute and self.training and torch.is_grad_enabled():
            after: Tokens = checkpoint(self.run_block, step, tokens, use_reentrant=False)
            return after
        return self.run_block(step, tokens)

    def run_block(self, step: BlockStep, tokens: Tokens) -> Tokens:
        """Runs one block, and returns the tokens after it."""
        place = step.place
        if place is not None:
            tokens = tokens.rejoin()
        if step.stride > 1:
            tokens = _restore_grid(pad(tokens))
        if place is Place.BEFORE_BLOCK:
            side = self._pad_for_method(tokens)
            signals = Signals(side.prefix, block=step.index, depth=len(self.plan.steps))
            tokens = self._apply_reduction(tokens, self._choose(step, side, signals))
        tokens = self._attend_and_reduce(step, place, tokens)
        return tokens.with_x(self.adapter.feed(self.host, step.index, tokens.x))

    def _attend_and_reduce(self, step: BlockStep, place: Place | None, tokens: Tokens) -> Tokens:
        """Runs attention and reduction, up to the feed-forward.

        Queries, keys and values are freed when this call ends: otherwise they would raise the peak
        memory of the feed-forward above that of the dense block.
        """
        attended = self._attend(step, place, tokens)
        tokens, signals = attended.queries, attended.signals
        tokens = tokens.with_x(self.adapter.mix(self.host, step.index, tokens, attended.values))
        del attended  # its values are not needed to choose
        if signals is not None and place is Place.BEFORE_FEED:
            tokens = self._apply_reduction(
                tokens, self._choose(step, self._pad_for_method(tokens), signals)
            )
        return tokens

    def _pad_for_method(self, tokens: Tokens) -> Tokens:
        """Pads packed images for the method, only as far as it reads them."""
        return pad(tokens, bare="x" not in self.method.reads)

    def _apply_reduction(self, tokens: Tokens, reduction: Reduction) -> Tokens:
        """Applies a decision that was made on padded images.

        If images keep different numbers of tokens, they are packed. Four cases forbid that: a
        graph, whose shapes are constant; training; a map back to the pixels, which counts the rows
        of an image; and an empty batch.
        """
        graph = torch.compiler.is_compiling()
        apart = self.training or not self.packs
        apart = apart or self.facts.has_relative_bias or self.facts.mixes_heads
        if graph or apart or tokens.origin is not None or not self.method.adaptive:
            return reduction.apply(tokens)
        if not len(tokens.x):
            return reduction.apply(tokens)
        return reduce_packed(tokens, reduction)

    def _choose(self, step: BlockStep, tokens: Tokens, signals: Signals) -> Reduction:
        """Calls the method on `tokens`."""
        keep = step.left - tokens.prefix
        self.method.check_step(step.index, tokens.patches, keep)
        return self.method.choose(tokens, signals, keep)

    def _attend(self, step: BlockStep, place: Place | None, tokens: Tokens) -> AttentionOutput:
        """Computes attention in one block, for the rows that come out of it."""
        if place is Place.ON_QUERIES:
            return self._attend_on_queries(step, tokens)
        if place is Place.ON_MAP:
            return self._attend_on_map(step, tokens)
        project = partial(self.adapter.project, self.host, step.index)
        queries = tokens
        if step.stride > 1:
            queries = tokens.subsample(step.stride)
        elif step.read is not None:
            queries = tokens.leading_rows(step.read)
        if queries is tokens:
            q, k, v = project(tokens, "qkv")
        else:
            (q,), (k, v) = project(queries, "q"), project(tokens, "kv")
        bias = self._bias(step, queries, tokens)
        values = self._attended_values(step, queries, tokens, (q, k, v), bias)
        decides = place is Place.BEFORE_FEED
        if not decides and not step.is_remembered:
            return AttentionOutput(queries, values, None)
        signals = self._signals(step, tokens, (q, k, v), bias, entered=queries.x)
        if step.is_remembered:
            noted = tokens.with_memory(self.method.remember(tokens, signals))
            queries = noted if queries is tokens else noted.subsample(step.stride)
        return AttentionOutput(queries, values, signals if decides else None)

    def _bias(self, step: BlockStep, queries: Tokens, keys: Tokens) -> Tensor | None:
        """Adds up what the tokens and the host add to the attention logits."""
        bias = attention_bias(keys, proportional=self.method.proportional)
        if bias is not None and bias.shape[2] > 1 and step.read is not None:
            bias = bias[:, :, : step.read]
        own = self.adapter.bias(self.host, step.index, queries, keys)
        if bias is None or own is None:
            return own if bias is None else bias
        return bias + own

    def _attend_on_queries(self, step: BlockStep, tokens: Tokens) -> AttentionOutput:
        """Decides at P2: all rows are keys and values, only the rows that stay are queries."""
        project = partial(self.adapter.project, self.host, step.index)
        bias = attention_bias(tokens, proportional=self.method.proportional)
        k, v = project(tokens, "kv")
        side = pad(tokens)
        asking = self.method.needs_class_token and side.prefix > 0
        q = project(side.leading_rows(side.prefix), "q")[0] if asking else None
        signals = self._signals(step, tokens, (q, k, v), bias)
        reduction = self._choose(step, side, signals)
        queries = self._apply_reduction(tokens, reduction)
        if bias is not None and bias.shape[2] > 1:
            rows = with_prefix(reduction.represent(tokens.rows()), tokens.prefix)
            bias = take(bias[:, 0], rows).unsqueeze(1)
        own = self.adapter.bias(self.host, step.index, queries, tokens)
        if own is not None:
            bias = own if bias is None else bias + own
        (q,) = project(queries, "q")
        return AttentionOutput(
            queries, self._attended_values(step, queries, tokens, (q, k, v), bias), signals
        )

    def _attend_on_map(self, step: BlockStep, tokens: Tokens) -> AttentionOutput:
        """Decides at P3: on the query-key map, which is then folded. Values come from rows left."""
        tokens = pad(tokens)
        project = partial(self.adapter.project, self.host, step.index)
        bias = self._bias(step, tokens, tokens)
        q, k = project(tokens, "qk")
        weights = attention_map(q, k, scale=self.facts.scales[step.index], bias=bias)
        signals = self._signals(step, tokens, (q, k, None), bias, weights)
        reduction = self._choose(step, tokens, signals)
        queries = reduction.apply(tokens)
        (v,) = project(queries, "v")
        weights = reduction.fold(weights, tokens.prefix)
        if step.read is not None:
            queries, weights = queries.leading_rows(step.read), weights[:, :, : step.read]
        return AttentionOutput(queries, weights @ v, signals)

    def _signals(
        self,
        step: BlockStep,
        tokens: Tokens,
        qkv: tuple[Tensor | None, Tensor | None, Tensor | None],
        bias: Tensor | None,
        weights: Tensor | None = None,
        entered: Tensor | None = None,
    ) -> Signals:
        """Collects what the method may read in this block, as padded images."""
        q, k, v = qkv
        if tokens.borders is not None:
            entered = None
            q, k, v = self._unpack_qkv(tokens.borders, q, k, v)
            maps = self.method.needs_class_token or "q" in self.method.reads
            side = pad(tokens, bare=True)
            bias = attention_bias(side, proportional=self.method.proportional) if maps else None
        if self.facts.mixes_heads:
            q = None  # its product with the keys is not the attention map
        readout = None
        if self.method.needs_class_token and not self.facts.has_class_token:
            readout = partial(self.adapter.readout, self.host, pad(tokens))
        scale = self.facts.scales[step.index]
        prefix = tokens.prefix if tokens.borders is None else tokens.borders.prefix
        depth = len(self.plan.steps)
        return Signals(
            prefix, scale, q, k, v, bias, readout, step.index, step.stride, depth, weights, entered
        )

    def _unpack_qkv(
        self, borders: Borders, q: Tensor | None, k: Tensor | None, v: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Pads those of packed q, k, v that the method reads; of q the prefix at least."""
        looks = self.method.reads
        if q is not None and q.shape[0] == 1 and "q" not in looks:
            batch = len(borders.counts)
            leading = q[0, :, : borders.prefix * batch]
            q = leading.unflatten(1, (borders.prefix, batch)).permute(2, 0, 1, 3)
        return (
            pad_heads(q, borders),
            pad_heads(k, borders) if "k" in looks else None,
            pad_heads(v, borders) if "v" in looks else None,
        )

    def _attended_values(
        self,
        step: BlockStep,
        queries: Tokens,
        keys: Tokens,
        qkv: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """Computes the attended values of the queries."""
        if self.facts.mixes_heads:
            return self.adapter.attend(self.host, step.index, qkv, bias)
        scale = self.facts.scales[step.index]
        if queries.borders is not None or keys.borders is not None:
            return packed_attention(qkv, queries=queries, keys=keys, scale=scale, bias=bias)
        dropout = self.facts.dropouts[step.index]
        return attention(*qkv, scale=scale, bias=bias, dropout=dropout, training=self.training)


def _restore_grid(tokens: Tokens) -> Tokens:
    """Restores one row for every cell, before a host subsamples its grid."""
    if tokens.alive is not None and tokens.alive.is_floating_point():
        raise UnsupportedModel(
            "This method masks tokens in training, and this host subsamples its grid, so that what "
            "is masked would come back. Train it on a flat host, or take another method."
        )
    return tokens.to_grid()
