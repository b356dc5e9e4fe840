"""Decisions that are taken from small differences of large numbers are the same in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchslim.methods import Method
from patchslim.methods.adamerge import AdaMerge
from patchslim.methods.algm import ALGM
from patchslim.tokens.merging import Merge
from patchslim.tokens.tokens import Tokens

SIGNALS: Any = SimpleNamespace()


def decide(method: Method, x: Tensor, grid: tuple[int, int], keep: int) -> Merge:
    made = method.choose(Tokens(x=x, prefix=0, grid=grid), SIGNALS, keep)
    assert isinstance(made, Merge)
    return made


@pytest.mark.parametrize("grid", [(8, 8), (7, 7)])
def test_algm_finds_the_most_even_squares_among_patches_that_are_nearly_alike(grid):
    noise = torch.Generator().manual_seed(0)
    patches = grid[0] * grid[1]
    x = torch.randn(1, 1, 64, generator=noise) + 1e-3 * torch.randn(8, patches, 64, generator=noise)
    rows = decide(ALGM(), x, grid, patches - 9)
    exact = decide(ALGM(), x.double(), grid, patches - 9)
    assert torch.equal(rows.kept, exact.kept)
    assert torch.equal(rows.into, exact.into)


def test_adamerge_tells_saliences_apart_where_patches_attend_to_themselves():
    noise = torch.Generator().manual_seed(0)
    x = 4.2 * (torch.eye(64) + 0.02 * torch.randn(8, 64, 64, generator=noise))
    weights = decide(AdaMerge(), x, (8, 8), 48).weight
    exact = decide(AdaMerge(), x.double(), (8, 8), 48).weight
    assert weights is not None
    assert exact is not None
    assert torch.allclose(weights.double(), exact, atol=1e-3)
