"""Duplicates of the input: which patches are equal, which join, and how the answer changes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import patchslim
from comparison import is_close
from patchslim.errors import BadSetting, WrongInput
from patchslim.methods import Signals
from patchslim.methods.duplicates import Duplicates, first_identical
from patchslim.tokens.rows import take
from patchslim.tokens.tokens import Tokens

PIXELS = 12
NOISE = torch.Generator()


def noise(patches: int, batch: int = 1) -> torch.Tensor:
    """Makes patches of which no two are near to each other."""
    return 10 * torch.randn(batch, patches, PIXELS, generator=NOISE.manual_seed(0))


def tokens(shown: torch.Tensor, grid: tuple[int, int]) -> Tokens:
    """Makes tokens whose features are their pixels."""
    return Tokens(x=shown.clone(), prefix=0, grid=grid, content=lambda: shown)


def side(of: torch.Tensor) -> int:
    """Computes the side of a square grid."""
    return round(of.shape[1] ** 0.5)


def joined(shown: torch.Tensor, keep: int | None = None, **settings: Any) -> torch.Tensor:
    """Finds for each patch the one that it joins, itself if it stays (B, n), on a square grid."""
    there = tokens(shown, (side(shown), side(shown)))
    reduction = Duplicates(**settings).choose(there, Signals(0), keep or shown.shape[1])
    after = reduction.apply(there)
    assert after.alive is not None
    counted = (after.sizes() * after.alive).sum(dim=1)
    assert torch.equal(counted, torch.full_like(counted, shown.shape[1])), "some are not counted"
    return reduction.kept.gather(1, reduction.remap(shown.shape[1]))


def left(to: torch.Tensor) -> list[int]:
    """Counts the patches of each image that stay."""
    return [len(each.unique()) for each in to]


def worst(shown: torch.Tensor, to: torch.Tensor) -> float:
    """Computes the largest root mean square between a patch and the one that it joined."""
    return float((take(shown, to) - shown).square().mean(dim=2).sqrt().max())


def bare_vit(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Makes a small host without positions: 8 x 8 patches of 4 x 4 pixels."""
    torch.manual_seed(0)
    host = timm.models.VisionTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=7,
        pos_embed="none",
        **settings,
    )
    return host.eval().to(dtype)


def pages(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draws a white page, a line of text, a bar and a box, and noise (4, 3, 32, 32)."""
    images = torch.ones(4, 3, 32, 32, dtype=dtype)
    lots = NOISE.manual_seed(1)
    images[1, :, 9:13, 5:27] = torch.randn(3, 4, 22, generator=lots).to(dtype)
    images[2, :, :6] = -0.3
    images[2, :, 14:26, 10:22] = 0.4
    images[3] = torch.randn(3, 32, 32, generator=lots).to(dtype)
    return images


def test_one_ulp_in_one_value_keeps_two_patches_apart():
    shown = torch.full((1, 16, PIXELS), 0.7)
    shown[0, 5, 3] = torch.nextafter(shown[0, 5, 3], torch.tensor(1.0))
    assert joined(shown)[0].tolist() == [5 if row == 5 else 0 for row in range(16)]


def test_one_ulp_of_float64_too():
    shown = torch.full((1, 16, PIXELS), 0.7, dtype=torch.float64)
    shown[0, 5, 3] = torch.nextafter(shown[0, 5, 3], torch.tensor(1.0, dtype=torch.float64))
    assert 5 in joined(shown)[0].tolist()
    assert left(joined(shown)) == [2]


def test_both_zeros_are_apart_unless_there_is_a_tolerance():
    shown = torch.zeros(1, 16, PIXELS)
    shown[0, 3] = -0.0
    assert left(joined(shown)) == [2]
    assert left(joined(shown, tolerance=0.01)) == [1]


def test_equal_sums_do_not_join_what_is_different():
    """Rows are sorted by a 64-bit sum; these two have the same sum, and differ."""
    bits = torch.tensor([[1765067437, 1062151793], [-1765067438, -1062151794]])
    factors = [(number * 0x9E3779B97F4A7C1 * 2 + 1) for number in (1, 2)]
    sums = [sum(a * b for a, b in zip(row, factors, strict=True)) for row in bits.tolist()]
    assert (sums[0] - sums[1]) % 2**64 == 0
    values = bits.to(torch.int32).view(torch.float32)
    assert values.isfinite().all()
    square = torch.zeros(1, 3, dtype=torch.int64)
    assert first_identical(values[None, [0, 1, 0]], square, square == 0).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"reg_tokens": 2},
    ],
    ids=["class token", "average", "query", "registers"],
)
@torch.inference_mode()
def test_without_positions_nothing_is_lost(settings, dtype, most):
    host, images = bare_vit(dtype, **settings), pages(dtype)
    model = patchslim.slim(host, "duplicates")
    got, spent = model.forward_with_costs(images)
    off = float((got - host(images)).abs().max() / host(images).abs().max())
    assert off < most
    prefix = model.plan.shape.prefix
    assert [cost.rows[0] - prefix for cost in spent][::3] == [1, 64]
    assert spent[0].total < 0.2 * spent[3].total


@torch.inference_mode()
def test_positions_change_the_answer_but_not_the_patches(vit):
    images = torch.ones(1, *patchslim.find_adapter(vit).describe(vit).image_shape)
    model = patchslim.slim(vit, "duplicates")
    assert not is_close(model(images), vit(images), factor=100)
    first = model.trace(images, blocks=1)[0]
    assert int(first.lengths()[0]) == 1 + first.prefix


def test_a_white_page_leaves_one_patch_and_noise_leaves_all():
    shown = noise(196, batch=2)
    shown[0] = 1.0
    assert left(joined(shown)) == [1, 196]


def test_patches_join_the_first_that_is_the_same():
    shown = noise(16)
    shown[0, [3, 7, 12]] = shown[0, 9].clone()
    to = joined(shown)[0].tolist()
    assert [to[row] for row in (3, 7, 9, 12)] == [3, 3, 3, 3]
    assert [row for row in range(16) if to[row] == row] == [*range(7), 8, 10, 11, 13, 14, 15]


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize(("window", "count"), [(2, 49), (4, 16), (8, 4), (14, 1), (99, 1)])
def test_joins_stay_inside_of_squares(window, count, tolerance):
    shown = torch.zeros(1, 196, PIXELS)
    to = joined(shown, window=window, tolerance=tolerance)[0]
    cells = torch.arange(196)
    square = (cells // 14 // window) * 14 + cells % 14 // window
    assert torch.equal(square[to], square)
    assert left(to[None]) == [count]


@pytest.mark.parametrize("patches", [196, 1600])
def test_patches_that_join_differ_by_at_most_the_tolerance(patches):
    near = torch.rand(2, patches, PIXELS, generator=NOISE.manual_seed(2))
    to = joined(near, tolerance=0.3)
    assert max(left(to)) < 0.9 * patches
    assert worst(near, to) <= 0.3 * 1.001


def test_near_ones_of_a_duplicate_in_another_square_are_not_lost():
    """Of more than 1,024 patches, near ones are looked for in squares of 16, the same in all."""
    shown, cells = noise(4096), torch.arange(4096).view(64, 64)
    shown[0, cells[:16, 16:32].flatten()] = 0.03
    shown[0, 5] = shown[0, cells[0, 16]] = 0.0
    to = joined(shown, tolerance=0.1)
    assert worst(shown, to) <= 0.1
    assert int(to[0, cells[0, 16]]) == 5


def test_a_duplicate_joins_the_row_that_its_first_copy_joined():
    shown, cells = noise(4096), torch.arange(4096).view(64, 64)
    shown[0, 0], shown[0, 1], shown[0, cells[0, 19]] = 0.0, 0.05, 0.05
    to = joined(shown, tolerance=0.1)
    assert to[0, [0, 1, int(cells[0, 19])]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_a_cap_removes_the_flat_patches_first(tolerance):
    shown = noise(64, batch=2)
    flat = list(range(1, 64, 3))
    shown[:, flat] = torch.arange(len(flat)).view(-1, 1).float()
    to = joined(shown, 64 - len(flat), tolerance=tolerance)
    rows = torch.arange(64)
    assert {row for row in range(64) if to[0, row] == row} == set(rows.tolist()) - set(flat)


@pytest.mark.parametrize("settings", [{}, {"tolerance": 0.05}, {"window": 4}])
def test_a_cap_is_kept_in_a_batch_as_alone(settings):
    shown = noise(64, batch=5)
    shown[:, ::4] = 0.0
    shown[3] = 1.0
    together = joined(shown, 20, **settings)
    assert max(left(together)) == 20
    for number, each in enumerate(together):
        assert torch.equal(joined(shown[number : number + 1], 20, **settings)[0], each)


@torch.inference_mode()
def test_no_page_costs_more_than_the_cap():
    host, images = bare_vit(), pages()
    model = patchslim.slim(host, "duplicates", macs=0.7)
    together, spent = model.forward_with_costs(images)
    assert max(cost.total for cost in spent) <= model.macs().total <= 0.7 * model.dense_macs().total
    assert spent[0].total < spent[3].total
    alone = torch.cat([model(image) for image in images.split(1)])
    assert is_close(together, alone)


def test_tolerances_and_windows_that_mean_nothing_are_refused():
    for name, wrong, needed in (
        ("tolerance", -0.1, "must be at least 0"),
        ("window", -1, "must be at least 0"),
        ("tolerance", float("nan"), "takes a number"),
    ):
        with pytest.raises(BadSetting, match=f"{name}={wrong}: {name} {needed}"):
            Duplicates(**{name: wrong})


def test_patches_without_whole_pixels_are_refused():
    host = bare_vit(dynamic_img_size=True, dynamic_img_pad=True)
    model = patchslim.slim(host, "duplicates")
    with pytest.raises(WrongInput, match="no whole number of pixels"):
        model(torch.zeros(1, 3, 30, 30))


def test_tokens_without_pixels_are_refused():
    with pytest.raises(BadSetting, match="come without"):
        Duplicates().choose(Tokens(x=noise(4), prefix=0, grid=(2, 2)), Signals(0), 4)
