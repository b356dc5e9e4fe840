"""Methods by their papers: published schedules, two methods in one block, r at named blocks."""

import pickle

import pytest
import timm
import torch

import patchslim
from patchslim.errors import BadSchedule, BadSetting, UnknownName
from patchslim.methods.diffrate import PUBLISHED
from patchslim.schedules.schedule import Removed
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
