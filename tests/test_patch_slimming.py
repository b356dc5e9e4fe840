"""Patch Slimming: the score, the search, the slim block and the gates, each against its definition.

What is computed cleverly in the package is computed here by brute force, in float64: head paths are
listed, maps are N x N with rows of zeros, blocks are the host's own modules.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
import torch

import patchslim
import patchslim.tokens.attention
from comparison import is_close
from hf_hosts import random_pixels, tiny_hf
from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.calibration.patch_slimming.gates import RIDGE, fit_gate
from patchslim.calibration.patch_slimming.importance import (
    attended_energy,
    importance_scores,
    read_strength,
)
from patchslim.calibration.patch_slimming.layer_search import LayerSearch
from patchslim.errors import BadSetting, Untrained, WrongInput
from patchslim.methods import Place
from patchslim.methods._method import method_settings
from patchslim.methods._ranking import centre_order, covering_order, format_order, parse_order
from patchslim.methods.identity import Identity
from patchslim.methods.patch_slimming import PatchSlimming
from patchslim.methods.patch_slimming_dynamic import PatchSlimmingDynamic
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.model.step import BlockStep
from patchslim.model.training_pass import forward_training
from patchslim.runs.progress import ignore_progress
from patchslim.schedules.schedule import Constant, Counts
from patchslim.testing.trial import noise_images, tiny_host
from patchslim.tokens.attention import attention_map
from patchslim.tokens.reduction import Fixed
from small_hosts import HOSTS
from timm_variants import random_images
from toy_methods import slim_unchecked

FREE = PatchSlimmingConfig(mode="free", batch=4, probe=4, cover=0.0)
DEPTH, PATCHES = 4, 16
READOUTS = [("class", 0), ("average", 5), ("query", 5)]  # and patches that are left to the head
every_readout = pytest.mark.parametrize(("readout", "outputs"), READOUTS)
HUGGING = (
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2WithRegistersForImageClassification swiglu",
)


def deciding(index, entering, left):
    return BlockStep(index, entering, left, place=Place.ON_QUERIES)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The score.


def by_paths(weights, entered, later):
    """Computes the score by its definition (eq. 6): a sum over all choices of one head a layer."""
    heads, rows = weights.shape[1:3]
    total = torch.zeros(len(weights), rows, dtype=weights.dtype)
    for own, *others in product(range(heads), repeat=1 + len(later)):
        a = torch.eye(rows, dtype=weights.dtype).expand(len(weights), -1, -1)
        for layer, head in zip(later, others, strict=True):
            a = layer[:, head] @ a
        u = weights[:, own] @ entered.abs()
        total += (a.unsqueeze(3) * u.unsqueeze(1)).square().sum(dim=(1, 3))
    return total / heads ** (1 + len(later))


@pytest.mark.parametrize(
    "given_out",
    [(), (1,), (4, 4), (3, 1), (4, 3, 2), (3, 2, 1)],
    ids=lambda rows: "-".join(map(str, rows)) or "no later layer",
)
def test_the_score_is_the_mean_over_all_paths_of_heads(given_out):
    weights, entered = draw(3, 2, 4, 4).softmax(dim=3), draw(3, 4, 5, seed=1)
    later = [
        draw(3, 2, after, before, seed=before + 10 * after).softmax(dim=3)
        for before, after in pairwise((4, *given_out))
    ]
    wanted = by_paths(weights, entered, later)
    torch.testing.assert_close(
        importance_scores(weights, entered, later), wanted, rtol=1e-12, atol=0
    )
    alone = by_paths(torch.eye(4).double().expand(3, 2, 4, 4), torch.ones(3, 4, 1).double(), later)
    torch.testing.assert_close(read_strength(later, weights), alone, rtol=1e-12, atol=0)
    kept = by_paths(weights, entered, [])
    torch.testing.assert_close(attended_energy(weights, entered), kept, rtol=1e-12, atol=0)


def test_the_maps_are_read_from_the_last_layer_down():
    weights, first, last = (draw(1, 2, 4, 4, seed=seed).softmax(dim=3) for seed in range(3))
    right, wrong = read_strength([first, last], weights), read_strength([last, first], weights)
    by_hand = torch.zeros(4).double()
    for i, j in product(range(2), range(2)):
        by_hand += (last[0, j] @ first[0, i]).square().sum(dim=0) / 4
    torch.testing.assert_close(right[0], by_hand, rtol=1e-12, atol=0)
    assert not torch.allclose(right, wrong, rtol=1e-3)


def test_scores_stay_finite_in_single_precision():
    later = [draw(1, 12, 20, 20).float().softmax(dim=3)] * 40  # a sum over 12 ** 40 paths is not
    scores = importance_scores(later[0], 1e3 * torch.ones(1, 20, 8), later)
    assert scores.isfinite().all()
    assert (scores > 0).all()


# The slim block.


def shuffled(grid, seed=0):
    count = grid[0] * grid[1]
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def check_blocks(host, x):
    """Checks that every block outputs the dense block's own rows, in both forms of the gather."""
    adapter = patchslim.find_adapter(host)
    dense = slim_unchecked(host, Identity(), Constant(0))
    tokens = dense.start_pass().embed(x, {}, track=False)
    order, prefix, rows = shuffled(tokens.grid), tokens.prefix, tokens.x.shape[1]
    model = slim_unchecked(host, PatchSlimming(order=format_order(tokens.grid, order)), Constant(0))
    cells = torch.tensor(order)
    for index in range(len(adapter.blocks(host))):
        whole = dense.start_pass().run_block(BlockStep(index, rows, rows), tokens)
        first = model.start_pass().run_block(deciding(index, rows, prefix + 7), tokens)
        assert first.cells().tolist() == [order[:7]] * len(x)
        assert is_close(first.x, Fixed(7, cells).move(whole.x, prefix=prefix))
        fewer = Fixed(7, cells).apply(tokens)
        rest = dense.start_pass().run_block(BlockStep(index, prefix + 7, prefix + 7), fewer)
        second = model.start_pass().run_block(deciding(index, prefix + 7, prefix + 3), fewer)
        assert second.cells().tolist() == [order[:3]] * len(x)
        assert is_close(second.x, rest.x[:, : prefix + 3])
        tokens = whole


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", HOSTS.values(), ids=HOSTS)
def test_a_slim_block_outputs_rows_of_the_dense_block(variant, dtype):
    host = variant.build().to(dtype)
    check_blocks(host, random_images(host))


@torch.no_grad()
@pytest.mark.parametrize("label", HUGGING)
def test_a_slim_block_of_transformers_outputs_rows_of_the_dense_block(label):
    host = tiny_hf(label)
    check_blocks(host, random_pixels(host))


@torch.no_grad()
def test_a_slim_block_outputs_rows_of_the_hosts_own_module():
    host = tiny_host().double()
    order = shuffled((4, 4))
    model = slim_unchecked(host, PatchSlimming(order=format_order((4, 4), order)), Constant(0))
    tokens = model.start_pass().embed(noise_images().double(), {}, track=False)
    at = [0, *(1 + cell for cell in order[:5])]
    for index, block in enumerate(host.blocks):
        after = model.start_pass().run_block(deciding(index, 17, 6), tokens)
        assert is_close(after.x, block(tokens.x)[:, at])
        tokens = tokens.with_x(block(tokens.x))


# The search, on a host of four blocks, compared with the host's own modules.


def make_search(readout="class", outputs=0, config=FREE):
    """Makes a search on three images in two batches."""
    host = tiny_host(depth=DEPTH, readout=readout).double()
    batches = noise_images().double().split([2, 1])
    student = copy.deepcopy(host) if config.epochs else host
    return LayerSearch(
        slim_unchecked(host, Identity(), Constant(0)), student, batches, config, outputs
    )


def steps(searching, tolerance=0.02):
    """Yields the result before each block, the block, and the result after it."""
    result = searching.begin()
    for block in searching.blocks(result):
        after = searching.search_layer(
            result, block, tolerance=tolerance, kept=None, progress=ignore_progress
        )
        yield result, block, after
        result = after


def embedded(host):
    return host.norm_pre(host.pos_drop(host._pos_embed(host.patch_embed(noise_images().double()))))


def masked_maps(host, masks):
    """Computes in N x N coordinates what enters each block and its maps, with dropped rows zero.

    `masks` (N,) say for each block which rows it outputs.
    """
    z, alive = embedded(host), torch.ones_like(masks[0])
    for block, mask in zip(host.blocks, masks, strict=True):
        attn, (batch, rows, _) = block.attn, z.shape
        qkv = attn.qkv(block.norm1(z)).view(batch, rows, 3, attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = torch.zeros(rows).double().masked_fill(~alive, -torch.inf)
        weights = attention_map(q, k, scale=attn.scale, bias=bias) * mask[:, None]
        yield z, weights
        mixed = z + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        z, alive = (mixed + block.mlp(block.norm2(mixed))) * mask[:, None], mask


def masks_of(result, block, prefix):
    """Makes masks of the rows that each block outputs, if those up to `block` are dense."""
    masks = torch.zeros(DEPTH, PATCHES + prefix, dtype=torch.bool)
    masks[:, :prefix] = True
    masks[: block + 1] = True
    for index, kept in result.kept().items():
        masks[index, [prefix + cell for cell in result.cells[:kept]]] = True
    return list(masks)


@torch.no_grad()
@every_readout
def test_the_search_scores_as_the_paper_does(readout, outputs):
    searching = make_search(readout, outputs)
    prefix = searching.features.prefix
    for result, block, after in steps(searching):
        masks = masks_of(result, block, prefix)
        entered, maps = zip(*masked_maps(searching.student, masks), strict=True)
        wanted = by_paths(maps[block], entered[block], maps[block + 1 :])[:, prefix:]
        batches = searching.scores(result, block)
        assert [len(each) for each in batches] == [2, 1]
        torch.testing.assert_close(torch.cat(batches), wanted, rtol=1e-9, atol=0)
        above = result.kept().get(block + 1, outputs)
        mean = wanted.mean(dim=0)
        rest = sorted(set(range(PATCHES)) - set(result.cells[:above]), key=lambda cell: -mean[cell])
        assert after.cells == (*result.cells[:above], *rest)


@torch.no_grad()
@every_readout
def test_each_block_keeps_no_more_than_the_one_before(readout, outputs):
    *_, (_, _, result) = steps(make_search(readout, outputs), tolerance=0.2)
    counts = [result.kept()[block] for block in range(DEPTH - 1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] >= max(outputs, 1)
    assert counts[0] < PATCHES, "the test needs a tolerance that removes something"
    assert sorted(result.cells) == list(range(PATCHES))


@torch.no_grad()
def test_a_class_token_is_all_that_the_search_begins_with():
    searching = make_search()
    assert searching.begin().layers == ()
    assert searching.rows_read == 1
    assert list(searching.blocks(searching.begin())) == [2, 1, 0]


@torch.no_grad()
def test_with_a_head_that_reads_all_the_search_begins_with_the_outputs():
    searching = make_search("average", 5)
    result = searching.begin()
    assert result.kept() == {DEPTH - 1: 5}
    everything = [torch.ones(PATCHES, dtype=torch.bool)] * DEPTH
    *_, (entered, weights) = masked_maps(searching.student, everything)
    mean = attended_energy(weights, entered).mean(dim=0)
    assert list(result.cells) == mean.argsort(descending=True).tolist()
    assert list(searching.blocks(result)) == [2, 1, 0]


def error_by_hand(searching, after, block, count, above):
    """Computes the next block's features with the slim model, and with the host's modules."""
    host, prefix = searching.student, searching.features.prefix
    kept = [PATCHES] * block + [count] + [above or count] * (DEPTH - block - 1)
    rule = Counts(tuple(prefix + each for each in kept), prefix + PATCHES, prefix)
    model = slim_unchecked(host, PatchSlimming(order=format_order((4, 4), list(after.cells))), rule)
    got = model.trace(noise_images().double())[block + 1]
    x = embedded(host)
    for each in host.blocks[: block + 2]:
        x = each(x)
    if not above:
        return (got.x[:, :prefix] - x[:, :prefix]).square().mean().item()
    at = [*range(prefix), *(prefix + got.cells()[0]).tolist()]
    return (got.x - x[:, at]).square().mean().item()


@torch.no_grad()
@every_readout
@pytest.mark.parametrize("tolerance", [1e-9, 0.02, 0.2])
def test_the_error_of_a_candidate_is_that_of_the_slim_model(readout, outputs, tolerance):
    searching = make_search(readout, outputs)
    for result, block, after in steps(searching, tolerance):
        above = result.kept().get(block + 1, outputs)
        layer = after.layers[-1]
        assert dict(layer.curve)[PATCHES] < 1e-20
        for count, error in layer.curve:
            wanted = error_by_hand(searching, after, block, count, above)
            assert error == pytest.approx(wanted, rel=1e-8, abs=1e-20)
        limit = tolerance * layer.scale * (1 if outputs or block < DEPTH - 2 else 8)
        assert dict(layer.curve)[layer.kept] == layer.error <= limit
        if layer.kept > max(above, 1):
            assert dict(layer.curve)[layer.kept - 1] > limit


@every_readout
def test_tuning_lowers_the_error_and_changes_that_block_alone(readout, outputs):
    searching = make_search(
        readout, outputs, PatchSlimmingConfig.of({"mode": "fast", "epochs": 10, "lr": 1e-4})
    )
    before = copy.deepcopy(searching.student.state_dict())
    for _, block, after in steps(searching):
        layer = after.layers[-1]
        if layer.kept < PATCHES:
            assert layer.error < dict(layer.curve)[layer.kept]
        now = searching.student.state_dict()
        changed = {name for name, value in now.items() if not torch.equal(value, before[name])}
        assert changed
        assert all(name.startswith(f"blocks.{block}.") for name in changed)
        before = copy.deepcopy(now)
    untouched = tiny_host(depth=DEPTH, readout=readout).double()
    for name, value in searching.dense.host.state_dict().items():
        assert torch.equal(value, untouched.state_dict()[name]), name
    assert all(each.requires_grad and each.grad is None for each in searching.student.parameters())


@torch.no_grad()
def test_every_beginning_of_a_covering_order_is_spread_evenly():
    order = covering_order((14, 14))
    assert sorted(order) == list(range(196))
    for count in (25, 49, 98):
        kept = torch.tensor(order[:count])
        at = torch.stack([kept // 14, kept % 14], dim=1).double()
        apart = torch.cdist(at, at) + torch.eye(count) * 99
        assert apart.min() >= (196 / count) ** 0.5 / 2  # no two are next to each other
        quarters = (at[:, 0] // 7 * 2 + at[:, 1] // 7).long().bincount(minlength=4)
        assert quarters.max() - quarters.min() <= 3


def test_coverage_counts_beside_the_score():
    def first(cover):
        *_, (_, _, result) = steps(make_search(config=replace(FREE, cover=cover)), tolerance=0.1)
        return result.cells

    assert first(1e6) == tuple(covering_order((4, 4)))
    assert first(0.0) != first(1e6)


def test_the_static_order_is_the_prior_of_each_image():
    host = tiny_host(depth=DEPTH)
    images = [(noise_images(6), None)]
    config = replace(FREE, cover=1e6)
    model = patchslim.calibrate(
        host, images, "patch_slimming_dynamic", macs=0.5, config=config
    ).model
    fixed = patchslim.calibrate(host, images, macs=0.5, config=config).model
    x = noise_images(4)
    torch.testing.assert_close(model(x), fixed(x))  # with so heavy a prior the gates have no effect
    with pytest.raises(BadSetting, match="order"):
        PatchSlimmingDynamic(order="2x2 0 1 2", prior=1.0)


def test_features_that_do_not_fit_are_computed_again(monkeypatch):
    known = list(steps(make_search()))
    monkeypatch.setattr("patchslim.calibration.patch_slimming.layer_search.MAX_FEATURE_BYTES", 0)
    searching = make_search()
    assert list(steps(searching)) == known
    assert len(searching.features._known) <= 4


def test_the_scale_is_the_mean_square_of_the_features():
    searching = make_search()
    (_, _, after), *_ = steps(searching)
    x = embedded(searching.student)
    for each in searching.student.blocks:
        x = each(x)
    assert after.layers[0].scale == pytest.approx(x[:, 0].square().mean().item())


# Whole models.


@cache
def calibrated(method="patch_slimming", readout="class", outputs=0.0):
    """Calibrates a model of four blocks to seven tenths of its operations."""
    host = tiny_host(depth=DEPTH, img_size=24, readout=readout)
    batches = [(noise_images(6, size=24), None)]
    config = PatchSlimmingConfig.of({**FREE.to_json(), "outputs": outputs})
    return patchslim.calibrate(host, batches, method, macs=0.7, config=config).model


every_kind = pytest.mark.parametrize(
    ("readout", "outputs"), [("class", 0.0), ("average", 0.4), ("query", 0.4)]
)
every_method = pytest.mark.parametrize("method", ["patch_slimming", "patch_slimming_dynamic"])


@torch.no_grad()
@every_kind
@every_method
def test_what_a_block_keeps_is_part_of_what_the_one_before_kept(method, readout, outputs):
    model, x = calibrated(method, readout, outputs), noise_images(4, size=24)
    cells = [tokens.cells() for tokens in model.trace(x)]
    prefix = int(readout == "class")
    assert [each.shape[1] + prefix for each in cells] == list(model.counts())
    assert cells[0].shape[1] > cells[-1].shape[1] > 0
    for image in range(4):
        for before, after in pairwise(cells):
            assert len(set(after[image].tolist())) == after.shape[1]
            assert set(after[image].tolist()) <= set(before[image].tolist())
    same = all(set(cells[-1][0].tolist()) == set(each.tolist()) for each in cells[-1])
    assert same == (method == "patch_slimming")


@torch.no_grad()
@every_kind
@every_method
def test_the_budget_is_met_and_the_tail_keeps_the_answer(method, readout, outputs):
    model, x = calibrated(method, readout, outputs), noise_images(4, size=24)
    assert 0.6 < model.macs().total / model.dense_macs().total <= 0.7
    assert model.plan.tail == ("full" if outputs else "exact")
    plan = plan_schedule(model.host, model.plan.adapter, model.method, model.schedule, "full")
    whole = SlimModel(model.host, plan).eval()
    assert is_close(model(x), whole(x))


CHOOSING = ("topk", "sort", "argmax", "argmin", "gather", "scatter", "nonzero", "where", "softmax")
INDEXING = ("index_select", "index", "take", "embedding", "masked_select")


def leaves(node):
    """Lists the inputs from which a value of a graph is computed."""
    if not node.all_input_nodes:
        return {node.name}
    return set().union(*map(leaves, node.all_input_nodes))


@pytest.mark.slow
@torch.no_grad()
def test_nothing_is_chosen_in_an_exported_graph():
    model, x = calibrated(), noise_images(3, size=24)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes={"images": batch})
    for count in (1, 5):
        again = noise_images(count, size=24)
        assert is_close(program.module()(again), model(again))
    graph = copy.deepcopy(program.graph)
    graph.eliminate_dead_code()  # the cell of each row, which nobody reads in this host
    calls = [node for node in graph.nodes if node.op == "call_function"]
    names = [str(node.target).removeprefix("aten.").partition(".")[0] for node in calls]
    assert not [name for name in names if name.removeprefix("_") in CHOOSING]
    assert "arange" not in names
    assert names.count("scaled_dot_product_attention") == DEPTH
    (buffer,) = [
        each.arg.name
        for each in program.graph_signature.input_specs
        if each.target == "method.cells"
    ]
    gathers = [
        node for node, name in zip(calls, names, strict=True) if name.removeprefix("_") in INDEXING
    ]
    assert len(gathers) == 1
    (rows, dim, index) = gathers[0].args
    assert dim == 1
    assert leaves(index) == {buffer}
    assert "images" in leaves(rows)


# The gates.


@torch.no_grad()
@every_readout
def test_a_gate_is_the_ridge_regression_of_the_log_of_the_score(readout, outputs):
    searching = make_search(readout, outputs)
    *_, (_, _, result) = steps(searching, tolerance=0.2)
    for block in range(DEPTH - 1):
        weights, r_squared = fit_gate(searching, result, block)
        layers = tuple(each for each in result.layers if each.block > block)
        known = type(result)(result.cells, layers)
        scores = torch.cat(searching.scores(known, block)).log()
        tokens = torch.cat([each.x for each in searching.features.tokens_before(block)])
        patches = tokens[:, searching.features.prefix :]
        normed = (patches - patches.mean(2, keepdim=True)) / (
            patches.var(2, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        a = (normed - normed.mean(1, keepdim=True)).flatten(0, 1)
        y = (scores - scores.mean(1, keepdim=True)).flatten()[:, None]
        ridge = RIDGE * a.square().sum(dim=0).mean()
        stacked = torch.cat([a, ridge.sqrt() * torch.eye(16).double()])
        wanted = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(16, 1).double()])).solution
        torch.testing.assert_close(weights, wanted.T, rtol=1e-8, atol=1e-8)
        left = (y - a @ wanted).square().sum() / y.square().sum()
        assert r_squared == pytest.approx(1 - left.item())
        assert 0 < r_squared <= 1


@torch.no_grad()
def test_the_gates_of_the_model_are_the_fitted_ones():
    """Gates order patches that they were fitted to much as the exact score does."""
    model = calibrated("patch_slimming_dynamic")
    assert set(model.method.gates) == {str(block) for block in model.plan.decision_blocks}
    dense = slim_unchecked(model.host, Identity(), Constant(0))
    search = LayerSearch(dense, model.host, [noise_images(6, size=24)], FREE, 0)
    result = search.begin()
    for block in search.blocks(result):
        kept = model.counts()[block] - 1
        result = search.search_layer(
            result, block, tolerance=1.0, kept=kept, progress=ignore_progress
        )
    for block in model.plan.decision_blocks:
        weights, r_squared = fit_gate(search, result, block)
        assert is_close(model.method.gates[str(block)].worth.weight, weights.float())
        assert r_squared > 0.1


def trained(readout, outputs, tail=None, dtype=torch.float32):
    """Makes a calibrated dynamic model in training mode, as a copy."""
    model = copy.deepcopy(calibrated("patch_slimming_dynamic", readout, outputs)).to(dtype)
    plan = model.plan
    model.plan = plan_schedule(
        model.host, plan.adapter, model.method, model.schedule, tail or plan.tail
    )
    return model.train()


def removed(model, x):
    """Finds for each deciding block the cells that are left in evaluation, as a mask."""
    traced = model.eval().trace(x)
    nothing = torch.zeros(len(x), model.plan.shape.grid[0] ** 2)
    return {b: nothing.scatter(1, traced[b].cells(), 1.0) for b in model.plan.decision_blocks}


@every_kind
def test_masks_in_training_are_hard_exact_and_nested(readout, outputs):
    model, x = trained(readout, outputs), noise_images(4, size=24)
    run = forward_training(model, x, tail=model.plan.tail)
    counts = dict(enumerate(model.counts()))
    before = torch.ones(4, 36)
    assert [each.block for each in run.decisions] == list(model.plan.decision_blocks)
    for each in run.decisions:
        assert set(each.alive.unique().tolist()) == {0.0, 1.0}
        left = counts[each.block] - int(readout == "class")
        assert each.alive.sum(dim=1).tolist() == [left] * 4
        assert (each.alive <= before).all()
        before = each.alive


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tail", ["exact", "full"])
@every_kind
@torch.no_grad()
def test_masking_in_training_is_removal(readout, outputs, tail, dtype, monkeypatch):
    """The faint weight of masked tokens is made zero in float64, to show the rest is equal."""
    if dtype == torch.float64:
        monkeypatch.setattr(patchslim.tokens.attention, "SOFT_MASK_EPS", 1e-15)
    model, x = trained(readout, outputs, tail, dtype), noise_images(4, size=24).to(dtype)
    run = forward_training(model, x, tail=tail)
    stays = removed(model, x)
    for each in run.decisions:
        assert torch.equal(each.alive.float(), stays[each.block])
    off = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(run.output, model(x), rtol=off, atol=off)


@every_kind
def test_gradients_reach_every_gate_and_the_whole_host(readout, outputs):
    model, x = trained(readout, outputs), noise_images(4, size=24)
    noise = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    (forward_training(model, x, tail=model.plan.tail).output * noise).sum().backward()
    assert len(model.method.gates) >= 2
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# The settings.


@pytest.mark.parametrize(
    "order",
    [
        "2x2",
        "2x2 0 1 2",
        "2x2 0 1 2 2",
        "2x2 0 1 2 4",
        "2x2 0 1 2 3 4",
        "2x2 -1 0 1 2",
        "2x2 0 1 2 three",
        "2x2 0,1,2,3",
        "4 0 1 2 3",
        "x 0 1 2 3",
        "0 1 2 3",
        "-2x-2 0 1 2 3",
        "0x0",
        " ",
    ],
)
def test_an_order_must_name_every_cell_once(order):
    with pytest.raises(BadSetting, match="every cell of it once"):
        PatchSlimming(order=order)
    with pytest.raises(BadSetting, match="every cell of it once"):
        patchslim.slim(tiny_host(), "patch_slimming", r=2, order=order)


def test_an_order_is_written_as_it_is_read():
    assert format_order((2, 3), [4, 0, 1, 2, 5, 3]) == "2x3 4 0 1 2 5 3"
    assert parse_order("2x3 4 0 1 2 5 3") == ((2, 3), [4, 0, 1, 2, 5, 3])


@torch.no_grad()
def test_the_order_decides_what_stays():
    order = shuffled((4, 4))
    host = tiny_host()
    model = patchslim.slim(host, "patch_slimming", r=4, order=format_order((4, 4), order))
    traced = model.trace(noise_images())
    assert [each.cells().tolist() for each in traced] == [[order[:n]] * 3 for n in (12, 8, 4)]
    for cell in order[:4]:
        assert (traced[-1].origin[:, cell] == order.index(cell)).all()
    assert (traced[-1].origin >= 0).sum(dim=1).tolist() == [4, 4, 4]


def plain(**changes):
    """Makes a host that can be saved."""
    import timm

    settings = {"img_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        host = timm.create_model("vit_tiny_patch16_224", num_classes=5, **settings | changes)
    return host.eval()


@torch.no_grad()
@every_method
def test_saved_models_come_back_with_their_positions(method, tmp_path):
    x = noise_images(4, size=24)
    config = PatchSlimmingConfig.of(FREE.to_json())
    model = patchslim.calibrate(plain(), [(x, None)], method, macs=0.6, config=config).model
    model.save(tmp_path / "saved")
    again = patchslim.load(tmp_path / "saved")
    assert method_settings(again.method) == method_settings(model.method)
    assert again.schedule == model.schedule
    assert again.calibrated == model.calibrated
    assert torch.equal(again(x), model(x))
    for one, other in zip(again.trace(x), model.trace(x), strict=True):
        assert torch.equal(one.cells(), other.cells())


@torch.no_grad()
def test_positions_of_another_grid_are_refused():
    host = plain(dynamic_img_size=True)
    model = patchslim.slim(
        host, "patch_slimming", r=2, order=format_order((6, 6), shuffled((6, 6)))
    )
    assert model(noise_images(2, size=24)).isfinite().all()
    with pytest.raises(WrongInput, match=r"calibrated for a grid of 6x6 patches, .* give 4x4"):
        model(noise_images(2, size=16))


@torch.no_grad()
def test_without_calibration_the_centre_stays_with_a_warning():
    with pytest.warns(Untrained, match=r"PatchSlimming has not been calibrated.*centre"):
        model = patchslim.slim(tiny_host(), "patch_slimming", keep_rate=0.25, at=(1,))
    assert sorted(model.trace(noise_images())[1].cells()[0].tolist()) == [5, 6, 9, 10]
    with pytest.warns(Untrained, match="PatchSlimmingDynamic has not been calibrated"):
        patchslim.slim(tiny_host(), "patch_slimming_dynamic", r=2)


def test_the_centre_is_the_middle_of_the_grid():
    assert centre_order((3, 3))[0] == 4
    assert set(centre_order((3, 3))[-4:]) == {0, 2, 6, 8}
    assert centre_order((1, 4)) == [1, 2, 0, 3]
    assert sorted(centre_order((5, 7))) == list(range(35))


@pytest.mark.filterwarnings("ignore::patchslim.errors.Untrained")
def test_gates_serve_only_the_host_that_they_were_made_for():
    mine = PatchSlimmingDynamic()
    patchslim.slim(plain(), mine, r=4)
    own = r"a Gate for 32 channels in blocks \(0, 1, 2\)"
    with pytest.raises(BadSetting, match=rf"{own}.* 16 channels"):
        patchslim.slim(tiny_host(img_size=24), mine, r=4)
    with pytest.raises(BadSetting, match=rf"{own}.*blocks \(0, 1, 2, 3\)"):
        patchslim.slim(plain(depth=4), mine, r=4)
    patchslim.slim(plain(), mine, keep_rate=0.5, at=(1,))
    assert list(mine.gates) == ["0", "1", "2"]
