"""`Blocks`: what becomes of tokens in one block of the host: attention, decision, feed-forward.

The one place that knows where in a block a decision falls. It knows nothing of schedules.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patchslim.errors import UnsupportedModel
from patchslim.methods._method import Place, Reducer, Signals
from patchslim.model.host_api import Surface
from patchslim.model.step import Attended, Step
from patchslim.schedules.macs import skips
from patchslim.tokens.attention import attention, attention_bias, attention_map
from patchslim.tokens.packing import each_image, padded, ragged_attention, reduced
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.rows import take, with_leading
from patchslim.tokens.tokens import Borders, Tokens


class Blocks(Surface):
    """The blocks of the host, run one at a time with a method's decisions in them."""

    reducer: Reducer
    packs: bool

    def recomputed(self, step: Step, tokens: Tokens, *, recompute: bool = False) -> Tokens:
        """The tokens after one block, recomputed in the backward pass where that is asked for."""
        recompute = recompute or self.adapter.checkpoints(self.host)
        if recompute and self.training and torch.is_grad_enabled():
            after: Tokens = checkpoint(self.run, step, tokens, use_reentrant=False)
            return after
        return self.run(step, tokens)

    def run(self, step: Step, tokens: Tokens) -> Tokens:
        """The tokens after one block."""
        place = self.place(step)
        if place is not None:
            tokens = tokens.rejoined()
        if step.stride > 1:
            tokens = _whole_grid(padded(tokens))
        if place is Place.BEFORE_BLOCK:
            side = self._laid_out(tokens)
            signals = Signals(side.prefix, block=step.index)
            tokens = self._reduced(tokens, self._choose(step, side, signals))
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
        if signals is not None and place is Place.BEFORE_FEED:
            tokens = self._reduced(tokens, self._choose(step, self._laid_out(tokens), signals))
        return tokens

    def _laid_out(self, tokens: Tokens) -> Tokens:
        """The images side by side for the method to look at, as far as it does."""
        return padded(tokens, bare="x" not in self.reducer.looks)

    def _reduced(self, tokens: Tokens, reduction: Reduction) -> Tokens:
        """The tokens after a decision about their images side by side.

        Packed behind one another, where images have different numbers and nothing forbids: not in
        a graph, whose shapes are constant; not in training; and not where the map back to the
        pixels is asked for, which counts the rows of an image.
        """
        graph = torch.compiler.is_compiling()
        apart = self.training or not self.packs or self.adapter.relative
        if graph or apart or tokens.origin is not None or not self.reducer.adaptive:
            return reduction.apply(tokens)
        return reduced(tokens, reduction)

    def place(self, step: Step) -> Place | None:
        """Where this block decides, or None where it does not.

        The schedule says so, not the rows at hand: a method that masks leaves them all in place.
        """
        if step.stride > 1:
            return None
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
        queries = tokens
        if step.stride > 1:
            queries = tokens.strided(step.stride)
        elif step.read is not None:
            queries = tokens.leading(step.read)
        if queries is tokens:
            q, k, v = project(tokens, "qkv")
        else:
            (q,), (k, v) = project(queries, "q"), project(tokens, "kv")
        bias = self._bias(step, queries, tokens)
        values = self._values(step, queries, tokens, (q, k, v), bias)
        decides = place is Place.BEFORE_FEED
        if not decides and not step.noted:
            return Attended(queries, values, None)
        signals = self._signals(step, tokens, q, k, v, bias)
        if step.noted:
            noted = tokens.remembering(self.reducer.remember(tokens, signals))
            queries = noted if queries is tokens else noted.strided(step.stride)
        return Attended(queries, values, signals if decides else None)

    def _bias(self, step: Step, queries: Tokens, keys: Tokens) -> Tensor | None:
        """What is added to the attention logits: by the tokens, and by the host."""
        bias = attention_bias(keys, proportional=self.reducer.proportional)
        if bias is not None and bias.shape[2] > 1 and step.read is not None:
            bias = bias[:, :, : step.read]
        own = self.adapter.bias(self.host, step.index, queries, keys)
        if bias is None or own is None:
            return own if bias is None else bias
        return bias + own

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
        queries = self._reduced(tokens, reduction)
        if bias is not None and bias.shape[2] > 1:
            rows = with_leading(reduction.represent(tokens.rows()), tokens.prefix)
            bias = take(bias[:, 0], rows).unsqueeze(1)
        own = self.adapter.bias(self.host, step.index, queries, tokens)
        if own is not None:
            bias = own if bias is None else bias + own
        (q,) = project(queries, "q")
        return Attended(queries, self._values(step, queries, tokens, (q, k, v), bias), signals)

    def _attend_by_map(self, step: Step, tokens: Tokens) -> Attended:
        """P3: the query-key map decides and is folded; values come from the rows that are left."""
        tokens = padded(tokens)
        project = partial(self.adapter.project, self.host, step.index)
        bias = self._bias(step, tokens, tokens)
        q, k = project(tokens, "qk")
        signals = self._signals(step, tokens, q, k, None, bias)
        reduction = self._choose(step, tokens, signals)
        weights = attention_map(q, k, scale=signals.scale, bias=bias)
        queries = reduction.apply(tokens)
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
            maps = self.reducer.needs_class_token or "q" in self.reducer.looks
            side = padded(tokens, bare=True)
            bias = attention_bias(side, proportional=self.reducer.proportional) if maps else None
        readout = None
        if self.reducer.needs_class_token and not self.adapter.has_class_token(self.host):
            readout = partial(self.adapter.readout, self.host, padded(tokens))
        scale = self.adapter.scale(self.host, step.index)
        prefix = tokens.prefix if tokens.borders is None else tokens.borders.prefix
        return Signals(prefix, scale, q, k, v, bias, readout, step.index, step.stride)

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
            return ragged_attention(qkv, queries=queries, keys=keys, scale=scale, bias=bias)
        dropout = self.adapter.dropout(self.host, step.index)
        return attention(*qkv, scale=scale, bias=bias, dropout=dropout, training=self.training)


def _whole_grid(tokens: Tokens) -> Tokens:
    """The tokens of a host that subsamples its grid, before it does: one row for every cell."""
    if tokens.alive is not None and tokens.alive.is_floating_point():
        raise UnsupportedModel(
            "This method masks tokens in training, and this host subsamples its grid, so that what "
            "is masked would come back. Train it on a flat host, or take another method."
        )
    return tokens.gridded()
