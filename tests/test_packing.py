"""Ragged batches: packed, padded and alone give the same, in every host and whatever is kept."""

import copy
import warnings

import pytest
import torch

import patchslim
from hf_hosts import random_pixels, tiny_hf
from patchslim.methods._method import method_settings
from patchslim.model.load import load
from patchslim.model.training_pass import forward_training
from patchslim.schedules.macs import slim_macs
from patchslim.tokens.attention import attention_bias
from patchslim.tokens.merging import Merge
from patchslim.tokens.packing import (
    pack,
    packed_attention,
    pad,
    pad_heads,
    pad_rows,
    reduce_packed,
)
from patchslim.tokens.reduction import Keep
from patchslim.tokens.tokens import Borders, Tokens
from small_hosts import HOSTS
from timm_variants import random_images, tiny_vit

COUNTS = ([3, 1, 4], [1, 5], [5, 1, 1, 2], [1, 2, 1], [7, 6], [2, 12])
EVEN = ([1, 1, 1], [4, 4], [3], [1])
PREFIXES = (0, 1, 2, 5)
# Each leaves the images of one batch different numbers of patches.
METHODS = {
    "similarity": {"threshold": 0.2, "floor": 0.1, "weight": "size"},
    "attended similarity": {"threshold": 0.008, "floor": 0.1},
    "tome": {"threshold": 0.6},
    "ats": {"floor": 1},
    "duplicates": {"tolerance": 1.1},
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def side(counts, prefix, *, longest=0, sizes=True):
    """Makes padded images with `counts` real rows, whose padding is NaN."""
    batch, longest = len(counts), max(longest, *counts, 0)
    alive = torch.arange(longest) < torch.tensor(counts).unsqueeze(1)
    x = draw(batch, prefix + longest, 8)
    x[:, prefix:][~alive] = torch.nan
    cells = torch.rand(batch, longest, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    return Tokens(
        x=x,
        prefix=prefix,
        grid=(1, longest),
        size=draw(batch, longest, seed=2).abs() + 0.5 if sizes else None,
        position=cells,
        alive=alive,
        rotary=draw(longest, 4, seed=3),
        content=draw(batch, longest, 6, seed=4),
    )


def real(tokens, image, part):
    """Picks what belongs to the real rows of one image, of padded images."""
    count = int(tokens.alive[image].sum())
    t = getattr(tokens, part)
    return t[image, : tokens.prefix + count] if part == "x" else t[image, :count]


# --- packing and the way back


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_padding_undoes_packing(counts, prefix):
    start = side(counts, prefix, longest=max(counts) + 2)
    one = pack(start)
    assert one.x.shape[:2] == (1, len(counts) * prefix + sum(counts))
    assert one.prefix == len(counts) * prefix
    assert one.patches == sum(counts)
    assert one.x.isfinite().all()
    assert one.lengths() == start.lengths() == [prefix + count for count in counts]
    assert pack(one) is one
    back = pad(one)
    assert back.x.isfinite().all()
    assert back.x.shape[:2] == (len(counts), prefix + max(counts))
    assert back.alive.sum(dim=1).tolist() == counts
    assert torch.equal(back.alive, start.alive[:, : max(counts)])
    assert (back.prefix, back.grid, back.borders) == (prefix, start.grid, None)
    assert back.rotary is one.rotary is start.rotary
    assert back.content is one.content is start.content
    for image in range(len(counts)):
        for part in ("x", "size", "position"):
            assert torch.equal(real(back, image, part), real(start, image, part)), part
    again = pack(back)
    for part in ("x", "size", "position"):
        assert torch.equal(getattr(again, part), getattr(one, part)), part


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("counts", EVEN, ids=str)
def test_images_of_equal_length_only_lose_their_padding(counts, prefix):
    start = side(counts, prefix, longest=max(counts) + 3)
    after = pack(start)
    assert after.borders is None
    assert after.alive is None
    assert after.x.shape[:2] == (len(counts), prefix + counts[0])
    for part in ("x", "size", "position"):
        whole = getattr(after, part)
        for image in range(len(counts)):
            assert torch.equal(whole[image], real(start, image, part)), part
    assert pad(after) is after


@pytest.mark.parametrize("seed", range(10))
def test_random_numbers_come_back_as_they_were(seed):
    noise = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 30, (1 + seed,), generator=noise).tolist()
    start = side(counts, seed % 3, sizes=seed % 2 == 0)
    back = pad(pack(start))
    assert (back.size is None) == (start.size is None)
    for image, count in enumerate(counts):
        assert torch.equal(back.x[image, : seed % 3 + count], real(start, image, "x"))
        assert torch.equal(back.cells()[image, :count], real(start, image, "position"))


def test_what_has_no_padding_is_left_alone():
    start = Tokens(x=draw(2, 5, 8), prefix=1, grid=(2, 2))
    assert pack(start) is start
    assert pad(start) is start
    assert start.lengths() == [5, 5]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_borders_map_to_padded_rows_and_back(prefix):
    counts = [3, 1, 4]
    borders = Borders.from_counts(counts, prefix, torch.device("cpu"))
    every = torch.arange(3 * prefix + 8)
    assert torch.equal(borders.order[borders.inverse_order], every)
    assert torch.equal(borders.inverse_order[borders.order], every)
    image = torch.tensor([i for _ in range(prefix) for i in range(3)] + [0] * 3 + [1] + [2] * 4)
    wanted = [i for i, count in enumerate(counts) for _ in range(prefix + count)]
    assert image[borders.order].tolist() == wanted
    assert borders.padded_index(4).tolist() == [[0, 1, 2, 2], [3, 3, 3, 3], [4, 5, 6, 7]]


def test_leading_rows_of_a_packed_batch_are_those_of_every_image():
    start = side([3, 1, 4], 2)
    one = pack(start).leading_rows(1)
    assert one.x.shape[1] == one.prefix == 3
    assert torch.equal(one.x[0], start.x[:, 0])
    assert one.lengths() == [5, 3, 6]
    assert torch.equal(pad(one).x, start.x[:, :1])


def test_heads_of_packed_rows_can_be_padded():
    start = side([3, 1, 4], 1)
    one = pack(start)
    heads = one.x.unflatten(2, (2, 4)).transpose(1, 2)
    got = pad_heads(heads, one.borders)
    assert got.shape == (3, 2, 5, 4)
    assert torch.equal(got.transpose(1, 2).flatten(2), pad(one).x)
    assert torch.equal(pad_rows(one.x, one.borders), pad(one).x)
    assert pad_heads(None, one.borders) is None


# --- decisions about packed rows


def decided(counts, left, *, merges, weighed):
    """Makes a decision about padded images of `counts` rows, which leaves `left` of each."""
    longest, most = max(counts), max(left)
    order = torch.full((len(counts), longest), 0)
    joins = torch.zeros(len(counts), longest, dtype=torch.bool)
    into = torch.zeros(len(counts), longest, dtype=torch.long)
    for image, (count, stay) in enumerate(zip(counts, left, strict=True)):
        some = torch.randperm(count, generator=torch.Generator().manual_seed(image))
        order[image] = torch.cat([some, torch.arange(count, longest)])
        joins[image, stay:count] = True
        into[image, stay:count] = torch.arange(count - stay) % stay
    kept, padding = order[:, :most], torch.arange(most) < torch.tensor(left).unsqueeze(1)
    if not merges:
        return Keep(kept, padding)
    weight = draw(len(counts), longest, seed=9).abs() + 0.1 if weighed else None
    return Merge(kept, order, into, padding, joins, weight)


@pytest.mark.parametrize(
    ("counts", "left"),
    [([5, 2, 7], [3, 1, 2]), ([6, 6, 6], [6, 1, 4]), ([4, 2], [2, 2]), ([3, 1, 2], [3, 1, 2])],
    ids=str,
)
@pytest.mark.parametrize("method", ["keep", "merge", "weighed merge"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("begins", ["packed", "side by side"])
def test_a_decision_about_packed_rows_equals_that_about_padded_images(
    begins, prefix, method, counts, left
):
    beside = side(counts, prefix)
    beside = pad(pack(beside)) if len(set(counts)) > 1 else pack(beside)
    reduction = decided(counts, left, merges=method != "keep", weighed=method == "weighed merge")
    wanted = pack(reduction.apply(beside))
    got = reduce_packed(pack(beside) if begins == "packed" else beside, reduction)
    assert got.prefix == wanted.prefix
    assert got.lengths() == wanted.lengths() == [prefix + count for count in left]
    assert (got.borders is None) == (wanted.borders is None)
    assert got.x.isfinite().all()
    for part in ("x", "size", "position"):
        torch.testing.assert_close(getattr(got, part), getattr(wanted, part))


@pytest.mark.parametrize("forgotten", [None, torch.ones(3, 4, dtype=torch.bool)], ids=str)
def test_rows_of_the_next_image_are_not_taken_for_padding(forgotten):
    """A decision without a padding mask keeps all rows that are really there."""
    one = pack(side([4, 2, 3], 1))
    kept = torch.arange(4).expand(3, -1)
    got = reduce_packed(one, Keep(kept, forgotten))
    assert got.lengths() == one.lengths()
    for part in ("x", "size", "position"):
        assert torch.equal(getattr(got, part), getattr(one, part))


def test_images_padded_bare_have_no_features():
    one = pack(side([3, 1, 4], 2))
    bare, whole = pad(one, bare=True), pad(one)
    assert bare.x.shape == whole.x.shape
    assert bare.x.isnan().all()
    assert torch.equal(bare.size, whole.size)
    assert torch.equal(bare.alive, whole.alive)


# --- attention


def of_image(t, tokens, image):
    """Picks the heads of the rows of one image (H, n, d), of packed rows or of padded images."""
    whole = pad_heads(t, tokens.borders) if tokens.borders is not None else t
    return whole[image, :, : tokens.lengths()[image]]


def written_out(q, k, v, size):
    """Computes attention of one image, with keys that weigh `size`."""
    logits = q @ k.transpose(1, 2) * 0.3 + size.log()
    return logits.softmax(dim=2) @ v


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_attention_stays_within_each_image(counts, prefix, proportional):
    tokens = pack(side(counts, prefix))
    qkv = tuple(draw(1, 2, tokens.x.shape[1], 4, seed=seed) for seed in (5, 6, 7))
    got = packed_attention(
        qkv,
        queries=tokens,
        keys=tokens,
        scale=0.3,
        bias=attention_bias(tokens, proportional=proportional),
    )
    assert got.shape == qkv[0].shape
    sizes = pad(tokens).size
    for image, count in enumerate(counts):
        q, k, v = (of_image(t, tokens, image) for t in qkv)
        size = torch.ones(prefix + count, dtype=torch.float64)
        if proportional:
            size[prefix:] = sizes[image, :count]
        torch.testing.assert_close(of_image(got, tokens, image), written_out(q, k, v, size))


@pytest.mark.parametrize("asked", ["packed", "side by side"])
def test_there_may_be_fewer_queries_than_keys(asked):
    """Queries and keys are each packed or padded, as in a method that decides on queries."""
    whole = side([5, 5, 5], 1)
    whole = Tokens(x=whole.x, prefix=1, grid=whole.grid, size=whole.size)
    some = pack(side([2, 4, 1], 1))
    queries, keys = (some, whole) if asked == "packed" else (whole, some)
    q = draw(queries.x.shape[0], 2, queries.x.shape[1], 4, seed=5)
    k, v = (draw(keys.x.shape[0], 2, keys.x.shape[1], 4, seed=seed) for seed in (6, 7))
    got = packed_attention(
        (q, k, v),
        queries=queries,
        keys=keys,
        scale=0.3,
        bias=attention_bias(keys, proportional=True),
    )
    assert got.shape == q.shape
    sizes = pad(keys).size
    for image in range(3):
        count = keys.lengths()[image]
        size = torch.ones(count, dtype=torch.float64)
        size[1:] = sizes[image, : count - 1]
        parts = of_image(q, queries, image), of_image(k, keys, image), of_image(v, keys, image)
        torch.testing.assert_close(of_image(got, queries, image), written_out(*parts, size))


# --- whole models


def mixed(x):
    """Makes images of which one is noise, one smooth, one flat, and the rest between."""
    weight = torch.linspace(1, 0, len(x)).view(-1, 1, 1, 1)
    ramp = torch.linspace(-1, 1, x.shape[3], dtype=x.dtype).expand_as(x)
    return x * weight.to(x.dtype) + ramp * (1 - weight).to(x.dtype) * 0.3


def model_of(made, method, *, tail="full"):
    """Slims the host so that the method decides in its first two blocks."""
    name = method.split()[-1]
    budget = {"keep_rate": 0.9, "at": (0, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", patchslim.errors.ShortSchedule)
        return patchslim.slim(made, name, tail=tail, **budget, **METHODS[method])


def same_however_it_is_run(model, x):
    """Asserts packed == padded == alone == another order, answers and costs; returns the counts."""
    logits = model.plan.adapter.logits
    with torch.no_grad():
        answer, costs = model.forward_with_costs(x)
        model.packs = False
        beside, padded_costs = model.forward_with_costs(x)
        model.packs = True
        alone = [model.forward_with_costs(image) for image in x.split(1)]
        turned = logits(model(x.flip(0))).flip(0)
    assert costs == padded_costs == [cost for _, (cost,) in alone]
    wanted = logits(answer)
    single = torch.cat([logits(each) for each, _ in alone])
    for other in (logits(beside), single, turned):
        assert other.isfinite().all()
        assert float((other - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))
    assert max(cost.total for cost in costs) <= model.macs().total
    return [cost.rows for cost in costs]


SUITED = [  # by default each method on every third host, and each host with some
    pytest.param(method, name, marks=[pytest.mark.slow] * ((row + column) % 3 > 0))
    for row, method in enumerate(METHODS)
    for column, name in enumerate(HOSTS)
    if method not in ("attended similarity", "ats")
    or name in ("class token", "distilled", "query", "query over the prefix", "rotary class token",
                "rotary query")
]  # fmt: skip


@pytest.mark.parametrize(("method", "name"), SUITED)
def test_timm_hosts_packed_padded_alone(method, name):
    made, tail = HOSTS[name].build(), "full" if "average" in name else "exact"
    rows = same_however_it_is_run(model_of(made, method, tail=tail), mixed(random_images(made, 5)))
    assert len(set(rows)) > 1, rows


FACES = ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher",
         "Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("label", FACES)
def test_transformers_hosts_packed_padded_alone(label, method):
    made = tiny_hf(label)
    rows = same_however_it_is_run(model_of(made, method), mixed(random_pixels(made, 5)))
    assert len(set(rows)) > 1, rows


@pytest.mark.parametrize("method", METHODS)
def test_one_image_and_equal_images(method):
    made = tiny_vit()
    model, x = model_of(made, method), random_images(made, 1)
    same_however_it_is_run(model, x)
    rows = same_however_it_is_run(model, x.expand(4, -1, -1, -1))
    assert len(set(rows)) == 1


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_the_host_returns_are_the_same_too(method):
    """With a map back to the pixels nothing is packed, and the output has the dense shape."""
    made = tiny_hf("ViTModel")
    model, x = model_of(made, method), mixed(random_pixels(made, 3))
    with torch.no_grad():
        together = model(x).last_hidden_state
        alone = torch.cat([model(image).last_hidden_state for image in x.split(1)])
        dense = made(x).last_hidden_state
    assert together.shape == dense.shape
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tail", ["full", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_the_cost_of_an_image_is_that_of_the_rows_it_kept(method, tail):
    made = tiny_vit()
    model, x = model_of(made, method, tail=tail), mixed(random_images(made, 4))
    with torch.no_grad():
        traced = [tokens.lengths() for tokens in model.trace(x)]
        costs = model.macs_of(x)
    for image, cost in enumerate(costs):
        counts = [lengths[image] for lengths in traced]
        named = model.schedule.decision_blocks(3)
        exact = tail == "exact"
        wanted = slim_macs(model.plan.shape, model.method, counts, tail=exact, named=named)
        assert cost == wanted
        assert cost.total <= model.macs().total
        assert cost.choosing > 0 or method == "duplicates"


def test_an_image_that_keeps_all_costs_the_cap_and_no_more():
    made = tiny_vit()
    model = patchslim.slim(made, "similarity", keep_rate=0.7, at=(0, 1), threshold=1e-9)
    assert {cost.total for cost in model.macs_of(random_images(made, 4))} == {model.macs().total}


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_answers_the_same(method, tmp_path):
    import timm

    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    made = timm.create_model("vit_tiny_patch16_224", **size, num_classes=3).eval()
    model, x = model_of(made, method), mixed(draw(4, 3, 32, 32, dtype=torch.float32))
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert method_settings(again.method) == method_settings(model.method)
    assert again.method.adaptive
    with torch.no_grad():
        (wanted, costs), (got, loaded_costs) = (
            model.forward_with_costs(x),
            again.forward_with_costs(x),
        )
    assert torch.equal(got, wanted)
    assert loaded_costs == costs


@pytest.mark.parametrize("method", METHODS)
def test_in_training_nothing_is_packed_and_gradients_are_finite(method):
    made = tiny_vit()
    model, x = model_of(made, method).train(), mixed(random_images(made, 4))
    tokens = model.start_pass().embed(x, {}, track=False)
    for step in model.start_pass().steps(tokens, tail="full"):
        tokens = model.start_pass().run_block(step, tokens)
        assert tokens.borders is None
        assert tokens.x.shape[0] == 4
    model(x).square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    learned = forward_training(model, x, tail="full")
    assert learned.output.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_an_image_do_not_depend_on_its_batch(method):
    made = tiny_vit()
    model, x = model_of(made, method).train(), mixed(random_images(made, 3))
    together, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(together).square().sum().backward()
    for image in alone.split(1):
        model(image).square().sum().backward()
    assert together.grad.isfinite().all()
    torch.testing.assert_close(together.grad, alone.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_answers_as_it_does_uncompiled(method):
    made = tiny_vit()
    model, x = model_of(made, method), mixed(random_images(made, 4))
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_packs_and_stays_finite(method, dtype):
    made = tiny_vit().to(dtype)
    model = model_of(made, method)
    with torch.no_grad():
        answer, costs = model.forward_with_costs(mixed(random_images(made, 4)))
    assert answer.dtype == dtype
    assert answer.isfinite().all()
    assert max(cost.total for cost in costs) <= model.macs().total
