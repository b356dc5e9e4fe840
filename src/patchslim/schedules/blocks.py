"""The blocks in which methods usually remove tokens, by the depth of the host. Plain numbers."""

from __future__ import annotations

from collections.abc import Mapping


def stage_blocks(depth: int) -> tuple[int, ...]:
    """Lists the blocks at a quarter, a half and three quarters of the depth: 3, 6, 9 of 12."""
    return tuple(sorted({min(max(1, depth * part // 4), depth - 1) for part in (1, 2, 3)}))


def later_blocks(depth: int, begin: int | None = None) -> tuple[int, ...]:
    """Lists blocks from `begin`, or a quarter of the depth, to the last but one: 3 to 10 of 12."""
    begin = depth // 4 if begin is None else begin
    return tuple(range(min(begin, depth - 1), max(depth - 1, 1)))


def unit_blocks(depth: int, resets: Mapping[int, int]) -> tuple[int, ...]:
    """Lists the first block of each stage: at a third and two thirds of the depth; or of a pyramid.

    In a pyramid, the first stage begins at block 2, as in Evo-ViT.
    """
    if not resets:
        return tuple(sorted({min(max(1, depth * part // 3), depth - 1) for part in (1, 2)}))
    first = (2, *(block + 1 for block in resets))
    return tuple(sorted({block for block in first if block < depth and block not in resets}))
