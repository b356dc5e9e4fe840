"""What the core can express today: reductions at P0 to P3, soft masks, a count for each image.

Each test compares the slim model with the same computation written out with the host's own modules.
"""

import pytest
import torch
import torch.nn.functional as F

from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Counts
from patchslim.testing.trial import noise_images, tiny_host
from toy_methods import (
    HardMask,
    KeepAboveMean,
    KeepAttendedOnQueries,
    KeepLongest,
    KeepLongestBefore,
    KeepLongestOnQueries,
    MergeShortest,
    MergeShortestBefore,
    MergeShortestOnMap,
    MergeShortestOnQueries,
    Predictor,
    row_norms,
    slim_unchecked,
)

STEP = Counts((17, 10, 10), 17, 1)  # only the second block decides
TWICE = Counts((12, 12, 8), 17, 1)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def host(dtype):
    return tiny_host().to(dtype)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def entering(host, x):
    """Computes the tokens that enter the second block, by the host itself."""
    return host.blocks[0](host.norm_pre(host._pos_embed(host.patch_embed(x))))


def rows_of(x, kept):
    """Picks the class token and the patch rows `kept` of every image."""
    return torch.stack([x[i, [0, *(kept[i] + 1).tolist()]] for i in range(len(x))])


def fed(block, x):
    return x + block.mlp(block.norm2(x))


def longest(x, count):
    return x[:, 1:].norm(dim=2).topk(count, dim=1).indices


def groups(x, count):
    """Lists groups that `Pairs` makes in each image, the row into which a group merges first."""
    order = x[:, 1:].norm(dim=2).argsort(dim=1, descending=True).tolist()
    return [
        [[row, *each[count:][place::count]] for place, row in enumerate(each[:count])]
        for each in order
    ]


def merged(x, every):
    """Averages rows over the groups; the class token first."""
    return torch.stack(
        [
            torch.stack([x[i, 0], *(x[i, 1:][group].mean(dim=0) for group in each)])
            for i, each in enumerate(every)
        ]
    )


def after_second(host, method, x, schedule=STEP):
    with torch.no_grad():
        return slim_unchecked(host, method, schedule).trace(x)[1]


@torch.no_grad()
def test_p0_runs_the_whole_block_on_the_kept_rows(host, dtype):
    x = noise_images().to(dtype)
    before = entering(host, x)
    wanted = host.blocks[1](rows_of(before, longest(before, 9)))
    close(after_second(host, KeepLongestBefore(), x).x, wanted)


@torch.no_grad()
def test_p0_merges_before_the_block_and_attention_knows_the_sizes(host, dtype):
    x = noise_images().to(dtype)
    before = entering(host, x)
    every = groups(before, 9)
    rows = merged(before, every)
    sizes = torch.tensor([[1, *map(len, each)] for each in every]).to(dtype)
    wanted = host.blocks[1](rows, attn_mask=sizes.log()[:, None, None, :])
    close(after_second(host, MergeShortestBefore(), x).x, wanted)


@torch.no_grad()
def test_p1_attends_on_the_old_rows_and_feeds_the_merged_ones(host, dtype):
    x = noise_images().to(dtype)
    block = host.blocks[1]
    before = entering(host, x)
    attended = before + block.attn(block.norm1(before))
    every = groups(attended, 9)
    tokens = after_second(host, MergeShortest(), x)
    close(tokens.x, fed(block, merged(attended, every)))
    assert tokens.sizes().tolist() == [[len(group) for group in each] for each in every]
    assert tokens.cells().tolist() == [[group[0] for group in each] for each in every]


@torch.no_grad()
def test_p1_keeps_after_attention(host, dtype):
    x = noise_images().to(dtype)
    block = host.blocks[1]
    before = entering(host, x)
    attended = before + block.attn(block.norm1(before))
    close(
        after_second(host, KeepLongest(), x).x, fed(block, rows_of(attended, longest(attended, 9)))
    )


@torch.no_grad()
def test_p2_gives_exactly_the_kept_rows_of_the_dense_block(host, dtype):
    x = noise_images().to(dtype)
    before = entering(host, x)
    wanted = rows_of(host.blocks[1](before), longest(before, 9))
    close(after_second(host, KeepLongestOnQueries(), x).x, wanted)


@torch.no_grad()
def test_p2_can_choose_by_class_attention(host, dtype):
    x = noise_images().to(dtype)
    before = entering(host, x)
    attn = host.blocks[1].attn
    q, k, _ = attn.qkv(host.blocks[1].norm1(before)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    scores = (q[:, :, 0:1] @ k.transpose(2, 3) * attn.scale).softmax(dim=3)[:, :, 0, 1:].mean(dim=1)
    wanted = rows_of(host.blocks[1](before), scores.topk(9, dim=1).indices)
    close(after_second(host, KeepAttendedOnQueries(), x).x, wanted)


@torch.no_grad()
def test_p2_merged_rows_are_one_query(host, dtype):
    x = noise_images().to(dtype)
    block, attn = host.blocks[1], host.blocks[1].attn
    before = entering(host, x)
    rows = merged(before, groups(before, 9))
    heads = (2, 8)
    q = F.linear(block.norm1(rows), attn.qkv.weight[:16], attn.qkv.bias[:16])
    k, v = F.linear(block.norm1(before), attn.qkv.weight[16:], attn.qkv.bias[16:]).chunk(2, dim=2)
    q, k, v = (t.unflatten(2, heads).transpose(1, 2) for t in (q, k, v))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    close(after_second(host, MergeShortestOnQueries(), x).x, fed(block, rows + attn.proj(attended)))


def folded(weights, each):
    """Folds an attention map (H, N, N) between groups: rows averaged, columns added, normalised."""
    joined = [[0], *([row + 1 for row in group] for group in each)]
    rows = torch.stack([weights[:, group].mean(dim=1) for group in joined], dim=1)
    columns = torch.stack([rows[:, :, group].sum(dim=2) for group in joined], dim=2)
    return columns / columns.sum(dim=2, keepdim=True)


@torch.no_grad()
def test_p3_folds_the_map_of_the_old_rows_over_values_of_the_merged(host, dtype):
    x = noise_images().to(dtype)
    block, attn = host.blocks[1], host.blocks[1].attn
    before = entering(host, x)
    every = groups(before, 9)
    rows = merged(before, every)
    q, k, _ = attn.qkv(block.norm1(before)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * attn.scale).softmax(dim=3)
    weights = torch.stack([folded(weights[i], each) for i, each in enumerate(every)])
    v = F.linear(block.norm1(rows), attn.qkv.weight[32:], attn.qkv.bias[32:])
    v = v.unflatten(2, (2, 8)).transpose(1, 2)
    attended = rows + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    close(after_second(host, MergeShortestOnMap(), x).x, fed(block, attended))


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        KeepLongestBefore,
        KeepLongest,
        KeepLongestOnQueries,
        KeepAttendedOnQueries,
        MergeShortest,
        MergeShortestBefore,
        MergeShortestOnMap,
    ],
)
def test_the_exact_tail_gives_the_same_answer_at_every_place(host, dtype, method):
    x = noise_images().to(dtype)
    full, exact = (slim_unchecked(host, method(), TWICE, tail) for tail in ("full", "exact"))
    close(exact(x), full(x))
    assert exact.macs().total < full.macs().total


def test_a_soft_mask_in_training_reaches_the_predictor():
    model = slim_unchecked(tiny_host(), Predictor(), TWICE).train()
    model(noise_images()).square().sum().backward()
    for name, parameter in model.method.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name


@torch.no_grad()
def test_a_mask_is_set_only_where_the_schedule_falls(host, dtype):
    x = noise_images().to(dtype)
    method = Predictor().to(dtype)
    alive = [tokens.alive for tokens in slim_unchecked(host, method, TWICE).train().trace(x)]
    assert torch.equal(alive[0], alive[1])
    assert (alive[2] < alive[1]).all()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(alive[2], alive[1])


@torch.no_grad()
def test_the_trained_predictor_removes_what_it_was_trained_to_remove(host, dtype):
    model = slim_unchecked(host, Predictor().to(dtype), TWICE).eval()
    assert [tokens.x.shape[1] for tokens in model.trace(noise_images().to(dtype))] == [12, 12, 8]


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "max"])
def test_masked_rows_weigh_as_little_as_removed_ones(dtype, pool):
    host = tiny_host(global_pool=pool).to(dtype)
    x = noise_images().to(dtype)
    masked, removed = (
        slim_unchecked(host, kind, TWICE) for kind in (HardMask(), KeepLongestBefore())
    )
    torch.testing.assert_close(masked(x), removed(x), rtol=1e-4, atol=1e-4)
    last, wanted = masked.trace(x)[-1], removed.trace(x)[-1]
    assert last.x.shape[1] == 17
    assert torch.equal(last.alive.sum(dim=1), torch.full((3,), 7.0, dtype=dtype))
    rows = rows_of(last.x, wanted.cells())
    torch.testing.assert_close(rows, wanted.x, rtol=1e-4, atol=1e-4)


def own_counts(model, x):
    """Counts the rows of each image after each block, and says whether images differ."""
    traced = model.trace(x)
    counts = torch.stack(
        [t.alive.sum(dim=1) if t.alive is not None else t.cells().ge(0).sum(dim=1) for t in traced]
    )
    assert (counts[-1] != counts[-1, 0]).any(), "the test needs images that keep different numbers"
    return counts


@torch.no_grad()
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_images_that_keep_different_numbers_are_padded_and_answered_alone(dtype, pool):
    changes = {"class_token": False, "depth": 3} if pool == "map" else {}
    host = tiny_host(global_pool=pool, **changes).to(dtype)
    prefix = 0 if pool == "map" else 1
    x = noise_images(4).to(dtype)
    padded = slim_unchecked(host, KeepAboveMean(), Counts((12, 12, 8), 16 + prefix, prefix))
    together, counts = padded(x), own_counts(padded, x)
    for i in range(len(x)):
        kept = tuple(int(count) + prefix for count in counts[:, i])
        alone = slim_unchecked(host, KeepAboveMean(), Counts(kept, 16 + prefix, prefix))
        close(alone(x[i : i + 1]), together[i : i + 1])


@torch.no_grad()
def test_padding_leaves_class_attention_at_zero():
    host = tiny_host()
    tokens = slim_unchecked(host, KeepAboveMean(), Counts((14, 14, 14), 17, 1)).trace(
        noise_images()
    )[0]
    assert (row_norms(tokens)[~tokens.alive] > 0).any()
    seen = []

    class Looking(KeepAboveMean):
        needs_class_token = True

        def choose(self, tokens, signals, keep):
            if tokens.alive is not None:
                seen.append((signals.class_attention(), tokens.alive))
            return super().choose(tokens, signals, keep)

    slim_unchecked(host, Looking(), Counts((12, 10, 8), 17, 1))(noise_images())
    assert seen
    for attention, alive in seen:
        assert (attention[~alive] == 0).all()
        assert (attention[alive] > 0).all()


def test_every_place_has_its_own_cost():
    shape = slim_unchecked(tiny_host(), KeepLongest(), STEP).plan.shape
    cost = {
        kind.place.value: slim_macs(shape, kind(), (10, 10, 10), tail=False).total
        for kind in (KeepLongestBefore, KeepLongest, KeepLongestOnQueries, MergeShortestOnMap)
    }
    assert cost["P0"] < cost["P2"] < cost["P1"]
    assert cost["P0"] < cost["P3"] < cost["P1"]
