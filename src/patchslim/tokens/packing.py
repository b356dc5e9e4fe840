"""Ragged batches: images that keep different numbers of patches, packed behind one another.

A packed batch is one long image: the prefix rows of all images first, then the patches, image by
image, as a batch of one. All that works by row needs to know no more. Attention knows the
`Borders`, and so does the way back to images side by side, padded to the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.tokens.attention import attention
from patchslim.tokens.reduction import Keep, Merge, Reduction
from patchslim.tokens.rows import pack_rows
from patchslim.tokens.tokens import Borders, Tokens


def pack(tokens: Tokens) -> Tokens:
    """The real rows of padded tokens behind one another; real rows stand before padding.

    Where all images have the same number there is nothing to pack: the padding is cut off.
    """
    if tokens.alive is None or tokens.borders is not None:
        return tokens
    counts = tokens.alive.sum(dim=1).tolist()
    if len(set(counts)) == 1:
        return _trim_padding(tokens, counts[0])
    return _pack_tokens(tokens, Borders.from_counts(counts, tokens.prefix, tokens.x.device))


def reduce_packed(tokens: Tokens, reduction: Reduction) -> Tokens:
    """The tokens after a decision that was made about their images side by side, packed.

    The decision is said anew of packed rows, so that no padding is ever moved.
    """
    before = tokens.borders
    if before is None:
        whole = [rows - tokens.prefix for rows in tokens.lengths()]
        before = Borders.from_counts(whole, tokens.prefix, tokens.x.device)
    counts: list[int] = []
    if isinstance(reduction, Keep | Merge):
        counts = reduction.real_mask(before).sum(dim=1).tolist()
    if not isinstance(reduction, Keep | Merge) or len(set(counts)) == 1:  # nothing to pack then
        return pack(reduction.apply(pad(tokens)))
    after = Borders.from_counts(counts, before.prefix, tokens.x.device)
    if tokens.borders is None:
        tokens = _pack_tokens(tokens, before)
    return reduction.pack(before, after).apply(tokens, after)


def _pack_tokens(tokens: Tokens, borders: Borders) -> Tokens:
    """The real rows of images side by side, as many of each as the borders say, packed."""
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
    )


def pad(tokens: Tokens, *, bare: bool = False) -> Tokens:
    """The images of packed tokens side by side, padded to the longest; others as they are.

    With `bare` all but the features, which are no numbers then: moving them is most of the work.
    """
    if tokens.borders is None:
        return tokens
    borders = tokens.borders
    batch, prefix, longest = len(borders.counts), borders.prefix, max(borders.counts)
    place = borders.padded_index(longest)

    def rows(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[0, place]

    nothing = tokens.x.new_full((1, 1, 1), torch.nan)
    return Tokens(
        x=nothing.expand(batch, prefix + longest, tokens.x.shape[2])
        if bare
        else pad_rows(tokens.x, borders),
        prefix=prefix,
        grid=tokens.grid,
        size=rows(tokens.size),
        position=rows(tokens.position),
        alive=torch.arange(longest, device=place.device)
        < torch.tensor(borders.counts, device=place.device).view(batch, 1),
        rotary=tokens.rotary,
        content=tokens.content,
    )


def pad_rows(t: Tensor, borders: Borders) -> Tensor:
    """Packed rows t (1, N, ...) as images (B, prefix + longest, ...); padding repeats real rows."""
    batch, prefix = len(borders.counts), borders.prefix
    first = torch.arange(prefix * batch, device=t.device).view(prefix, batch).T
    place = borders.padded_index(max(borders.counts)) + prefix * batch
    rows = torch.cat([first, place], dim=1)
    return t[0].index_select(0, rows.flatten()).view(*rows.shape, *t.shape[2:])


def pad_heads(t: Tensor | None, borders: Borders) -> Tensor | None:
    """Packed heads t (1, H, N, d) of images side by side (B, H, n, d); others as they are."""
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
    """Attention within each image, where queries, keys or both are packed: (1, H, n, d) of packed.

    `queries` and `keys` say where images begin and end, or are images side by side (B, H, n, d);
    `bias` is added to the logits of each key (B, 1, 1, N).
    """
    q, k, v = (t.transpose(1, 2) for t in qkv)
    asked = _split_images(q, queries)
    added = [None] * len(asked) if bias is None else _split_images(bias[:, 0, 0], keys)
    every = [
        attention(
            _as_heads(asking),
            _as_heads(key),
            _as_heads(value),
            scale=scale,
            bias=None if weight is None else weight.view(1, 1, 1, -1),
        )[0].transpose(0, 1)
        for asking, key, value, weight in zip(
            asked, _split_images(k, keys), _split_images(v, keys), added, strict=True
        )
    ]
    if queries.borders is None:
        return torch.stack(every).transpose(1, 2)
    attended = torch.cat(every).index_select(0, queries.borders.inverse_order)
    return attended.unsqueeze(0).transpose(1, 2)


def _as_heads(t: Tensor) -> Tensor:
    """Rows of one image (n, H, d) as attention takes them (1, H, n, d)."""
    return t.transpose(0, 1).unsqueeze(0)


def _split_images(t: Tensor, tokens: Tokens) -> list[Tensor]:
    """The rows t (1, N, ...) or (B, N, ...) of each image (n, ...), prefix first."""
    if tokens.borders is None:
        return list(t.unbind())
    borders = tokens.borders
    whole = [borders.prefix + count for count in borders.counts]
    return list(t[0].index_select(0, borders.order).split(whole))


def _trim_padding(tokens: Tokens, count: int) -> Tokens:
    """Tokens of which every image has `count` real rows, without the padding."""
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
    )
