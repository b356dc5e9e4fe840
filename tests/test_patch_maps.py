"""Pictures are true: every patch is shown by its fate, every image by its own counts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.levit import Levit
from timm.models.vision_transformer import VisionTransformer

import patchslim
from child_process import run_in_process
from patchslim.architectures.evo_levit import EvoLevit
from patchslim.errors import WrongInput
from patchslim.report.patch_maps import Fate, PatchMap, _make_patch_maps, trace_patches
from patchslim.report.patch_pictures import (
    BACKGROUND,
    CAPTION_HEIGHT,
    GROUP_TINT,
    _caption,
    _cell_tints,
    draw_patches,
    encode_png,
)
from patchslim.tokens.tokens import Tokens

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


def draw_panel(survival, pixels=None):
    """Draws the panel of one map, by default over a grey image."""
    pixels = np.full((32, 32, 3), GREY, np.uint8) if pixels is None else pixels
    shown = np.asarray(draw_patches(pixels, [survival])).astype(int)
    side = (shown.shape[1] - 8) // 2
    return shown[:side, side + 8 :]


def patch_map_of(into, grid=(4, 4), joined=Fate.MERGED):
    """Makes a map of a grid of which each cell joined the cell `into`, or was dropped (-1)."""
    fates = [
        Fate.DROPPED if head < 0 else joined if into.count(head) > 1 else Fate.SELF for head in into
    ]
    return PatchMap(2, grid, tuple(fates), tuple(into))


def cell_pixels(panel, cell):
    """Returns the pixels of one of 4 * 4 cells."""
    down, across = divmod(cell, 4)
    return panel[down * PATCH : (down + 1) * PATCH, across * PATCH : (across + 1) * PATCH]


def cell_pixel(panel, cell):
    """Returns a pixel of a cell that is far from its outline and its dot."""
    return cell_pixels(panel, cell)[PATCH // 5, PATCH // 5]


ALONE = list(range(16))
# Cells 0, 1, 4 and 5 are a square, 10 and 11 a pair, 15 joined the square from afar; 3 is dropped.
INTO = [5, 5, 2, -1, 5, 5, 6, 7, 8, 9, 10, 10, 12, 13, 14, 5]


def test_every_cell_has_a_fate_and_the_counts_add_up(host, images):
    for method in ("tome", "evit", "topk", "random"):
        slim = patchslim.slim(host, method, keep=0.5)
        for image in trace_patches(slim, images, blocks=range(4)):
            for survival, rows in zip(image, slim.counts(), strict=True):
                assert len(survival.fate) == len(survival.into) == 16
                assert survival.left == rows - 1
                for cell, (fate, into) in enumerate(zip(survival.fate, survival.into, strict=True)):
                    assert (into == -1) == (fate is Fate.DROPPED)
                    assert into == cell or fate is not Fate.SELF


def test_fates_are_those_of_the_method(host, images):
    def fates(method):
        slim = patchslim.slim(host, method, keep=0.5)
        return set(trace_patches(slim, images, blocks=[3])[0][0].fate)

    assert fates("tome") == {Fate.SELF, Fate.MERGED}
    assert fates("topk") == {Fate.SELF, Fate.DROPPED}
    assert Fate.FUSED in fates("evit")
    assert Fate.MERGED not in fates("evit")


def test_merged_cells_point_at_one_cell_of_their_group(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    (survival,) = trace_patches(slim, images, blocks=[2])[1]
    for cell, into in enumerate(survival.into):
        assert survival.into[into] == into
        if survival.fate[cell] is Fate.MERGED:
            assert sum(other == into for other in survival.into) > 1


def test_pictures_leave_the_host_as_it_was(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    host.train()
    trace_patches(slim, images)
    assert host.training
    host.eval()


def test_blocks_that_do_not_exist_are_refused(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    for blocks in ([4], [-1], []):
        with pytest.raises(WrongInput, match="blocks 0 to 3"):
            trace_patches(slim, images, blocks=blocks)


def test_drawing_darkens_what_is_dropped_and_keeps_what_survives(host, images):
    slim = patchslim.slim(host, "topk", keep=0.5)
    (after,) = trace_patches(slim, images, blocks=[3])[0]
    panel = draw_panel(after)
    for cell, fate in enumerate(after.fate):
        shown = cell_pixels(panel, cell)
        assert shown.max() < 60 if fate is Fate.DROPPED else (shown == GREY).all()


def test_untouched_patches_are_shown_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    large = pixels.repeat(6, axis=0).repeat(6, axis=1)
    assert (draw_panel(patch_map_of(ALONE), pixels) == large).all()


def test_each_group_has_a_colour_of_its_own_wherever_its_patches_are():
    panel = draw_panel(patch_map_of(INTO))
    square, pair = cell_pixel(panel, 0), cell_pixel(panel, 11)
    assert np.abs(square - pair).max() > 30
    assert all((cell_pixel(panel, cell) == square).all() for cell in (0, 1, 4, 5, 15))
    assert all((cell_pixel(panel, cell) == pair).all() for cell in (10, 11))
    assert all((cell_pixel(panel, cell) == GREY).all() for cell in (2, 6, 7, 8, 9, 12, 13, 14))
    assert cell_pixel(panel, 3).max() < 60


def test_the_image_shows_through_the_tint():
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = GREY
    column = [cell % 4 for cell in range(16)]  # each column is one group
    panel = draw_panel(patch_map_of(column), pixels)
    for cell in range(8):
        difference = cell_pixel(panel, cell) - cell_pixel(panel, cell + 8)
        assert np.abs(difference - (1 - GROUP_TINT) * GREY).max() <= 1


@pytest.mark.parametrize("width", range(1, 40))
def test_neighbours_never_have_colours_alike(width):
    tints = _cell_tints((5, width)).reshape(5, width, 3)
    for one, other in ((tints[1:], tints[:-1]), (tints[:, 1:], tints[:, :-1])):
        assert not one.size or np.abs(one - other).max(axis=2).min() > 50


def test_groups_are_outlined_between_each_other_and_never_inside():
    panel = draw_panel(patch_map_of(INTO))
    right, below = cell_pixels(panel, 1)[:, -1], cell_pixels(panel, 4)[-1]
    for edge, cell in ((right, 1), (below, 4)):
        assert (edge > cell_pixel(panel, cell)).any(axis=1).all()
    assert (cell_pixels(panel, 0)[:, -1] == cell_pixel(panel, 0)).all()
    assert (cell_pixels(panel, 0)[-1] == cell_pixel(panel, 0)).all()
    assert (cell_pixels(panel, 10)[:-1, -1] == cell_pixel(panel, 10)).all()
    assert (cell_pixels(panel, 8)[:, -1] == GREY).all()  # two patches that are themselves


def test_the_patch_that_others_joined_is_marked_and_no_other():
    panel = draw_panel(patch_map_of(INTO))
    marked = {
        cell for cell in range(16) if cell_pixels(panel, cell)[PATCH // 2, PATCH // 2].min() == 255
    }
    assert marked == {5, 10}
    rims = cell_pixels(panel, 5)[PATCH // 2, : PATCH // 2].max(axis=1)
    assert rims.min() < 100 < rims[0]


def test_fused_patches_are_dimmed_in_their_mean_colour_without_a_mark():
    pixels = np.random.default_rng(0).integers(0, 255, (4, 4, 3)).astype(np.uint8)
    fused = [0 if cell < 6 else cell for cell in range(16)]
    panel = draw_panel(
        patch_map_of(fused, joined=Fate.FUSED), pixels.repeat(8, axis=0).repeat(8, axis=1)
    )
    flat = pixels.reshape(16, 3).astype(float)
    for cell in range(16):
        wanted = 0.45 * (0.2 * flat[cell] + 0.8 * flat[:6].mean(axis=0)) if cell < 6 else flat[cell]
        assert np.abs(cell_pixels(panel, cell) - wanted).max() <= 1


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
    lone = [
        trace_patches(slim, images[place : place + 1], blocks=range(4))[0] for place in range(2)
    ]
    assert trace_patches(slim, images, blocks=range(4)) == lone
    traced = zip(*[tokens.lengths() for tokens in slim.trace(images)], strict=True)
    for image, rows in zip(lone, traced, strict=True):
        assert [after.left + 1 for after in image] == list(rows)
        assert all(after.left <= after.most for after in image)
        assert [after.most + 1 for after in image] == list(slim.counts())


def test_methods_that_merge_by_threshold_drop_nothing(host, images):
    for method in ("similarity", "tome"):
        slim = patchslim.slim(host, method, **ADAPTIVE[method])
        for (after,) in trace_patches(slim, images, blocks=[3]):
            assert Fate.DROPPED not in after.fate
            assert all(after.into[head] == head for head in after.into)


def test_an_adaptive_methods_count_is_shown_next_to_its_cap(host, images):
    def captions(method, **settings):
        slim = patchslim.slim(host, method, at=(1,), **settings)
        return [_caption(after) for (after,) in trace_patches(slim, images, blocks=[2])]

    assert captions("topk", keep=0.5) == ["after block 2: 8 left"] * 2
    assert captions("ats", keep=0.5, floor=8) == ["after block 2: 8 (cap 8)"] * 2
    assert captions("ats", floor=16) == ["after block 2: 16 left"] * 2  # nothing is capped


def test_pictures_of_any_shape(host, images):
    slim = patchslim.slim(host, "tome", r=3)
    survivals = trace_patches(slim, images)[0]
    for size in ((33, 47), (200, 300), (4, 4)):
        picture = draw_patches(np.zeros((*size, 3), np.uint8), survivals)
        assert encode_png(picture).startswith(b"\x89PNG")
    with pytest.raises(WrongInput, match="uint8"):
        draw_patches(np.zeros((32, 32, 3), np.float32), survivals)
    with pytest.raises(WrongInput, match="uint8"):
        draw_patches(np.zeros((32, 32), np.uint8), survivals)


def test_packed_tokens_have_no_grid_to_show(images):
    with pytest.raises(WrongInput, match="trace them"):
        _make_patch_maps(
            Tokens(x=torch.zeros(1, 5, 4), prefix=1, grid=(2, 2)), 0, None, fuses=False
        )


# --- patches that wait, and what is remembered of them


def slim_evo(host, **settings):
    """Slims so that half of the patches wait from block 1 on, and another half from block 2 on."""
    return patchslim.slim(host, "evo", keep_rate=0.5, at=(1, 2), **settings)


def heat_panel(picture, column):
    """Returns the panel of heat in a column."""
    shown = np.asarray(picture).astype(int)
    side = shown.shape[0] // 2 - CAPTION_HEIGHT
    left = column * (side + 8)
    return shown[side + CAPTION_HEIGHT : 2 * side + CAPTION_HEIGHT, left : left + side]


@pytest.mark.parametrize("representative", [True, False])
def test_what_goes_on_and_what_waits_is_the_whole_grid(host, images, representative):
    slim = slim_evo(host, representative=representative)
    traced = slim.trace(images)
    for place, image in enumerate(trace_patches(slim, images, blocks=range(4))):
        assert [after.waiting for after in image] == [0, 8, 8, 8]
        assert [after.left + 1 for after in image] == list(slim.counts())
        for after, tokens in zip(image[1:], traced[1:], strict=True):
            assert after.slow + after.waiting == 16
            slow = set(tokens.deferred.kept[place].tolist())
            for cell, (fate, into) in enumerate(zip(after.fate, after.into, strict=True)):
                assert fate is (Fate.SELF if cell in slow else Fate.WAITING)
                assert into == cell if cell in slow else into not in slow
                assert representative or cell in slow or into == -1


def test_waiting_patches_are_veiled_and_the_others_clear(host, images):
    (after,) = trace_patches(slim_evo(host), images, blocks=[3])[0]
    panel = draw_panel(after)
    for cell, fate in enumerate(after.fate):
        red, _, blue = np.moveaxis(cell_pixels(panel, cell), 2, 0)
        if fate is Fate.WAITING:
            assert (blue > red + 20).all()
            assert len(np.unique(red)) == 2  # a veil, and its stripes
        else:
            assert (cell_pixels(panel, cell) == GREY).all()


def test_the_image_shows_through_the_veil(host, images):
    (after,) = trace_patches(slim_evo(host), images, blocks=[3])[0]
    (dark, *_), (light, *_) = (
        [
            cell_pixels(draw_panel(after, pixels), cell)
            for cell in range(16)
            if after.fate[cell] == 4
        ]
        for pixels in (np.full((32, 32, 3), level, np.uint8) for level in (0, 255))
    )
    assert (light > dark).all()
    assert dark.min() > 40  # not to be taken for one that was dropped


def test_the_picture_shows_the_deciding_blocks_of_a_method_that_defers_by_default(host, images):
    def shown(method, at):
        slim = patchslim.slim(host, method, keep_rate=0.5, at=at)
        return [after.block for after in trace_patches(slim, images)[0]]

    assert shown("evo", (1, 2)) == [1, 2]
    assert shown("evo", (2,)) == [2]
    assert shown("topk", (2,)) == [1, 2, 3]


def test_heat_is_what_the_last_decision_was_made_by(host, images):
    for image, after in zip(
        images, trace_patches(slim_evo(host), images, blocks=[2, 3]), strict=True
    ):
        assert after[0].heat == after[1].heat
        lone = trace_patches(slim_evo(host), image[None], blocks=[2])[0][0]
        assert torch.allclose(torch.tensor(after[0].heat), torch.tensor(lone.heat), atol=1e-6)
        hottest = torch.tensor(after[0].heat).topk(8).indices
        slow = {cell for cell, fate in enumerate(after[0].fate) if fate is Fate.SELF}
        assert set(hottest.tolist()) == slow


def test_heat_is_in_the_order_of_the_grid_whatever_the_rows_are():
    origin = torch.tensor([[1, -1, 0, 1]])
    tokens = Tokens(x=torch.zeros(1, 3, 4), prefix=1, grid=(2, 2), origin=origin)
    (after,) = _make_patch_maps(tokens, 0, None, fuses=False)
    assert after.heat is None
    (after,) = _make_patch_maps(
        tokens.with_memory(torch.tensor([[3.0, 5.0]])), 0, None, fuses=False
    )
    assert after.heat == (5.0, 0.0, 3.0, 5.0)


def test_the_brightest_patch_of_the_lower_panel_is_the_hottest(host, images):
    pixels = np.full((32, 32, 3), GREY, np.uint8)
    after = trace_patches(slim_evo(host), images, blocks=[0, 1, 3])[1]
    picture = draw_patches(pixels, after)
    for column, one in enumerate(after, 1):
        panel = heat_panel(picture, column)
        cells = [cell_pixels(panel, cell) for cell in range(16)]
        assert all((cell == cell[0, 0]).all() for cell in cells)
        bright = [float(cell[0, 0] @ (0.299, 0.587, 0.114)) for cell in cells]
        assert int(np.argmax(bright)) == int(np.argmax(one.heat))
        by_heat = np.array(bright)[np.argsort(one.heat)]
        assert (np.diff(by_heat) > -1).all()  # of whole numbers
        assert by_heat[-1] - by_heat[0] > 100  # a scale of its own


def test_there_are_lower_panels_only_where_something_is_remembered(host, images):
    pixels = np.full((32, 32, 3), GREY, np.uint8)
    cold = trace_patches(patchslim.slim(host, "tome", r=3), images, blocks=[3])[0]
    warm = trace_patches(slim_evo(host), images, blocks=[3])[0]
    height = draw_patches(pixels, cold).height
    assert (
        draw_patches(pixels, warm).height
        == draw_patches(pixels, [*cold, *warm]).height
        == 2 * height
    )
    assert (heat_panel(draw_patches(pixels, [*cold, *warm]), 1) == BACKGROUND).all()
    same = PatchMap(0, (4, 4), (Fate.SELF,) * 16, tuple(range(16)), heat=(0.5,) * 16)
    assert len(np.unique(heat_panel(draw_patches(pixels, [same]), 1).reshape(-1, 3), axis=0)) == 1


def test_captions_say_how_many_go_on_and_wait_and_fit_their_panels(host, images):
    (after,) = trace_patches(slim_evo(host), images, blocks=[3])[0]
    assert _caption(after) == "after block 3: 8 slow, 8 wait"
    long = PatchMap(11, (24, 24), (Fate.WAITING,) * 300 + (Fate.SELF,) * 276, tuple(range(576)))
    shown = np.asarray(draw_patches(np.full((176, 176, 3), GREY, np.uint8), [long])).astype(int)
    letters = np.abs(shown[-CAPTION_HEIGHT:] - BACKGROUND).max(axis=(0, 2)) > 30
    assert letters[176 + 8 + 40 : -40].any()
    assert not letters[150 : 176 + 8].any()


PYRAMID = {"embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (3, 2, 2)}


@pytest.mark.parametrize(
    ("kind", "method"), [(EvoLevit, "evo"), (Levit, "tome"), (Levit, "random")]
)
def test_in_a_pyramid_each_panel_has_the_grid_of_its_stage(kind, method):
    torch.manual_seed(0)
    host = kind(img_size=128, num_classes=5, **PYRAMID).eval()
    budget = {"r": [4, 4, 4, 0, 4, 4, 0, 1, 0]}
    if method == "evo":
        budget = {"keep_rate": 0.5, "at": (1, 4)}
    slim = patchslim.slim(host, method, **budget)
    images = torch.randn(2, 3, 128, 128)
    grids = [(8, 8)] * 3 + [(4, 4)] * 3 + [(2, 2)] * 3
    prefix = slim.plan.shape.prefix
    for image in trace_patches(slim, images, blocks=range(9)):
        assert [after.grid for after in image] == grids
        assert [after.left + prefix for after in image] == list(slim.counts())
        for after in image:
            cells = after.grid[0] * after.grid[1]
            assert len(after.into) == len(after.fate) == cells
            assert after.heat is None if method != "evo" else len(after.heat) == cells
            assert not after.waiting or after.slow + after.waiting == cells
    waiting = [after.waiting for after in image]
    assert waiting == ([0, 32, 32, 0, 8, 8, 0, 0, 0] if method == "evo" else [0] * 9)
    picture = draw_patches(np.full((128, 128, 3), GREY, np.uint8), image)
    assert picture.width == 10 * (256 + 8) - 8
    assert _caption(image[3], several=True) == "after block 3: 16 of 16 left"


def test_the_command_shows_what_waits(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (180, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    command = ["show", "test_vit", tmp_path / "cat.png", "--method", "evo"]
    command += ["--out", tmp_path / "slow.png"]
    ended = run_in_process(*command, "--keep-rate", 0.5, "--at", "2,4")
    assert ended.code == 0
    assert "after block 2: 50 patches slow, 50 wait\nafter block 4: 50 patches" in ended.out
    data = json.loads(run_in_process(*command, "--keep-rate", 0.5, "--at", "2,4", "--json").out)
    assert (data["left"], data["waiting"]) == ({"2": 51, "4": 51}, {"2": 50, "4": 50})
    with Image.open(tmp_path / "slow.png") as picture:
        shown = np.asarray(picture).astype(int)
    side = shown.shape[0] // 2 - CAPTION_HEIGHT
    assert shown.shape[1] == 3 * (side + 8) - 8
    image, panel = shown[:side, :side], shown[:side, side + 8 : 2 * side + 8]
    clear = (image == panel).all(axis=2).reshape(10, side // 10, 10, side // 10).all(axis=(1, 3))
    assert clear.sum() == 50
