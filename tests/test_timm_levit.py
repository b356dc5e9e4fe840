"""LeViT and Evo-LeViT: a pyramid as one row of blocks, its biases, its strides, and any method."""

from itertools import pairwise

import pytest
import timm
import torch
from timm.models.levit import Levit, LevitDistilled
from torch import nn

import patchslim
from patchslim.architectures.evo_levit import EvoLevit
from patchslim.errors import BadSchedule, UnsupportedModel, WrongInput
from patchslim.hosts.timm_levit import TimmLevit
from patchslim.model.load import load
from patchslim.schedules.schedule import Constant, Rate
from patchslim.testing.counting import count_macs
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import Keep
from patchslim.tokens.tokens import Tokens
from timm_variants import randomise
from toy_methods import (
    HardMask,
    KeepAboveMean,
    KeepLongest,
    KeepLongestBefore,
    KeepLongestOnQueries,
    MergeShortest,
    MergeShortestBefore,
    MergeShortestOnMap,
    MergeShortestOnQueries,
    Predictor,
    slim_unchecked,
)

GRIDS = ((5, 7), (3, 4), (2, 2))  # neither square nor even
TINY = {
    "img_size": (80, 112),
    "embed_dim": (16, 24, 32),
    "key_dim": 4,
    "num_heads": (2, 3, 4),
    "depth": (2, 1, 2),
    "num_classes": 7,
}
STRIDES = (2, 4)  # of the seven blocks
AFTER = Rate(0.5, (1, 3, 5))
HOSTS = (Levit, LevitDistilled, EvoLevit)
every_host = pytest.mark.parametrize("kind", HOSTS, ids=lambda kind: kind.__name__)
TOYS = (
    KeepLongest,
    KeepLongestBefore,
    KeepLongestOnQueries,
    MergeShortest,
    MergeShortestBefore,
    MergeShortestOnMap,
    MergeShortestOnQueries,
    KeepAboveMean,
)
every_toy = pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.__name__)


def host(kind=Levit, **changes):
    """Makes a small host, of whose parts and running statistics none can be left out unnoticed.

    It is in float64, since such weights magnify rounding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = kind(**{**TINY, **changes})
    randomise(model)
    return model.double().eval()


def images(batch=2, *, side=(80, 112), seed=1, dtype=torch.float64):
    return torch.randn(batch, 3, *side, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got, wanted, within=1e-9):
    torch.testing.assert_close(got, wanted, rtol=within, atol=within)


# ----------------------------------------------------------------------------------------- the laws


@every_host
@torch.no_grad()
def test_nothing_removed_is_the_host(kind):
    model = host(kind)
    same(patchslim.slim(model, "identity")(images()), model(images()))
    one = images(dtype=torch.float32)
    torch.testing.assert_close(
        slim_unchecked(model.float(), patchslim.find_method("identity")(), Constant(0))(one),
        model(one),
        rtol=1e-4,
        atol=1e-4,
    )


# --------------------------------------------------------------------------------------- refusals


class Other(Levit):
    """LeViT with a forward pass of its own."""

    def forward_features(self, x):
        return super().forward_features(x) + 1


def fused():
    model = host()
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if hasattr(part, "fuse"):
                setattr(module, name, part.fuse())
    return model


def pooled():
    model = host()
    down = model.stages[1].downsample.attn_downsample.q.down
    down.pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
    return model


def foreign():
    model = host()
    model.stages[0].blocks[0] = nn.Identity()
    return model


REFUSED = {
    "no pooling": (lambda: host(global_pool=""), "global_pool='avg'"),
    "another forward pass": (lambda: host(Other), "Other overrides forward_features"),
    "pooled queries": (pooled, "use_pool=True"),
    "fused norms": (fused, "Slim it first, and fuse then"),
    "a foreign block": (foreign, "Identity"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_wrong_is_refused(make, message):
    with pytest.raises(UnsupportedModel, match=message):
        patchslim.slim(make(), "tome", r=1)


def test_a_method_of_the_class_token_is_refused_on_plain_levit():
    with pytest.raises(patchslim.PatchslimError, match="class token"):
        patchslim.slim(host(), "evo", keep_rate=0.5)


def test_another_image_size_is_refused():
    model = patchslim.slim(host(), "tome", r=1)
    with pytest.raises(WrongInput, match="80x112"):
        model(images(side=(112, 80)))


@pytest.mark.filterwarnings("ignore::patchslim.errors.DeepCut")
def test_counts_that_contradict_a_stride_are_refused():
    kept = [35, 20, 12, 12, 4, 4, 4]
    assert patchslim.slim(host(), "tome", keep=kept).counts() == tuple(kept)
    for place, count in ((2, 11), (2, 13), (4, 3)):
        wrong = [*kept[:place], count, *kept[place + 1 :]]
        message = f"{count} tokens after block {place}, .* Say {kept[place]} there"
        with pytest.raises(BadSchedule, match=message):
            patchslim.slim(host(), "tome", keep=wrong)


@pytest.mark.parametrize("place", STRIDES)
def test_a_block_that_subsamples_cannot_decide(place):
    message = rf"block {place} subsamples .* Take the block after it, {place + 1}"
    with pytest.raises(BadSchedule, match=message):
        patchslim.slim(host(), "tome", keep_rate=0.5, at=(1, place))


def test_what_masks_in_training_is_refused_where_it_would_come_back():
    for method in (HardMask(), Predictor()):
        model = slim_unchecked(host(), method, Rate(0.5, (1,))).double().train()
        with pytest.raises(UnsupportedModel, match=r"masks tokens in training.*flat host"):
            model(images())


# --------------------------------------------------------------------------- biases of any two rows


def rows(patches, batch=2):
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(batch, patches, 16, generator=noise)
    return Tokens(x=x, prefix=0, grid=GRIDS[0]).with_origin()


@torch.no_grad()
def test_biases_go_by_cells():
    model, adapter, whole = host(), TimmLevit(), rows(35)
    table = model.stages[0].blocks[0].attn.get_attention_biases(torch.device("cpu"))
    assert torch.equal(adapter.bias(model, 0, whole, whole)[0], table)
    orders = torch.stack([torch.randperm(35) for _ in range(2)])
    shuffled = Keep(orders).apply(whole)
    into = torch.randint(20, (2, 15))
    merged = Merge(orders[:, :20], gone=orders[:, 20:], into=into).apply(whole)
    for queries, keys in ((shuffled, shuffled), (merged, merged), (merged, whole)):
        got = adapter.bias(model, 0, queries, keys)
        for image in range(2):
            asking, asked = queries.cells()[image].tolist(), keys.cells()[image].tolist()
            assert torch.equal(got[image], table[:, asking][:, :, asked])
    assert torch.equal(merged.cells(), orders[:, :20])  # of those that stand for the others


def test_a_bias_depends_on_the_distance():
    """It is read off the host's weights by hand: rows apart, then columns apart."""
    model, adapter, whole = host(), TimmLevit(), rows(35)
    got = adapter.bias(model, 0, whole, whole)[0]
    weights = model.stages[0].blocks[0].attn.attention_biases
    for one, other in ((0, 34), (8, 3), (20, 20)):
        down, right = abs(one // 7 - other // 7), abs(one % 7 - other % 7)
        assert torch.equal(got[:, one, other], weights[:, down * 7 + right])


def test_evo_levit_has_none():
    model, whole = host(EvoLevit), rows(35)
    assert TimmLevit().bias(model, 0, whole, whole) is None


@torch.no_grad()
def test_the_bias_of_a_stride_is_from_every_second_row_and_column():
    model, adapter = host(), TimmLevit()
    keys = Tokens(x=torch.zeros(1, 35, 16), prefix=0, grid=GRIDS[0]).with_origin()
    got = adapter.bias(model, 2, keys.subsample(2), keys)[0]
    weights = model.stages[1].downsample.attn_downsample.attention_biases
    assert got.shape == (16 // 4, 12, 35)
    for query, key in ((0, 34), (5, 16), (11, 0)):
        down, right = abs(query // 4 * 2 - key // 7), abs(query % 4 * 2 - key % 7)
        assert torch.equal(got[:, query, key], weights[:, down * 7 + right])


# --------------------------------------------------------------------------------- any method on it


@every_toy
@every_host
@torch.no_grad()
def test_before_a_stride_the_grid_is_whole(kind, toy):
    model = slim_unchecked(host(kind), toy().eval(), AFTER)
    prefix = int(kind is EvoLevit)
    assert model.counts() == tuple(n + prefix for n in (35, 18, 12, 6, 4, 2, 2))
    x = images()
    traced = model.trace(x)
    if toy is not KeepAboveMean:
        assert [tokens.x.shape[1] for tokens in traced] == list(model.counts())
    for block, grid in zip(STRIDES, GRIDS[1:], strict=True):
        after = traced[block]
        assert (after.grid, after.patches) == (grid, grid[0] * grid[1])
        assert after.position is after.size is after.alive is None
    answer = model(x)
    assert answer.shape == (2, 7)
    assert answer.isfinite().all()
    same(model(x[1:]), answer[1:])


@torch.no_grad()
def test_a_dropped_cell_is_restored_as_its_neighbour():
    """Before a stride, a cell shows the row that it joined, or the one that is nearest to it."""
    for toy in (KeepLongestBefore, MergeShortestBefore):
        model = slim_unchecked(host(), toy().eval(), AFTER)
        before, after = model.trace(images(), 3)[1:]
        whole = before.to_grid()
        assert torch.equal(whole.x, before.dense_features())
        assert whole.patches == 35
        assert len(whole.x[0].unique(dim=0)) == 18
        again = model.start_pass().run_block(
            model.start_pass().steps(whole, tail="full")[2], whole.with_origin()
        )
        assert torch.equal(again.x, after.x)


@torch.no_grad()
def test_a_subsampling_block_computes_what_the_hosts_own_does():
    """The rows that are there, merged or not, give what the host's own downsampling gives."""
    for kind in (Levit, EvoLevit):
        model = slim_unchecked(host(kind), MergeShortestBefore().eval(), AFTER)
        before, after = model.trace(images(), 3)[1:]
        same(after.x, model.host.stages[1].downsample(before.dense_features()))


@every_host
def test_rates_are_of_the_grid_that_there_is(kind):
    prefix = int(kind is EvoLevit)
    model = patchslim.slim(host(kind), "random", keep_rate=0.5, at=(3,))
    assert model.counts() == tuple(n + prefix for n in (35, 35, 12, 6, 4, 4, 4))
    assert patchslim.slim(host(kind), "random", keep_rate=1.0, at=(5,)).counts()[-1] == 4 + prefix


@torch.no_grad()
def test_evo_selects_in_each_stage_of_the_pyramid():
    model = patchslim.slim(host(EvoLevit, depth=(3, 2, 2)), "evo", keep_rate=0.5)
    assert model.plan.decision_blocks == (2, 4, 7)
    counts = [1 + n for n in (35, 35, 17 + 1, 12, 6 + 1, 6 + 1, 4, 2 + 1, 2 + 1)]
    traced = model.trace(images())
    assert [tokens.x.shape[1] for tokens in traced] == counts == list(model.counts())
    assert [tokens.dense_features().shape[1] for tokens in traced] == [36] * 3 + [13] * 3 + [5] * 3
    assert {tokens.memory.shape[1] + 1 == tokens.x.shape[1] for tokens in traced} == {True}


@pytest.mark.parametrize(
    ("kind", "method", "budget"),
    [
        (Levit, "tome", {"r": 1}),
        (Levit, KeepLongestOnQueries().eval(), {"keep_rate": 0.5, "at": (1, 3, 5)}),
        (EvoLevit, "evo", {"keep_rate": 0.5, "at": (1, 3, 5)}),
        (EvoLevit, "evit", {"keep_rate": 0.6, "at": (0, 3)}),
    ],
    ids=["tome", "queries", "evo", "evit"],
)
def test_torch_counts_the_same(kind, method, budget):
    model = patchslim.slim(host(kind), method, **budget)
    cost, dense = model.macs(), model.dense_macs()
    assert cost.total < dense.total
    expected = cost.total + cost.choosing
    assert expected == pytest.approx(count_macs(model, images(1)), rel=0.005)
    assert dense.total == pytest.approx(count_macs(model.host, images(1)), rel=0.005)


# ------------------------------------------------------------------------------- the host's surface


@torch.no_grad()
def test_features_are_the_hosts_own():
    for kind in HOSTS:
        model = host(kind)
        slim = patchslim.slim(model, "identity")
        same(slim.forward_features(images()), model.forward_features(images()))
        same(slim.forward_head(slim.forward_features(images())), model(images()))
        reduced = slim_unchecked(model, KeepLongest().eval(), AFTER)
        assert reduced.forward_features(images()).shape == model.forward_features(images()).shape


@pytest.mark.parametrize("kind", [Levit, LevitDistilled], ids=["plain", "distilled"])
@torch.no_grad()
def test_feature_maps_are_timms_own(kind):
    model = host(kind)
    slim = patchslim.slim(model, "identity")
    for indices in (None, 1, 2, [0], [0, 2], [-1]):
        last, maps = slim.forward_intermediates(images(), indices)
        wanted_last, wanted = model.forward_intermediates(images(), indices)
        same(last, wanted_last)
        assert [each.shape for each in maps] == [each.shape for each in wanted]
        for got, want in zip(maps, wanted, strict=True):
            same(got, want)
    early = slim.forward_intermediates(images(), [1], intermediates_only=True)
    same(early[0], wanted_of(model)[1])


def wanted_of(model):
    return model.forward_intermediates(images(), intermediates_only=True)


@torch.no_grad()
def test_reduced_feature_maps_are_whole():
    for kind, method in ((Levit, "tome"), (EvoLevit, "evo")):
        at = {"keep_rate": 0.5, "at": (1, 3, 5)}
        slim = patchslim.slim(host(kind), method, **at)
        maps = slim.forward_intermediates(images(), intermediates_only=True)
        assert [tuple(each.shape[2:]) for each in maps] == list(GRIDS)
        assert [each.shape[1] for each in maps] == [16, 24, 32]
        again = slim.forward_intermediates(images(), [0], output_fmt="NLC")[1][0]
        same(again, maps[0].flatten(2).transpose(1, 2))
        with pytest.raises(WrongInput, match="levels 0 to 2"):
            slim.forward_intermediates(images(), [3])


@pytest.mark.parametrize(
    ("name", "method"), [("levit_128s", "tome"), ("evo_levit_128s", "evo")], ids=["tome", "evo"]
)
@torch.no_grad()
def test_what_is_saved_is_built_and_answers_alike(tmp_path, name, method):
    model = timm.create_model(name, **TINY)
    randomise(model)
    slim = patchslim.slim(model.eval(), method, keep_rate=0.5, at=(1, 3, 5))
    slim.save(tmp_path / "made")
    again = load(tmp_path / "made")
    assert type(again.host) is type(model)
    x = images(dtype=torch.float32)
    assert torch.equal(again(x), slim(x))
    other = timm.create_model(name, **TINY).eval()
    other(x)  # timm keeps its biases from here on
    assert torch.equal(load(tmp_path / "made", model=other)(x), slim(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [(Levit, "tome"), (EvoLevit, "evo")],
    ids=["tome", "evo"],
)
@torch.no_grad()
def test_it_exports_for_any_batch(kind, method):
    two = {"img_size": 64, "embed_dim": (16, 24), "num_heads": (2, 3), "depth": (2, 1)}
    slim = patchslim.slim(host(kind, **two), method, keep_rate=0.5, at=(1,))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    x = images(3, side=(64, 64))
    graph = torch.export.export(slim, (x,), dynamic_shapes={"images": batch}).module()
    same(graph(x), slim(x))
    same(graph(x[:2]), slim(x[:2]))


def test_gradients_reach_every_parameter():
    model = slim_unchecked(host(EvoLevit), patchslim.find_method("evo")(), AFTER).train()
    model.host.set_distilled_training()
    both = model(images(4))
    sum(each.square().mean() for each in both).backward()
    lost = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not lost
    plain = slim_unchecked(host(), patchslim.find_method("tome")(), Constant(2)).train()
    plain(images(4)).square().mean().backward()
    biases = [p for name, p in plain.named_parameters() if name.endswith("attention_biases")]
    assert all(each.grad.abs().max() > 0 for each in biases)


@torch.no_grad()
def test_half_precision_stays_finite():
    for dtype in (torch.float16, torch.bfloat16):
        for kind, method in ((Levit, "tome"), (EvoLevit, "evo")):
            model = slim_unchecked(
                host(kind).to(dtype), patchslim.find_method(method)().eval(), AFTER
            )
            assert model(images(dtype=dtype)).isfinite().all()


def test_strides_are_reported():
    model = patchslim.slim(host(), "tome", r=1)
    assert model.start_pass().facts.strides == (1, 1, 2, 1, 2, 1, 1)
    assert model.plan.shape.resets == {2: 12, 4: 4}
    assert TimmLevit().describe(model.host).feature_blocks == (1, 3, 6)
    shape = model.plan.shape
    assert shape.dense == (35, 35, 35, 12, 12, 4, 4, 4)
    assert all(one >= other for one, other in pairwise(shape.dense))
