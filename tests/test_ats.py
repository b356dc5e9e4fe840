"""`ats`: what inverse-transform sampling hits, against the method's own words as a loop."""

import pytest
import torch

import patchslim
from patchslim.errors import BadSetting, NeedsClassToken
from patchslim.methods import Place, Signals
from patchslim.methods.ats import ATS
from patchslim.tokens.tokens import Tokens
from timm_variants import random_images, tiny_vit

N = 20


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scene(scores, *, alive=None):
    """Makes tokens and signals in which patches have these scores (B, n).

    Keys let the class token attend so, and values have length one.
    """
    scores = torch.as_tensor(scores, dtype=torch.float64)
    batch, count = scores.shape
    k = torch.zeros(batch, 1, 1 + count, 2, dtype=torch.float64)
    k[:, 0, 1:, 0] = scores.clamp(min=1e-30).log()
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(batch, 1, 1, 2)
    v = torch.nn.functional.normalize(draw(batch, 1, 1 + count, 2), dim=3)
    x = draw(batch, 1 + count, 8)
    tokens = Tokens(x=x, prefix=1, grid=(1, count), alive=alive)
    bias = None
    if alive is not None:
        bias = torch.zeros(batch, 1, 1, 1 + count, dtype=torch.float64)
        bias[:, 0, 0, 1:] = bias[:, 0, 0, 1:].masked_fill(~alive, -torch.inf)
    return tokens, Signals(1, 1.0, q, k, v, bias)


def sampled(score, samples):
    """Lists the rows hit: sorted upwards, cumulated, stretched to 0..1, nearest to each point."""
    order = sorted(range(len(score)), key=lambda row: score[row])
    total, reached = 0.0, []
    for row in order:
        total += score[row]
        reached.append(total)
    least, most = reached[0], reached[-1]
    reached = [(each - least) / (most - least) for each in reached]
    hits = set()
    for number in range(1, samples + 1):
        point = (2 * number - 1) / (2 * samples)
        hits.add(order[min(range(len(order)), key=lambda place: abs(reached[place] - point))])
    return hits


def kept(method, tokens, signals, keep):
    """Lists the rows that each image keeps, in their order."""
    reduction = method.choose(tokens, signals, keep)
    assert reduction.kept.shape == reduction.padding.shape == (len(tokens.x), min(keep, N))
    return [row[real].tolist() for row, real in zip(reduction.kept, reduction.padding, strict=True)]


@pytest.mark.parametrize("samples", [1, 3, 8, 15, 20])
@pytest.mark.parametrize("power", [0.5, 2, 6])
@pytest.mark.parametrize("seed", range(4))
def test_the_patches_nearest_to_evenly_spaced_points_stay(seed, power, samples):
    scores = draw(3, N, seed=seed).abs() ** power
    got = kept(ATS(floor=1), *scene(scores), samples)
    for image, rows in enumerate(got):
        score = (scores[image] / scores[image].sum()).tolist()
        assert set(rows) == sampled(score, samples)
        assert rows == sorted(rows, key=lambda row: -score[row])


def test_scores_are_attention_times_the_length_of_the_value():
    """Heads are averaged in the attention, and the value is that of all heads together."""
    tokens = Tokens(x=draw(2, 1 + N, 8), prefix=1, grid=(4, 5))
    q, k, v = draw(2, 2, 1, 4, seed=1), draw(2, 2, 1 + N, 4, seed=2), draw(2, 2, 1 + N, 4, seed=3)
    got = kept(ATS(floor=1), tokens, Signals(1, 0.5, q, k, v), 12)
    weights = (q @ k.transpose(2, 3) * 0.5).softmax(dim=3).mean(dim=1)[:, 0, 1:]
    for image, rows in enumerate(got):
        length = torch.cat([v[image, 0], v[image, 1]], dim=1)[1:].square().sum(dim=1).sqrt()
        score = weights[image] * length
        assert set(rows) == sampled((score / score.sum()).tolist(), 12)


def test_equal_scores_keep_one_patch_for_each_sample():
    for samples in (1, 4, 10, 19, 20):
        noise = draw(2, N).abs() * 1e-9
        rows = kept(ATS(floor=1), *scene(1.0 + noise), samples)
        assert [len(each) for each in rows] == [samples, samples]


@pytest.mark.parametrize(("floor", "wanted"), [(2, 2), (8, 8), (15, 15), (40, 18)])
def test_peaked_scores_keep_the_floor(floor, wanted):
    scores = torch.full((2, N), 1e-9, dtype=torch.float64)
    scores += draw(2, N).abs() * 1e-10
    scores[0, 4] = scores[1, 17] = 1.0
    got = kept(ATS(floor=floor), *scene(scores), 18)
    for image, rows in enumerate(got):
        best = scores[image].topk(wanted).indices.tolist()
        assert len(rows) == len(set(rows)) == wanted
        assert rows[0] == best[0]
        if floor > 2:
            assert len(set(rows) & set(best)) >= wanted - 1  # one hit lies below the peak
    assert got[0][0] == 4
    assert got[1][0] == 17


def test_the_more_peaked_the_fewer_stay():
    scores = draw(1, N).abs() + 0.1
    counts = [len(kept(ATS(floor=1), *scene(scores**power), 16)[0]) for power in (0, 1, 3, 9, 30)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 16
    assert counts[-1] <= 3


@pytest.mark.parametrize("keep", [1, 5, 8, 20, 33])
def test_never_more_than_the_cap_whatever_the_scores(keep):
    cases = [torch.ones(1, N), torch.eye(N)[:1], draw(1, N).abs(), draw(1, N).abs() ** 9,
             torch.zeros(1, N), torch.arange(N)[None] * 1.0]  # fmt: skip
    scores = torch.cat([each.double() for each in cases])
    for floor in (1, 8, 100):
        for rows in kept(ATS(floor=floor), *scene(scores), keep):
            assert min(floor, keep, N) <= len(rows) <= min(keep, N)
            assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("real", [3, 9])
def test_padding_is_never_hit(real):
    scores = draw(2, N).abs()
    alive = torch.arange(N).expand(2, -1) < real
    tokens, signals = scene(scores, alive=alive)
    for keep in (2, 6, 12):
        got = kept(ATS(floor=1), tokens, signals, keep)
        for image, rows in enumerate(got):
            assert max(rows) < real
            some = scores[image, :real]
            assert set(rows) == sampled((some / some.sum()).tolist(), keep)
    for rows in kept(ATS(floor=8), tokens, signals, 12):
        assert min(8, real) <= len(rows) <= real


def test_only_sampled_rows_are_queries_in_the_same_block():
    made = tiny_vit()
    model = patchslim.slim(made, "ats", keep_rate=0.6, at=(0, 1), floor=1)
    assert model.method.place is Place.ON_QUERIES
    x = random_images(made, 4)
    with torch.no_grad():
        traced = [tokens.lengths() for tokens in model.trace(x)]
    assert all(count <= model.counts()[0] for count in traced[0])
    assert len(set(traced[1])) > 1
    for block in (1, 2):
        pairs = zip(traced[block], traced[block - 1], strict=True)
        assert all(now <= before for now, before in pairs)


def test_a_floor_of_none_and_a_host_without_scores_are_refused():
    with pytest.raises(BadSetting, match="floor=0: at least one patch has to stay"):
        ATS(floor=0)
    with pytest.raises(NeedsClassToken, match="ATS scores patches by the class token"):
        patchslim.slim(tiny_vit(class_token=False, global_pool="avg"), "ats", keep=0.5)
