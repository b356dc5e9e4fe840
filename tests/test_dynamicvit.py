"""`dynamicvit`: masking in training is removing at inference, and all of it learns.

Every host has 64 patches and decides three times, each time among those that are left.
"""

import copy
import pickle
from contextlib import contextmanager
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import patchslim
import patchslim.tokens.attention
from patchslim.errors import BadSetting, Untrained
from patchslim.methods import Decision
from patchslim.methods.dynamicvit import KEEP_INDEX, DynamicViT
from patchslim.model.training_pass import forward_training
from patchslim.schedules.schedule import Constant, Counts, Rate
from patchslim.testing.trial import noise_images, tiny_host
from patchslim.tokens.reduction import Keep, Mask
from patchslim.training.losses import answer_loss
from toy_methods import slim_unchecked

AT = (1, 2, 3)
STAGES = Rate(0.7, AT)
LEFT = (44, 31, 21)  # the whole parts of 64 times 0.7, 0.49, 0.343
READOUTS = ("class", "average", "query")
every_readout = pytest.mark.parametrize("readout", READOUTS)
every_tail = pytest.mark.parametrize("tail", ["exact", "full"])


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def images(dtype=torch.float32, batch=3):
    return noise_images(batch, size=32).to(dtype)


def taught(readout="class", *, tail="full", dtype=torch.float32, **changes):
    """Makes a model whose predictors score patches differently, as if they had been trained."""
    host = tiny_host(img_size=32, depth=4, readout=readout, **changes)
    model = slim_unchecked(host, DynamicViT(), STAGES, tail)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.method.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return model.to(dtype).eval()


class KeepsGiven(DynamicViT):
    """Keeps the given cells, a mask (B, n) for each block, by Mask or Keep.

    Its predictors run all the same.
    """

    def __init__(self, taught, stays, kind):
        super().__init__()
        self.predictors = taught.predictors
        self.stays, self.kind = stays, kind

    def choose(self, tokens, signals, keep):
        self.predictors[str(signals.block)](tokens.x[:, tokens.prefix :], tokens.alive)
        stays = self.stays[signals.block].gather(1, tokens.cells())
        if self.kind is Mask:
            return Mask(stays.to(tokens.x.dtype))
        assert (stays.sum(dim=1) == keep).all()
        return Keep(stays.nonzero()[:, 1].view(len(stays), keep))


def slim_by_masks(model, stays, kind, schedule=STAGES):
    return slim_unchecked(
        model.host, KeepsGiven(model.method, stays, kind), schedule, model.plan.tail
    )


@contextmanager
def heard(model):
    """Records what the predictors say within the block, in the order of the blocks."""
    said = []
    hooks = [
        predictor.register_forward_hook(lambda _module, _given, got: said.append(got))
        for predictor in model.method.predictors.values()
    ]
    yield said
    for hook in hooks:
        hook.remove()


def close(got, wanted, off=None):
    off = off or (2e-5 if got.dtype == torch.float32 else 2e-6)
    torch.testing.assert_close(got, wanted, rtol=off, atol=off)


def rows(x, stays):
    """Picks, of the last rows of one image, those of the cells that stay."""
    return x[:, x.shape[1] - stays.shape[1] :][stays]


def check_draws(model, x, off=None):
    """Checks that evaluation removes the patches that training masks, image by image."""
    torch.manual_seed(0)
    with heard(model) as masked:
        output = forward_training(model.train(), x, tail=model.plan.tail)
    stays = {each.block: each.alive > 0.5 for each in output.decisions}
    counts = torch.stack([each.sum(dim=1) for each in stays.values()], dim=1)
    assert list(stays) == list(AT)
    assert (counts[0] != counts[1]).any(), "the test needs images that keep different numbers"
    assert (counts > 0).all()
    prefix = output.tokens.prefix
    for i in range(len(x)):
        left = Counts((64 + prefix, *(counts[i] + prefix).tolist()), 64 + prefix, prefix)
        own = {block: each[i : i + 1] for block, each in stays.items()}
        removed = slim_by_masks(model, own, Keep, left).eval()
        with heard(removed) as said:
            alone = forward_training(removed, x[i : i + 1], tail=model.plan.tail)
        close(output.output[i : i + 1], alone.output, off)
        before = torch.ones(1, 64, dtype=torch.bool)
        for block, wanted, got in zip(AT, said, masked, strict=True):
            close(rows(got[i : i + 1], before), wanted.flatten(0, 1), off)
            before = own[block]
        if output.tokens.x.shape[1] > 1:
            rest = output.tokens.x[i : i + 1, prefix:]
            close(rows(rest, before), alone.tokens.x[0, prefix:], off)


@torch.no_grad()
@every_readout
@every_tail
def test_masks_drawn_in_training_are_removal(readout, tail, dtype):
    check_draws(taught(readout, tail=tail, dtype=dtype), images(dtype))


@torch.no_grad()
@every_readout
@every_tail
def test_removal_at_inference_is_a_mask_in_training(readout, tail, dtype):
    model, x = taught(readout, tail=tail, dtype=dtype), images(dtype)
    with heard(model) as removed:
        wanted = model(x)
    cells = dict(zip(AT, [tokens.cells() for tokens in model.trace(x)][1:], strict=True))
    assert [each.shape[1] for each in cells.values()] == list(LEFT)
    nothing = torch.zeros(3, 64, dtype=torch.bool)
    stays = {block: nothing.scatter(1, each, value=True) for block, each in cells.items()}
    soft = slim_by_masks(model, stays, Mask).train()
    with heard(soft) as masked:
        close(soft(x), wanted)
    before = torch.arange(64).expand(3, -1)
    for block, got, each in zip(AT, masked, removed, strict=True):
        close(got.gather(1, before.unsqueeze(2).expand_as(each)), each)
        before = cells[block]


@torch.no_grad()
@every_readout
def test_masking_differs_from_removal_only_by_the_faint_weight_of_masked_rows(readout, monkeypatch):
    monkeypatch.setattr(patchslim.tokens.attention, "SOFT_MASK_EPS", 1e-13)
    check_draws(taught(readout, dtype=torch.float64), images(torch.float64), off=1e-11)


def missing(module, prefix=""):
    """Lists parameters that got no gradient, or only zeros, or one that is not finite."""
    return {
        prefix + name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
    }


@every_readout
@every_tail
def test_the_answer_loss_alone_trains_every_predictor_and_the_whole_host(readout, tail):
    model, x = taught(readout, tail=tail), images()
    teacher = model.host(x).detach() + torch.randn(3, 5)
    output = forward_training(model.train(), x, tail=tail)
    answer_loss(output.output, teacher, "soft", 1.0).backward()
    assert not missing(model.method)
    assert not missing(model.host)


@every_readout
def test_the_share_loss_alone_trains_every_predictor_and_the_tokens_it_reads(readout):
    model = taught(readout)
    output = forward_training(model.train(), images(), tail="full")
    model.method.loss(output.decisions).backward()
    assert not missing(model.method)
    unseen = {
        name
        for name, _ in model.host.named_parameters()
        if name.startswith(("blocks.3.", "norm.", "fc_norm.", "attn_pool.", "head."))
    }
    assert missing(model.host) == unseen


def test_the_loss_is_the_squared_distance_from_the_scheduled_share():
    alive = [[[1, 1, 0, 1], [1, 0, 0, 0]], [[1, 0, 0, 1], [0, 0, 0, 0]]]
    shares = (0.7, 0.5)
    by_hand = 0.0
    for share, batch in zip(shares, alive, strict=True):
        for image in batch:
            by_hand += (share - sum(image) / 4) ** 2 / 2 / 2  # mean over images, and over stages
    decisions = [
        Decision(block, share, torch.tensor(each, dtype=torch.float32))
        for block, share, each in zip((1, 2), shares, alive, strict=True)
    ]
    assert DynamicViT().loss(decisions).item() == pytest.approx(2 * by_hand)
    assert DynamicViT(ratio=10).loss(decisions).item() == pytest.approx(10 * by_hand)
    assert DynamicViT().loss([Decision(1, 0.5, None)]) is None


def test_the_share_that_is_aimed_at_is_the_one_that_inference_leaves():
    output = forward_training(taught().train(), images(), tail="full")
    assert [each.share for each in output.decisions] == [left / 64 for left in LEFT]


@pytest.mark.slow
def test_gradient_descent_on_the_share_reaches_it():
    model, x = taught(), images(batch=8)
    optimiser = torch.optim.Adam(model.method.parameters(), lr=0.03)
    torch.manual_seed(0)
    shares = []
    for _ in range(60):
        output = forward_training(model.train(), x, tail="full")
        optimiser.zero_grad()
        model.method.loss(output.decisions).backward()
        optimiser.step()
        shares.append([each.alive.mean().item() for each in output.decisions])
    for stage, left in enumerate(LEFT):
        late = sum(each[stage] for each in shares[-10:]) / 10
        assert late == pytest.approx(left / 64, abs=0.08)


@torch.no_grad()
def test_the_published_counts_come_out():
    host = tiny_host(img_size=56, depth=12)
    model = slim_unchecked(host, DynamicViT(), Rate(0.7, (3, 6, 9)))
    left = [tokens.patches for tokens in model.trace(noise_images(2, size=56))]
    assert left == [196] * 3 + [137] * 3 + [96] * 3 + [67] * 3


@torch.no_grad()
def test_before_training_most_patches_are_kept():
    """Training begins near the dense model: sigmoid(2), 0.88, of those that are left."""
    host = tiny_host(img_size=32, depth=4)
    torch.manual_seed(0)
    model = slim_unchecked(host, DynamicViT(), STAGES).train()
    output = forward_training(model, images(batch=8), tail="full")
    share = output.decisions[0].alive.mean().item()
    assert share == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=0.06)


POOLED = [{"global_pool": "max"}, {"global_pool": "avgmax"}]


@pytest.mark.parametrize("changes", [*({"readout": each} for each in READOUTS), *POOLED], ids=str)
def test_an_image_of_which_nothing_is_left_stays_finite(changes):
    model = taught(**changes)
    for predictor in model.method.predictors.values():
        nn.init.zeros_(predictor.verdict[4].weight)
        predictor.verdict[4].bias.data = torch.tensor([-40.0, 40.0])
    output = forward_training(model.train(), images(), tail="full")
    assert not any(each.alive.any() for each in output.decisions)
    assert output.output.isfinite().all()
    (output.output.square().sum() + model.method.loss(output.decisions)).backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    assert gradients
    assert all(each.isfinite().all() for each in gradients)


def in_autocast(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model, forward_training(model, x, tail="full")


def in_bfloat16(model, x):
    return model.bfloat16(), forward_training(model, x.bfloat16(), tail="full")


@every_readout
@pytest.mark.parametrize("how", [in_autocast, in_bfloat16])
def test_training_in_half_precision_stays_finite_and_counts_exactly(readout, how):
    model, output = how(taught(readout).train(), images())
    wanted = model.method.loss(output.decisions)
    counts = [each.alive.double().sum(dim=1) for each in output.decisions]
    by_hand = [
        (left / 64 - count / 64).square().mean() for left, count in zip(LEFT, counts, strict=True)
    ]
    assert wanted.item() == pytest.approx(2 * torch.stack(by_hand).mean().item(), rel=1e-4)
    (output.output.float().square().mean() + wanted.float()).backward()
    assert output.output.isfinite().all()
    assert not missing(model.method)


def drawn(model, seed):
    torch.manual_seed(seed)
    return [each.alive for each in forward_training(model.train(), images(), tail="full").decisions]


@torch.no_grad()
def test_the_same_seed_draws_the_same():
    model = taught()
    first, again, other = drawn(model, 0), drawn(model, 0), drawn(model, 1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_what_is_dropped_once_stays_dropped():
    alive = drawn(taught(), 0)
    for before, after in pairwise(alive):
        assert (after <= before + 1e-6).all()
        assert after.sum() < before.sum()


def test_blocks_that_are_computed_again_draw_the_same():
    gradients = []
    for recompute in (False, True):
        model = taught()
        model.host.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        output = forward_training(model.train(), images(), tail="full")
        (output.output.square().sum() + model.method.loss(output.decisions)).backward()
        gradients.append([each.grad for each in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


def plain():
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **settings).eval()


@torch.no_grad()
def test_copies_and_saves_keep_the_predictors_and_only_slim_warns(tmp_path, recwarn):
    model = patchslim.slim(plain(), "dynamicvit", keep_rate=0.7, at=AT)
    assert [each.category for each in recwarn] == [Untrained]
    for parameter in model.method.parameters():
        parameter.add_(torch.randn_like(parameter))
    wanted = model(images())
    model.save(tmp_path / "saved")
    for again in (
        patchslim.load(tmp_path / "saved"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(again(images()), wanted)
        assert list(again.method.predictors) == ["1", "2", "3"]
    assert len(recwarn) == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::patchslim.errors.Untrained")
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_predictors_are_made_of_the_type_of_the_host(kind):
    model = patchslim.slim(plain().to(kind), "dynamicvit", keep_rate=0.7, at=AT)
    assert {each.dtype for each in model.method.parameters()} == {kind}
    assert model(images(kind)).isfinite().all()


@pytest.mark.filterwarnings("ignore::patchslim.errors.Untrained")
def test_a_made_method_serves_only_the_hosts_that_it_was_made_for():
    mine = DynamicViT()
    patchslim.slim(plain(), mine, keep_rate=0.7, at=AT)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    own = r"a Predictor for 32 channels in blocks \(1, 2, 3\)"
    with pytest.raises(BadSetting, match=rf"{own}.* 16 channels"):
        patchslim.slim(tiny_host(img_size=32, depth=4), mine, keep_rate=0.7, at=AT)
    with pytest.raises(BadSetting, match=rf"{own}.*blocks \(0, 2\)"):
        patchslim.slim(plain(), mine, keep_rate=0.7, at=(0, 2))
    patchslim.slim(plain(), mine, keep_rate=0.5, at=(1, 3))
    assert before.keys() == mine.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


@torch.no_grad()
def test_larger_images_that_need_more_decisions_are_refused_clearly():
    host = tiny_host(img_size=8, depth=3, dynamic_img_size=True)
    model = slim_unchecked(host, DynamicViT(), Constant(3))
    assert model.plan.decision_blocks == (0,)
    with pytest.raises(BadSetting, match=r"in blocks \(0,\).*decisions in blocks \(1,\)"):
        model(images())


@torch.no_grad()
def test_the_entry_that_means_keep_is_the_first():
    model = taught()
    with heard(model) as said:
        cells = model.trace(images())[1].cells()
    best = said[0][..., KEEP_INDEX].topk(LEFT[0], dim=1).indices
    assert KEEP_INDEX == 0
    assert torch.equal(cells, best)
    torch.testing.assert_close(said[0].exp().sum(dim=2), torch.ones(3, 64))


def test_an_untrained_method_warns_once():
    class Own(DynamicViT):
        missing = None

    with pytest.warns(Untrained, match="Own learns what to keep"):
        patchslim.slim(tiny_host(depth=4), Own(), keep=[17, 10, 10, 10])
