"""Learned methods by their papers: what their new rows are made of, in training and after it."""

import pytest
import torch

import patchslim
import patchslim.methods.dtem as dtem
from patchslim.errors import BadSetting, Untrained
from patchslim.methods import Decision
from patchslim.methods.spvit import SPViT
from patchslim.schedules.schedule import Counts
from patchslim.testing.law import check_law
from patchslim.testing.method_laws import (
    every_parameter_learns,
    leaves_exactly_the_scheduled_count,
    macs_are_what_it_spends,
)
from patchslim.testing.trial import Trial, noise_images, tiny_host
from patchslim.tokens.mixing import MaskAndFuse, Mix
from patchslim.tokens.reduction import Fuse
from patchslim.tokens.tokens import Tokens
from patchslim.training.config import TrainConfig
from patchslim.training.train import train
from tiny_training import make_batches, trainable_vit
from toy_methods import slim_unchecked

SLOTS = ("patchmerger", "tokenlearner", "sinkhorn", "sit")
LEARNED = (*SLOTS, "dtem", "spvit")
pytestmark = pytest.mark.filterwarnings("ignore::patchslim.errors.Untrained")


def scene_of(name, **settings):
    trial = Trial(patchslim.find_method(name)(**settings), 16)
    scene = trial.scene()
    return trial, scene, scene.tokens.x[:, 1:]


@torch.no_grad()
def test_patchmerger_asks_learned_queries_of_normalised_patches():
    trial, scene, x = scene_of("patchmerger")
    layers = trial.method.learned["0"]
    normed = (x - x.mean(dim=2, keepdim=True)) / (
        x.var(dim=2, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    for keep in (5, 9):
        share = (layers.queries[:keep] @ normed.transpose(1, 2)).softmax(dim=2)
        torch.testing.assert_close(trial.decide(scene, keep).x[:, 1:], share @ x)


@torch.no_grad()
def test_tokenlearner_weighs_patches_by_maps_that_add_up_to_one():
    trial, scene, x = scene_of("tokenlearner")
    layers = trial.method.learned["0"]
    maps = layers.slots(torch.nn.functional.gelu(layers.hidden(layers.norm(x)))).softmax(dim=1)
    assert maps.shape == (3, 16, 196)
    torch.testing.assert_close(trial.decide(scene, 6).x[:, 1:], maps[:, :, :6].transpose(1, 2) @ x)


@torch.no_grad()
def test_sit_weighs_patches_by_a_module_of_half_the_channels_and_a_temperature():
    trial, scene, x = scene_of("sit")
    layers = trial.method.learned["0"]
    assert layers.hidden.out_features == x.shape[2] // 2
    layers.scale.fill_(3.0)
    logits = layers.slots(torch.nn.functional.gelu(layers.hidden(layers.norm(x))))
    share = (3 * logits[:, :, :6]).softmax(dim=1).transpose(1, 2)
    torch.testing.assert_close(trial.decide(scene, 6).x[:, 1:], share @ x)


@torch.no_grad()
def test_sinkhorn_shares_all_patches_out_evenly():
    trial, scene, _ = scene_of("sinkhorn", rounds=50, epsilon=0.1)
    share = trial.method.choose(scene.tokens, scene.signals, 4).share
    torch.testing.assert_close(share.sum(dim=2), torch.ones(3, 4))
    torch.testing.assert_close(share.sum(dim=1), torch.full((3, 16), 4 / 16), rtol=1e-3, atol=1e-4)


def test_a_schedule_that_leaves_more_than_there_are_slots_is_refused():
    with pytest.raises(
        BadSetting, match=r"has 9 slots.* leaves 11 patches in block 0. Give slots=11"
    ):
        patchslim.slim(tiny_host(), "patchmerger", keep=[12, 8, 8], slots=9)


@torch.no_grad()
@pytest.mark.parametrize("name", LEARNED)
def test_a_saved_one_comes_back_with_its_layers_and_only_slim_warns(name, tmp_path, recwarn):
    settings = {"slots": 20} if name in SLOTS else {}
    slimmed = patchslim.slim(tiny_host(), name, keep=[13, 9, 9], **settings)
    for parameter in slimmed.method.parameters():
        parameter.add_(torch.randn_like(parameter))
    slimmed.save(tmp_path / "saved")
    again = patchslim.load(tmp_path / "saved", model=tiny_host())
    assert torch.equal(again(noise_images()), slimmed(noise_images()))
    assert [each.category for each in recwarn] == [Untrained]


@torch.no_grad()
def test_dtem_in_training_is_dtem_if_it_hardly_spreads(monkeypatch):
    monkeypatch.setattr(dtem, "TEMPERATURE", 1e-4)
    trial, scene, _ = scene_of("dtem")
    for keep in (15, 11, 8):
        hard = trial.decide(scene, keep)
        trial.method.train()
        soft = trial.decide(scene, keep)
        trial.method.eval()
        assert torch.equal(soft.cells(), hard.cells())
        assert torch.equal(soft.origin, hard.origin)
        assert torch.equal(soft.sizes(), hard.sizes())
        torch.testing.assert_close(soft.x, hard.x, rtol=1e-3, atol=1e-3)


def test_a_relaxed_choice_of_the_best_adds_up_and_passes_gradients():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.45]], requires_grad=True)
    chosen = dtem._relaxed_top(scores, 2)
    assert chosen.sum().item() == pytest.approx(2)
    assert chosen.argsort(descending=True).tolist() == [[0, 2, 3, 1]]
    assert ((chosen > 0) & (chosen < 1)).all()
    chosen[0, 2].backward()
    assert scores.grad[0, 2] > 0 > scores.grad[0, 3]


class PacksGiven(SPViT):
    """Packs the given rows by the given shares, by a mask or by removal."""

    def __init__(self, goes, share):
        super().__init__()
        self.goes, self.share = goes, share

    def choose(self, tokens, signals, keep):
        if self.training:
            return MaskAndFuse((~self.goes).float(), self.share)
        return Fuse((~self.goes).nonzero()[:, 1].view(len(self.goes), keep - 1), self.share)


@torch.no_grad()
@pytest.mark.parametrize("readout", ["class", "average"])
def test_spvit_masks_in_training_what_it_packs_after_it(readout):
    goes = torch.zeros(3, 16, dtype=torch.bool)
    goes[0, :6] = goes[1, 5:11] = goes[2, ::3] = True
    share = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) * goes
    method = PacksGiven(goes, share / share.sum(dim=1, keepdim=True))
    prefix = int(readout == "class")
    left = Counts((16 + prefix, 11 + prefix, 11 + prefix), 16 + prefix, prefix)
    model = slim_unchecked(tiny_host(readout=readout), method, left)
    packed, masked = model.eval()(noise_images()), model.train()(noise_images())
    torch.testing.assert_close(masked, packed, rtol=1e-4, atol=1e-4)


class Repeats(SPViT):
    """Draws in training, and notes what; removes the same rows after it."""

    def __init__(self, drawing):
        super().__init__()
        self.selectors = drawing.selectors
        self.drawn, self.rows = [], None

    def choose(self, tokens, signals, keep):
        if self.training:
            self.drawn.append(super().choose(tokens, signals, keep))
            return self.drawn[-1]
        if self.rows is None:
            self.rows, self.left = list(range(tokens.patches)), list(self.drawn)
        mask = self.left.pop(0)
        kept = [i for i, row in enumerate(self.rows) if mask.alive[0, row] == 1]
        share = mask.share[:, self.rows]
        self.rows = [*(self.rows[i] for i in kept), mask.alive.shape[1]]
        return Fuse(torch.tensor([kept]), share)


@torch.no_grad()
def test_spvit_may_pack_a_package():
    """What is drawn in two blocks is masked in training as it would be removed."""
    host, packed = tiny_host(), set()
    for seed in range(6):
        torch.manual_seed(seed)
        method = Repeats(slim_unchecked(host, SPViT(), Counts((14, 10, 10), 17, 1)).method)
        for selector in method.selectors.values():
            torch.nn.init.zeros_(selector.predictor.verdict[4].bias)  # half of all is dropped
        x = noise_images(1)
        model = slim_unchecked(host, method, Counts((14, 10, 10), 17, 1)).train()
        masked = model(x)
        first, second = method.drawn
        packed.add(bool(second.share[0, -1] > 0))
        left = first.alive.sum() + 2, (torch.cat([first.alive, torch.ones(1, 1)], 1) * second.alive)
        counts = (int(left[0]), int(left[1].sum()) + 2, int(left[1].sum()) + 2)
        removed = slim_unchecked(host, method, Counts(counts, 17, 1)).eval()
        torch.testing.assert_close(masked, removed(x), rtol=1e-3, atol=1e-3)
    assert packed == {True, False}


def test_the_package_is_masked_while_nothing_is_packed():
    x = torch.randn(2, 5, 4)
    drawn = torch.tensor([[1.0, 1, 1, 1], [1, 0, 1, 1]])
    share = torch.tensor([[0.0, 0, 0, 0], [0, 1, 0, 0]])
    after = MaskAndFuse(drawn, share).apply(Tokens(x=x, prefix=1, grid=(2, 2)).with_origin())
    assert after.alive.tolist() == [[1, 1, 1, 1, 0], [1, 0, 1, 1, 1]]
    assert torch.equal(after.x[1, 5], x[1, 2])
    assert after.cells().tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 1]]
    assert after.size.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "law", [macs_are_what_it_spends, every_parameter_learns, leaves_exactly_the_scheduled_count]
)
def test_spvit_keeps_the_laws_with_several_heads(law):
    check_law(law, Trial(SPViT().eval(), 128), "SPViT")


def test_the_loss_of_spvit_does_not_count_packages():
    alive = torch.tensor([[1.0, 1, 0, 0, 1], [1, 0, 0, 0, 1]])
    later = torch.tensor([[1.0, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]])
    decisions = [Decision(1, 0.75, alive), Decision(2, 0.5, later)]
    by_hand = ((0.75 - 3 / 4) ** 2 + (0.75 - 2 / 4) ** 2 + (0.5 - 3 / 4) ** 2) / 4
    assert SPViT(ratio=3.0).loss(decisions).item() == pytest.approx(3 * by_hand)


def test_the_host_does_not_learn_by_what_dtem_compares():
    trial, scene, _ = scene_of("dtem")
    entered = scene.signals.entered.requires_grad_()
    made = trial.method.train().choose(scene.tokens, scene.signals, 11)
    made.apply(scene.tokens).x.square().sum().backward()
    assert entered.grad is None
    assert trial.method.embeddings["0"].weight.grad.any()


def all_learned():
    """Lists the learned methods; of those that only score slots in another way, one is quick."""
    for name in LEARNED:
        slow = name in SLOTS and name != "tokenlearner"
        yield pytest.param(name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("name", list(all_learned()))
def test_training_is_the_engines_and_lowers_the_loss_of_a_batch(name, tmp_path):
    slimmed = patchslim.slim(trainable_vit(), name, keep_rate=0.6, at=(1,))
    shown = make_batches() * 2
    config = TrainConfig(steps=12, batch=4, lr=3e-3, warmup=0.0)
    before = torch.nn.functional.cross_entropy(slimmed(shown[0][0]), shown[0][1])
    trained = train(slimmed, shown, config, out=tmp_path).model
    after = torch.nn.functional.cross_entropy(trained(shown[0][0]), shown[0][1])
    assert after < 0.9 * before
    moved = zip(slimmed.method.parameters(), trained.method.parameters(), strict=True)
    assert all(not torch.equal(one, other) for one, other in moved)


@torch.no_grad()
def test_rounding_does_not_say_with_which_new_row_an_old_one_stands():
    share = torch.tensor([[[1.0, 1e-42, 0.3, 0.0], [1.0, 1e-9, 0.4, 0.0], [0.9, 0.5, 0.3, 1e-8]]])
    off = share * (1 - 1e-6 * torch.rand(share.shape, generator=torch.Generator().manual_seed(0)))
    for each in (share, off, torch.where(share < 1e-38, 0.0, share)):
        mixed = Mix.of_slots(each)
        assert mixed.to.tolist() == [[0, 2, 1, 0]]
        assert mixed.lead.tolist() == [[0, 2, 1]]
