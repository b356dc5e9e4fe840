"""Methods by their papers: published schedules, two methods in one block, r at named blocks."""

import math
import pickle
from dataclasses import replace

import pytest
import timm
import torch

import patchslim
from patchslim.errors import BadSchedule, BadSetting, UnknownName
from patchslim.methods.diffrate import PUBLISHED
from patchslim.methods.zerotprune import _rank
from patchslim.schedules.schedule import Rate, Removed
from patchslim.testing.trial import Trial, noise_images, tiny_host


@pytest.fixture(scope="module")
def deit():
    """Makes a DeiT-Ti without memory, of which only operations are counted."""
    with torch.device("meta"):
        return timm.create_model("deit_tiny_patch16_224")


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_schedule_costs_what_its_name_says(deit, preset):
    cost = patchslim.macs(deit, "diffrate", preset=preset)
    published = {"0.6": 0.655, "0.7": 0.726, "0.8": 0.809, "0.9": 0.902}
    assert cost.total / 1e9 == pytest.approx(published[preset], abs=1e-3)
    assert cost.rows == PUBLISHED[preset][1]


def test_a_published_schedule_takes_no_budget_and_no_other_host(deit):
    with pytest.raises(BadSchedule, match=r"brings the schedule .* macs asks for another"):
        patchslim.macs(deit, "diffrate", preset="0.9", macs=0.6)
    with pytest.raises(BadSchedule, match="made for 197 tokens"):
        patchslim.macs(tiny_host(), "diffrate", preset="0.9")
    with pytest.raises(UnknownName, match=r"preset of diffrate '0\.95'"):
        patchslim.macs(deit, "diffrate", preset="0.95")


def test_mctf_leaves_ten_tokens(deit):
    # The published trace of r=20: at most half of the patches go, and ten tokens stay.
    cost = patchslim.macs(deit, "mctf", r=20, at=range(1, 12))
    assert cost.rows[-3:] == (19, 10, 10)
    assert round(cost.total / 1e9, 3) == 0.590
    cost = patchslim.macs(deit, "mctf", r=16, at=range(1, 12))
    assert round(cost.total / 1e9, 3) == 0.697
    assert cost.rows == tuple(197 - 16 * block for block in range(12))


def test_idlevit_picks_anew_in_each_block_among_all_patches(deit):
    full = {"at": range(3, 12), "tail": "full"}
    cost = patchslim.macs(deit, "idlevit", keep_rate=0.7, **full)
    assert cost.rows == (197,) * 3 + (138,) * 3 + (97,) * 3 + (68,) * 3
    # Queries and keys are of all rows, also where as many go on as before.
    dense = patchslim.macs(deit, "idlevit", keep_rate=1.0, **full).total
    saved = 3 * sum((197 - n) * (10 * 192**2 + (197 + n) * 192) for n in (138, 97, 68))
    assert dense - cost.total == saved
    for share in (0.8, 0.65):
        assert patchslim.macs(deit, "idlevit", macs=share).total <= share * dense


def test_r_removes_at_the_named_blocks():
    slimmed = patchslim.slim(tiny_host(), "tome", r=3, at=(1, 2))
    assert slimmed.schedule == Removed((0, 3, 3))
    assert slimmed.counts() == (17, 14, 11)
    assert patchslim.slim(tiny_host(), "tome", r=2.5, at=(0, 2)).counts() == (14, 14, 12)
    with pytest.raises(BadSchedule, match="this host has blocks 0 to 2"):
        patchslim.slim(tiny_host(), "tome", r=3, at=(1, 3))
    with pytest.raises(BadSchedule, match="A list names every block"):
        patchslim.slim(tiny_host(), "tome", r=[1, 1, 1], at=(1, 2))


@torch.no_grad()
@pytest.mark.parametrize(("share", "alone"), [(0.0, "tome"), (1.0, "topk")])
def test_a_sequence_with_all_of_the_share_is_one_of_its_methods(share, alone):
    host, x = tiny_host(), noise_images()
    both = patchslim.slim(host, "topk+tome", r=3, share=share)
    # Proportional attention is on in either case, and does nothing where all sizes are one.
    assert torch.allclose(both(x), patchslim.slim(host, alone, r=3)(x), atol=1e-6)


@torch.no_grad()
def test_a_sequence_drops_first_and_merges_the_rest():
    trial = Trial(patchslim.find_method("topk+tome")(share=0.25), 16)
    scene = trial.scene()
    after = trial.decide(scene, 12)
    kept = scene.signals.class_attention().topk(15, dim=1).indices
    for image in range(3):
        dropped = (after.origin[image] < 0).nonzero().flatten().tolist()
        assert dropped == sorted(set(range(16)) - set(kept[image].tolist()))
    assert (after.sizes().sum(dim=1) == 15).all()


def test_a_sequence_is_saved_pickled_and_named(tmp_path):
    slimmed = patchslim.slim(tiny_host(), "topk+tome", r=3, share=0.3)
    wanted = slimmed(noise_images())
    slimmed.save(tmp_path / "saved")
    again = patchslim.load(tmp_path / "saved", model=tiny_host())
    assert repr(again.method) == "topk+tome(share=0.3)"
    assert torch.equal(again(noise_images()), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(slimmed))(noise_images()), wanted)


def test_a_sequence_of_what_does_not_fit_is_refused():
    for name in ("topk+dynamicvit", "ats+tome", "mctf+tome", "identity+tome"):
        with pytest.raises(BadSetting, match="a sequence is of two methods"):
            patchslim.find_method(name)
    with pytest.raises(UnknownName, match="names 3 methods"):
        patchslim.find_method("topk+tome+evit")
    with pytest.raises(UnknownName, match=r"'tomme'\. Did you mean 'tome'"):
        patchslim.find_method("topk+tomme")


def groups(reduction):
    """Lists for the first image each row that stays, with the rows that join it."""
    pairs = list(zip(reduction.gone[0].tolist(), reduction.into[0].tolist(), strict=True))
    kept = reduction.kept[0].tolist()
    return [(row, [gone for gone, into in pairs if into == i]) for i, row in enumerate(kept)]


@torch.no_grad()
def test_tps_squeezes_rows_by_the_exponent_of_their_cosine():
    trial = Trial(patchslim.find_method("tps")(), 16)
    scene = trial.scene()
    after = trial.decide(scene, 6)
    x = scene.tokens.x[0, 1:]
    for place, (row, joined) in enumerate(
        groups(trial.method.choose(scene.tokens, scene.signals, 6))
    ):
        like = [torch.cosine_similarity(x[each], x[row], dim=0).exp() for each in joined]
        total = math.e * x[row] + sum(w * x[each] for w, each in zip(like, joined, strict=True))
        wanted = total / (math.e + sum(like))
        torch.testing.assert_close(after.x[0, 1 + place], wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_ppt_merges_or_prunes_each_image_by_itself():
    host, x = tiny_host(), noise_images()
    merged = patchslim.slim(host, "ppt", r=3, threshold=1.0)
    assert torch.allclose(merged(x), patchslim.slim(host, "tome", r=3)(x), atol=1e-6)
    trial = Trial(patchslim.find_method("ppt")(), 16)
    scene = trial.scene()

    def count_merged(threshold):
        trial.method.threshold = threshold
        stand_for = trial.decide(scene, 10).sizes().sum(dim=1)
        assert ((stand_for == 10) | (stand_for == 16)).all()
        return int((stand_for == 16).sum())

    merged = [count_merged(threshold) for threshold in torch.logspace(-5, 0, 100).tolist()]
    assert merged == sorted(merged)
    assert set(merged) == {0, 1, 2, 3}


@torch.no_grad()
def test_tofu_drops_early_and_keeps_the_longest_norm_late():
    trial = Trial(patchslim.find_method("tofu")(), 16)
    scene = trial.scene()
    early = replace(scene.signals, block=6, depth=12)
    late = replace(scene.signals, block=7, depth=12)
    dropped = trial.method.choose(scene.tokens, early, 10).apply(scene.tokens)
    assert (dropped.origin < 0).sum() == 3 * 6
    merging = trial.method.choose(scene.tokens, late, 10)
    assert torch.equal(merging.apply(scene.tokens).cells(), dropped.cells())
    x, after = scene.tokens.x[0, 1:], merging.apply(scene.tokens).x[0, 1:]
    for place, (row, joined) in enumerate(groups(merging)):
        rows = x[[row, *joined]]
        mean = rows.mean(dim=0)
        wanted = mean / mean.norm() * rows.norm(dim=1).max()
        torch.testing.assert_close(after[place], wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_gtp_adds_dropped_rows_to_their_neighbours_by_degree():
    trial = Trial(patchslim.find_method("gtp")(alpha=0.5), 16)
    scene = trial.scene()
    after = trial.decide(scene, 10)
    x, kept = scene.tokens.x[0, 1:], after.cells()[0].tolist()
    links = {
        a: [b for b in range(16) if a != b and max(abs(a // 4 - b // 4), abs(a % 4 - b % 4)) == 1]
        for a in range(16)
    }
    assert sorted({len(near) for near in links.values()}) == [3, 5, 8]
    for place, row in enumerate(kept):
        wanted = x[row].clone()
        for near in set(links[row]) - set(kept):
            wanted += 0.5 * x[near] / math.sqrt(len(links[row]) * len(links[near]))
        torch.testing.assert_close(after.x[0, 1 + place], wanted, rtol=1e-5, atol=1e-5)


def test_votes_of_zerotprune_settle_at_the_eigenvector_of_the_attention_graph():
    noise = torch.Generator().manual_seed(3)
    attention = torch.randn(1, 1, 9, 9, generator=noise).softmax(dim=3)
    rank = _rank(attention, torch.ones(1, 9), prefix=1, rounds=200)[0]
    values, vectors = torch.linalg.eig(attention[0, 0].T)
    settled = vectors[:, values.real.argmax()].real[1:]
    torch.testing.assert_close(rank, settled / settled.mean(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_representation_shift_measures_what_attention_adds():
    host, x = tiny_host(), noise_images()
    slimmed = patchslim.slim(host, "representation_shift", schedule=Rate(0.5, (1,)))
    entering = host.blocks[:1](host.norm_pre(host._pos_embed(host.patch_embed(x))))
    block = host.blocks[1]
    added = block.ls1(block.attn(block.norm1(entering)))[:, 1:].norm(dim=2)
    assert torch.equal(slimmed.trace(x)[1].cells(), added.topk(8, dim=1).indices)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (7, 5)])
def test_algm_merges_the_most_even_squares_whole(grid):
    trial = Trial(patchslim.find_method("algm")(), 16)
    scene = trial.scene(grid)
    unit = torch.nn.functional.normalize(scene.tokens.x[0, 1:], dim=1)
    squares = {}
    for cell in range(grid[0] * grid[1]):
        square = (cell // grid[1] // 2, cell % grid[1] // 2)
        squares.setdefault(square, []).append(cell)

    def evenness(cells):
        pairs = [float(unit[a] @ unit[b]) for a in cells for b in cells if a != b]
        return sum(pairs) / max(len(pairs), 1)

    best = sorted(squares.values(), key=evenness, reverse=True)[:2]
    going = sum(len(cells) - 1 for cells in best)
    merging = trial.method.choose(scene.tokens, scene.signals, scene.tokens.patches - going)
    assert [sorted([row, *joined]) for row, joined in groups(merging) if joined] == sorted(best)
