"""`tome` with a threshold: pairs above it merge; if there are none, it works as without one."""

import math

import pytest
import torch
import torch.nn.functional as F

import patchslim
from patchslim.errors import BadSetting
from patchslim.methods import Signals
from patchslim.methods.tome import ToMe
from patchslim.schedules.schedule import Counts
from patchslim.tokens.tokens import Tokens
from timm_variants import random_images, tiny_vit
from toy_methods import slim_unchecked

HOSTS = {
    "class": {},
    "average": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 1},
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scene(prefix, count, *, real=None, batch=3, seed=0):
    """Makes random tokens of some sizes; of each image, `real` rows are no padding."""
    x = draw(batch, prefix + count, 8, seed=seed)
    alive = None if real is None else torch.arange(count) < torch.tensor(real).unsqueeze(1)
    size = draw(batch, count, seed=seed + 1).abs().ceil()
    k = draw(batch, 2, prefix + count, 4, seed=seed + 2)
    return Tokens(x=x, prefix=prefix, grid=(1, count), size=size, alive=alive), Signals(prefix, k=k)


def merged(key, prefix, threshold, keep):
    """Groups one image: patches alternate between A and B, the best of A join B."""
    key = F.normalize(key.mean(dim=0)[prefix:], dim=1)
    every = range(len(key))
    a = [row for row in every if (row + prefix) % 2 == 0]
    b = [row for row in every if (row + prefix) % 2]
    best = {row: max(((float(key[row] @ key[o]), -o) for o in b), default=(-2, 0)) for row in a}
    many = max(sum(alike > threshold for alike, _ in best.values()), len(key) - keep)
    gone = sorted(a, key=lambda row: -best[row][0])[:many]
    groups = {row: [row] for row in [*(row for row in a if row not in gone), *b]}
    for row in sorted(gone):
        groups[-best[row][1]].append(row)
    return groups


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("threshold", [1e-6, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("keep", [12, 17, 21])
def test_all_pairs_merge_that_exceed_the_threshold(threshold, prefix, keep):
    for seed in range(4):
        tokens, signals = scene(prefix, 21, real=[21, 13, 2], seed=seed)
        after = ToMe(threshold=threshold).choose(tokens, signals, keep).apply(tokens)
        assert after.x.shape[1] == prefix + keep
        for image, count in enumerate([21, 13, 2]):
            key = signals.k[image, :, : prefix + count]
            groups = merged(key, prefix, threshold, keep)
            left = after.lengths()[image] - prefix
            assert left == len(groups) <= keep
            assert after.cells()[image, :left].tolist() == list(groups)
            for place, group in enumerate(groups.values()):
                size = tokens.size[image, group]
                mean = (tokens.x[image, prefix:][group] * size.unsqueeze(1)).sum(dim=0) / size.sum()
                torch.testing.assert_close(after.x[image, prefix + place], mean)
                assert float(after.size[image, place]) == float(size.sum())


def test_images_of_a_batch_keep_different_numbers():
    tokens, signals = scene(1, 21)
    flat, apart = signals.k.clone(), signals.k[:1]
    flat[1] = flat[1, :, :1]  # one image whose keys are all the same
    after = ToMe(threshold=0.9).choose(tokens, Signals(1, k=flat), 21).apply(tokens)
    assert after.lengths()[1] == 1 + 21 - 10
    assert after.lengths()[0] > after.lengths()[1]
    first = Tokens(x=tokens.x[:1], prefix=1, grid=tokens.grid, size=tokens.size[:1])
    alone = ToMe(threshold=0.9).choose(first, Signals(1, k=apart), 21).apply(first)
    assert torch.equal(alone.x, after.x[:1])
    assert torch.equal(alone.alive, after.alive[:1])


@pytest.mark.parametrize("name", HOSTS)
def test_just_below_one_nothing_merges(name):
    made = tiny_vit(**HOSTS[name])
    model, x = patchslim.slim(made, "tome", r=0, threshold=0.999999), random_images(made, 3)
    with torch.no_grad():
        for tokens in model.trace(x):
            assert tokens.lengths() == [model.plan.shape.entering] * 3
        torch.testing.assert_close(model(x), made(x), atol=1e-5, rtol=1e-5)
        assert {cost.total for cost in model.macs_of(x)} == {model.dense_macs().total}


@pytest.mark.parametrize("tail", ["full", "exact"])
@pytest.mark.parametrize("name", HOSTS)
def test_where_no_pair_exceeds_it_the_cap_is_the_fixed_form(name, tail):
    """They agree row for row and in the same order, since the next split depends on it."""
    made = tiny_vit(**HOSTS[name])
    shape, x = patchslim.find_adapter(made).shape(made), random_images(made, 3)
    left = tuple(shape.prefix + patches for patches in (15, 9, 6))
    schedule = Counts(left, shape.entering, shape.prefix)
    fixed = slim_unchecked(made, ToMe(), schedule, tail).eval()
    silent = slim_unchecked(made, ToMe(threshold=1 - 1e-7), schedule, tail).eval()
    with torch.no_grad():
        for mine, theirs in zip(silent.trace(x), fixed.trace(x), strict=True):
            for part in ("x", "size", "position", "origin"):
                torch.testing.assert_close(getattr(mine, part), getattr(theirs, part))
            assert mine.alive is None or bool(mine.alive.all())
        torch.testing.assert_close(silent(x), fixed(x), atol=1e-6, rtol=1e-6)
        costs = silent.macs_of(x)
    assert {cost.total for cost in costs} == {fixed.macs().total}
    assert {cost.choosing for cost in costs} == {fixed.macs().choosing}


def test_the_cap_holds_where_pairs_hardly_exceed_the_threshold():
    made = tiny_vit()
    model = patchslim.slim(made, "tome", r=3, threshold=0.7)
    x = torch.cat([random_images(made, 6), torch.zeros_like(random_images(made, 1))])
    with torch.no_grad():
        traced = [tokens.lengths() for tokens in model.trace(x)]
    for lengths, most in zip(traced, model.counts(), strict=True):
        assert max(lengths) <= most
    assert len(set(traced[-1])) > 1


@pytest.mark.parametrize("name", HOSTS)
def test_a_very_low_threshold_removes_half_in_each_block(name):
    """Keys are equal: each row of A has the similarity 1 to some of B."""
    made = tiny_vit(**HOSTS[name])
    torch.nn.init.zeros_(made.pos_embed)
    model = patchslim.slim(made, "tome", r=0, threshold=1e-6)
    flat = torch.ones_like(random_images(made, 2))
    with torch.no_grad():
        traced = [tokens.lengths()[0] - model.plan.shape.prefix for tokens in model.trace(flat)]
        # A and B alternate from the first row of the sequence, so an odd number favours one side.
        halves, rows = [], 20
        for _ in traced:
            a = range(model.plan.shape.prefix % 2, rows, 2)
            rows -= len(a) if rows > len(a) else 0
            halves.append(rows)
        assert traced == halves
        torch.testing.assert_close(model(flat), made(flat), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 1.5, math.nan])
def test_a_threshold_that_is_no_cosine_is_refused(threshold):
    is_number = not math.isnan(threshold)
    cure = r"a cosine between 0 \(none\) and 1" if is_number else "takes a number"
    with pytest.raises(BadSetting, match=f"threshold={threshold}.*{cure}"):
        ToMe(threshold=threshold)


def test_without_a_threshold_the_method_is_the_fixed_one():
    assert not ToMe().adaptive
    assert ToMe(threshold=0.5).adaptive
    made = tiny_vit()
    assert {
        cost.total for cost in patchslim.slim(made, "tome", r=3).macs_of(random_images(made, 3))
    } == {patchslim.slim(made, "tome", r=3).macs().total}
