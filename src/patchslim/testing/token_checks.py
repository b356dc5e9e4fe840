"""Checks of tokens for the laws of methods: rows, sizes, and the map to the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from patchslim.testing.law import Violation, require, require_close
from patchslim.tokens.tokens import Tokens


def real_rows(tokens: Tokens, t: Tensor) -> list[Tensor]:
    """Splits t (B, n, ...) into images, without padding."""
    if tokens.alive is None:
        return list(t)
    return [each[real] for each, real in zip(t, tokens.alive, strict=True)]


def _drops_cells(tokens: Tokens) -> bool:
    """Tells whether the map of these tokens has cells that lead to no row."""
    return tokens.origin is not None and bool((tokens.origin < 0).any())


def check_same_tokens(got: Tokens, wanted: Tokens, who: str) -> None:
    """Checks that both have the same rows, with the same features and sizes."""
    pairs = zip(real_rows(got, got.cells()), real_rows(wanted, wanted.cells()), strict=True)
    require(all(torch.equal(one, other) for one, other in pairs), f"{who}, it chose other rows")
    for what, of in (
        ("prefix", _prefix_rows),
        ("features", _patch_features),
        ("sizes", _patch_sizes),
    ):
        require_close(of(got), of(wanted), 1e-6, f"{who}, {what}")


def _prefix_rows(tokens: Tokens) -> Tensor:
    """Takes the prefix rows."""
    return tokens.x[:, : tokens.prefix]


def _patch_features(tokens: Tokens) -> Tensor:
    """Takes the features of all real patch rows."""
    return torch.cat(real_rows(tokens, tokens.x[:, tokens.prefix :]))


def _patch_sizes(tokens: Tokens) -> Tensor:
    """Takes the sizes of all real patch rows."""
    return torch.cat(real_rows(tokens, tokens.sizes()))


def check_sizes(tokens: Tokens, patches: int, *, joined: bool | None = None) -> None:
    """Checks that sizes are at least 1 and sum to at most `patches`; if `joined`, to all.

    By default rows have joined unless the map has cells that lead to none.
    """
    if joined is None:
        joined = tokens.size is not None and not _drops_cells(tokens)
    for sizes in real_rows(tokens, tokens.sizes()):
        require(bool((sizes >= 1).all()), f"a size of {sizes.min().item():g}")
        whole = sizes.sum().item()
        require(whole <= patches, f"sizes sum to {whole:g} of {patches}")
        require(not joined or whole == patches, f"sizes of joined rows sum to {whole:g}")


def check_origin(tokens: Tokens) -> None:
    """Checks the map: the cell of a row leads to it, and s cells lead to a row of size s."""
    origin = tokens.origin
    if origin is None:
        raise Violation("the map was lost")
    require(bool(((origin >= -1) & (origin < tokens.patches)).all()), "it leads to no row")
    back = origin.gather(1, tokens.cells())
    pairs = zip(real_rows(tokens, back), real_rows(tokens, tokens.rows()), strict=True)
    require(
        all(torch.equal(one, other) for one, other in pairs), "a row's own cell leads elsewhere"
    )
    led = torch.zeros(origin.shape[0], tokens.patches + 1).scatter_add(
        1, origin + 1, torch.ones(origin.shape)
    )[:, 1:]
    sizes = tokens.sizes().float()
    if tokens.alive is not None:
        sizes = sizes * tokens.alive
    require(torch.equal(led, sizes), "sizes are not the cells that lead there")
