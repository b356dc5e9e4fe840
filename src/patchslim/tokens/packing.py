"""Packs images that keep different numbers of patches into one long sequence, without padding.

A packed batch is a batch of one: the prefix rows of all images, then the patch rows of the first
image, of the second, and so on. Layers that work on single rows need not know. Attention reads
the `Borders` between images, and so does `pad`, which makes a padded batch again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.tokens.attention import attention
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import Keep, Reduction
from patchslim.tokens.rows import pack_rows
from patchslim.tokens.tokens import Borders, Tokens


def pack(tokens: Tokens) -> Tokens:
    """Packs padded tokens, in which the real rows of each image come before its padding.

    If all images have the same number of real rows, only the padding is cut off.
    """
    if tokens.alive is None or tokens.borders is not None:
        return tokens
    counts = tokens.alive.sum(dim=1).tolist()
    if len(set(counts)) == 1:
        return _trim_padding(tokens, counts[0])
    return _pack_tokens(tokens, Borders.from_counts(counts, tokens.prefix, tokens.x.device))


def reduce_packed(tokens: Tokens, reduction: Reduction) -> Tokens:
    """Applies to packed tokens a reduction that was decided on padded ones; packs the result.

    The reduction is translated to packed rows, so that no padding is moved.
    """
    before = tokens.borders
    if before is None:
        whole = [rows - tokens.prefix for rows in tokens.lengths()]
        before = Borders.from_counts(whole, tokens.prefix, tokens.x.device)
    counts: list[int] = []
    if isinstance(reduction, Keep | Merge):
        counts = reduction.real_mask(before).sum(dim=1).tolist()
    # Only these two can leave images of different lengths. Equal lengths need no packing.
    if not isinstance(reduction, Keep | Merge) or len(set(counts)) == 1:
        return pack(reduction.apply(pad(tokens)))
    after = Borders.from_counts(counts, before.prefix, tokens.x.device)
    if tokens.borders is None:
        tokens = _pack_tokens(tokens, before)
    return reduction.pack(before, after).apply(tokens, after)


def _pack_tokens(tokens: Tokens, borders: Borders) -> Tokens:
    """Packs the real rows of a padded batch, as many of each image as the borders say."""
    prefix = borders.prefix
    leading = tokens.x[:, :prefix].transpose(0, 1).flatten(0, 1).unsqueeze(0)
    patches = pack_rows(tokens.x[:, prefix:], tokens.alive)
    return Tokens(
        x=torch.cat([leading, patches], dim=1),
        prefix=prefix * len(borders.counts),
        grid=tokens.grid,
        size=None if tokens.size is None else pack_rows(tokens.size, tokens.alive),
        position=pack_rows(tokens.cells(), tokens.alive),
        rotary=tokens.rotary,
        content=tokens.content,
        borders=borders,
        frames=tokens.frames,
    )


def pad(tokens: Tokens, *, bare: bool = False) -> Tokens:
    """Turns packed tokens into a batch padded to the longest image; leaves others as they are.

    With `bare`, features are NaN: moving them is most of the work, and not every method reads them.
    """
    if tokens.borders is None:
        return tokens
    borders = tokens.borders
    batch, prefix, longest = len(borders.counts), borders.prefix, max(borders.counts)
    index = borders.padded_index(longest)

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[0, index]

    unread = tokens.x.new_full((1, 1, 1), torch.nan)
    return Tokens(
        x=unread.expand(batch, prefix + longest, tokens.x.shape[2])
        if bare
        else pad_rows(tokens.x, borders),
        prefix=prefix,
        grid=tokens.grid,
        size=rows(tokens.size),
        position=rows(tokens.position),
        alive=torch.arange(longest, device=index.device)
        < torch.tensor(borders.counts, device=index.device).view(batch, 1),
        rotary=tokens.rotary,
        content=tokens.content,
        frames=tokens.frames,
    )


def pad_rows(t: Tensor, borders: Borders) -> Tensor:
    """Turns packed rows t (1, N, ...) into a padded batch (B, prefix + longest, ...).

    Padding repeats real rows.
    """
    batch, prefix = len(borders.counts), borders.prefix
    first = torch.arange(prefix * batch, device=t.device).view(prefix, batch).T
    patches = borders.padded_index(max(borders.counts)) + prefix * batch
    rows = torch.cat([first, patches], dim=1)
    return t[0].index_select(0, rows.flatten()).view(*rows.shape, *t.shape[2:])


def pad_heads(t: Tensor | None, borders: Borders) -> Tensor | None:
    """Turns packed heads t (1, H, N, d) into a padded batch (B, H, n, d); leaves others as is."""
    if t is None or t.shape[0] > 1:
        return t
    return pad_rows(t.transpose(1, 2), borders).transpose(1, 2)


def packed_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    *,
    queries: Tokens,
    keys: Tokens,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """Computes attention within each image, if queries, keys or both are packed.

    The result is packed, (1, H, n, d), if the queries are. `bias` (B, 1, 1, N) is added to the
    logits of each key.
    """
    q, k, v = (t.transpose(1, 2) for t in qkv)
    split_q = _split_images(q, queries)
    split_bias = [None] * len(split_q) if bias is None else _split_images(bias[:, 0, 0], keys)
    every = [
        attention(
            _as_heads(query),
            _as_heads(key),
            _as_heads(value),
            scale=scale,
            bias=None if added is None else added.view(1, 1, 1, -1),
        )[0].transpose(0, 1)
        for query, key, value, added in zip(
            split_q, _split_images(k, keys), _split_images(v, keys), split_bias, strict=True
        )
    ]
    if queries.borders is None:
        return torch.stack(every).transpose(1, 2)
    attended = torch.cat(every).index_select(0, queries.borders.inverse_order)
    return attended.unsqueeze(0).transpose(1, 2)


def _as_heads(t: Tensor) -> Tensor:
    """Turns the rows of one image (n, H, d) into what attention takes (1, H, n, d)."""
    return t.transpose(0, 1).unsqueeze(0)


def _split_images(t: Tensor, tokens: Tokens) -> list[Tensor]:
    """Splits t, (1, N, ...) if packed or (B, N, ...), into the rows of each image, prefix first."""
    if tokens.borders is None:
        return list(t.unbind())
    borders = tokens.borders
    whole = [borders.prefix + count for count in borders.counts]
    return list(t[0].index_select(0, borders.order).split(whole))


def _trim_padding(tokens: Tokens, count: int) -> Tokens:
    """Cuts the padding off tokens that have `count` real rows in every image."""
    if count == tokens.patches and tokens.alive is None:
        return tokens

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[:, :count]

    return Tokens(
        x=tokens.x[:, : tokens.prefix + count],
        prefix=tokens.prefix,
        grid=tokens.grid,
        size=rows(tokens.size),
        position=rows(tokens.cells()),
        rotary=tokens.rotary,
        content=tokens.content,
        frames=tokens.frames,
    )
