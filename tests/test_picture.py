"""Pictures are true: each cell is shown by what became of it, and no image by another's counts."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import patchslim
from patchslim.errors import WrongInput
from patchslim.picture import (
    TINT,
    Fate,
    Survival,
    _caption,
    _survivals,
    _tints,
    draw,
    png,
    survivors,
)
from patchslim.tokens import Tokens

GREY = 200
PATCH = 48  # pixels of a drawn cell, of images of 4 * 4


@pytest.fixture(scope="module")
def host():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5
    ).eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(2)
    return torch.randn(2, 3, 32, 32)


def drawn(survival, pixels=None):
    """The panel of one survival, on grey unless told otherwise."""
    pixels = np.full((32, 32, 3), GREY, np.uint8) if pixels is None else pixels
    shown = np.asarray(draw(pixels, [survival])).astype(int)
    side = (shown.shape[1] - 8) // 2
    return shown[:side, side + 8 :]


def survival(into, grid=(4, 4), joined=Fate.MERGED):
    """What became of a grid of which each cell joined `into`, -1 where it was dropped."""
    fates = [
        Fate.DROPPED if head < 0 else joined if into.count(head) > 1 else Fate.SELF for head in into
    ]
    return Survival(2, grid, tuple(fates), tuple(into))


def patch(panel, cell):
    """The pixels of one of 4 * 4 cells."""
    down, across = divmod(cell, 4)
    return panel[down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH]


def plain(panel, cell):
    """A pixel of a cell that neither an outline nor a mark is near to."""
    return patch(panel, cell)[PATCH // 5, PATCH // 5]


ALONE = list(range(16))
# Cells 0, 1, 4 and 5 are a square, 10 and 11 a pair, 15 joined the square from afar; 3 is dropped.
INTO = [5, 5, 2, -1, 5, 5, 6, 7, 8, 9, 10, 10, 12, 13, 14, 5]


def test_every_cell_has_a_fate_and_the_counts_add_up(host, images):
    for method in ("tome", "evit", "topk", "random"):
        slim = patchslim.slim(host, method, keep=0.5)
        for image in survivors(slim, images, blocks=range(4)):
            for survival, rows in zip(image, slim.counts(), strict=True):
                assert len(survival.fate) == len(survival.into) == 16
                assert survival.left == rows - 1
                for cell, (fate, into) in enumerate(zip(survival.fate, survival.into, strict=True)):
                    assert (into == -1) == (fate is Fate.DROPPED)
                    assert into == cell or fate is not Fate.SELF


def test_fates_are_those_of_the_method(host, images):
    def fates(method):
        slim = patchslim.slim(host, method, keep=0.5)
        return set(survivors(slim, images, blocks=[3])[0][0].fate)

    assert fates("tome") == {Fate.SELF, Fate.MERGED}
    assert fates("topk") == {Fate.SELF, Fate.DROPPED}
    assert Fate.FUSED in fates("evit")
    assert Fate.MERGED not in fates("evit")


def test_merged_cells_point_at_one_cell_of_their_group(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    (survival,) = survivors(slim, images, blocks=[2])[1]
    for cell, into in enumerate(survival.into):
        assert survival.into[into] == into
        if survival.fate[cell] is Fate.MERGED:
            assert sum(other == into for other in survival.into) > 1


def test_pictures_leave_the_host_as_it_was(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    host.train()
    survivors(slim, images)
    assert host.training
    host.eval()


def test_blocks_that_do_not_exist_are_refused(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    for blocks in ([4], [-1], []):
        with pytest.raises(WrongInput, match="blocks 0 to 3"):
            survivors(slim, images, blocks=blocks)


def test_drawing_darkens_what_is_dropped_and_keeps_what_survives(host, images):
    slim = patchslim.slim(host, "topk", keep=0.5)
    (after,) = survivors(slim, images, blocks=[3])[0]
    panel = drawn(after)
    for cell, fate in enumerate(after.fate):
        shown = patch(panel, cell)
        assert shown.max() < 60 if fate is Fate.DROPPED else (shown == GREY).all()


def test_untouched_patches_are_shown_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    large = pixels.repeat(6, axis=0).repeat(6, axis=1)
    assert (drawn(survival(ALONE), pixels) == large).all()


def test_each_group_has_a_colour_of_its_own_wherever_its_patches_are():
    panel = drawn(survival(INTO))
    square, pair = plain(panel, 0), plain(panel, 11)
    assert np.abs(square - pair).max() > 30
    assert all((plain(panel, cell) == square).all() for cell in (0, 1, 4, 5, 15))
    assert all((plain(panel, cell) == pair).all() for cell in (10, 11))
    assert all((plain(panel, cell) == GREY).all() for cell in (2, 6, 7, 8, 9, 12, 13, 14))
    assert plain(panel, 3).max() < 60


def test_the_image_is_seen_through_the_tint():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = GREY
    column = [cell % 4 for cell in range(16)]  # each column is one group
    panel = drawn(survival(column), pixels)
    for cell in range(8):
        difference = plain(panel, cell) - plain(panel, cell + 8)
        assert np.abs(difference - (1 - TINT) * GREY).max() <= 1


@pytest.mark.parametrize("width", range(1, 40))
def test_neighbours_never_have_colours_alike(width):
    tints = _tints((5, width)).reshape(5, width, 3)
    for one, other in ((tints[1:], tints[:-1]), (tints[:, 1:], tints[:, :-1])):
        assert not one.size or np.abs(one - other).max(axis=2).min() > 50


def test_groups_are_outlined_between_each_other_and_never_inside():
    panel = drawn(survival(INTO))
    right, below = patch(panel, 1)[:, -1], patch(panel, 4)[-1]
    for edge, cell in ((right, 1), (below, 4)):
        assert (edge > plain(panel, cell)).any(axis=1).all()
    assert (patch(panel, 0)[:, -1] == plain(panel, 0)).all()
    assert (patch(panel, 0)[-1] == plain(panel, 0)).all()
    assert (patch(panel, 10)[:-1, -1] == plain(panel, 10)).all()
    assert (patch(panel, 8)[:, -1] == GREY).all()  # two patches that are themselves


def test_the_patch_that_others_joined_is_marked_and_no_other():
    panel = drawn(survival(INTO))
    marked = {cell for cell in range(16) if patch(panel, cell)[PATCH // 2, PATCH // 2].min() == 255}
    assert marked == {5, 10}
    rims = patch(panel, 5)[PATCH // 2, : PATCH // 2].max(axis=1)
    assert rims.min() < 100 < rims[0]


def test_fused_patches_are_dimmed_in_their_mean_colour_without_a_mark():
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    fused = [0 if cell < 6 else cell for cell in range(16)]
    panel = drawn(survival(fused, joined=Fate.FUSED), pixels.repeat(8, axis=0).repeat(8, axis=1))
    flat = pixels.reshape(16, 3).astype(float)
    for cell in range(16):
        wanted = 0.45 * (0.2 * flat[cell] + 0.8 * flat[:6].mean(axis=0)) if cell < 6 else flat[cell]
        assert np.abs(patch(panel, cell) - wanted).max() <= 1


ADAPTIVE = {
    "similarity": {"threshold": 1e-4},
    "tome": {"threshold": 0.3},
    "ats": {"floor": 2},
    "duplicates": {},
}


@pytest.mark.parametrize("method", ADAPTIVE)
def test_each_image_is_shown_with_its_own_count(host, images, method):
    images = images.clone()
    images[0, :, :, 8:] = images[0, :, :8, :8].repeat(1, 4, 3)  # most of one image is the same
    slim = patchslim.slim(host, method, keep=0.9, **ADAPTIVE[method])
    lone = [survivors(slim, images[place : place + 1], blocks=range(4))[0] for place in range(2)]
    assert survivors(slim, images, blocks=range(4)) == lone
    traced = zip(*[tokens.lengths() for tokens in slim.trace(images)], strict=True)
    for image, rows in zip(lone, traced, strict=True):
        assert [after.left + 1 for after in image] == list(rows)
        assert all(after.left <= after.most for after in image)
        assert [after.most + 1 for after in image] == list(slim.counts())


def test_methods_that_merge_by_threshold_drop_nothing(host, images):
    for method in ("similarity", "tome"):
        slim = patchslim.slim(host, method, **ADAPTIVE[method])
        for (after,) in survivors(slim, images, blocks=[3]):
            assert Fate.DROPPED not in after.fate
            assert all(after.into[head] == head for head in after.into)


def test_the_count_of_an_adaptive_method_is_told_beside_its_cap(host, images):
    def captions(method, **settings):
        slim = patchslim.slim(host, method, at=(1,), **settings)
        return [_caption(after) for (after,) in survivors(slim, images, blocks=[2])]

    assert captions("topk", keep=0.5) == ["after block 2: 8 left"] * 2
    assert captions("ats", keep=0.5, floor=8) == ["after block 2: 8 (cap 8)"] * 2
    assert captions("ats", floor=16) == ["after block 2: 16 left"] * 2  # nothing is capped


def test_pictures_of_any_shape(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    survivals = survivors(slim, images)[0]
    for size in ((33, 47), (200, 300), (4, 4)):
        picture = draw(np.zeros((*size, 3), np.uint8), survivals)
        assert png(picture).startswith(b"\x89PNG")
    with pytest.raises(WrongInput, match="uint8"):
        draw(np.zeros((32, 32, 3), np.float32), survivals)
    with pytest.raises(WrongInput, match="uint8"):
        draw(np.zeros((32, 32), np.uint8), survivals)


def test_packed_tokens_have_no_grid_to_show(images):
    with pytest.raises(WrongInput, match="trace them"):
        _survivals(Tokens(x=torch.zeros(1, 5, 4), prefix=1, grid=(2, 2)), 0, None, fuses=False)
