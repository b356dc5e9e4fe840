"""`evo` on hosts of every kind: what waits, what comes back, and the algorithm written out."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchslim
from hf_hosts import random_pixels, tiny_hf
from patchslim.errors import BadSchedule, BadSetting, NeedsClassToken, Untrained
from patchslim.methods import Signals
from patchslim.methods._method import method_settings
from patchslim.methods.evo import Evo
from patchslim.model.load import load
from patchslim.model.model import SlimModel
from patchslim.model.training_pass import forward_training
from patchslim.schedules.schedule import Rate
from patchslim.testing.trial import noise_images, tiny_host
from patchslim.tokens.reduction import Defer, Fuse, Keep
from patchslim.tokens.tokens import Tokens
from timm_variants import Variant, random_images, tiny_vit
from toy_methods import slim_unchecked

PATCHES = 16  # of the tiny host
STAGES, BLOCKS = (2, 4), (2, 3, 4, 5)
every_form = pytest.mark.parametrize("representative", [True, False], ids=["stand-in", "plain"])


def deep(**changes: Any) -> Any:
    """Makes a tiny host of six blocks with LayerScale, whose head is the mean of its patches."""
    settings = {"depth": 6, "init_values": 0.5, "class_token": True, "global_pool": "avg"}
    return tiny_host(**{**settings, **changes})


def evo(host: nn.Module, at: tuple[int, ...] = STAGES, **settings: Any) -> SlimModel:
    return patchslim.slim(host, "evo", keep_rate=0.5, at=at, **settings)


# ------------------------------------------------------------------------- nothing waits, all wait


@pytest.mark.parametrize("pool", ["avg", "token"])
@torch.no_grad()
def test_a_rate_of_one_is_the_dense_model_bit_for_bit(pool):
    host = deep(global_pool=pool)
    model = patchslim.slim(host, "evo", keep_rate=1.0, at=STAGES)
    assert torch.equal(model(noise_images()), host(noise_images()))
    assert model.counts() == (17,) * 6


@every_form
@torch.no_grad()
def test_rows_are_removed_only_within_units_and_complete_for_the_head(representative):
    model = evo(deep(), (1, 3, 5), representative=representative)
    slow = 1 + 8 + representative
    traced = model.trace(noise_images())
    assert [tokens.x.shape[1] for tokens in traced] == [17, *[slow] * 5] == list(model.counts())
    assert {tokens.dense_features().shape[1] for tokens in traced} == {17}
    assert forward_training(model, noise_images(), tail="full").tokens.x.shape[1] == 17
    whole = [tokens.deferred.whole for tokens in traced[1:]]
    assert {tokens.x.shape[1] for tokens in whole} == {17}
    assert all(tokens.deferred is None for tokens in whole)
    begun = [id(tokens) for tokens in whole]
    assert begun[0] == begun[1] != begun[2] == begun[3] != begun[4]
    assert torch.equal(whole[0].x, whole[1].x)  # the second block of a unit selects nothing
    assert not torch.equal(whole[1].x, whole[2].x)


class Resting(nn.Module):
    """Part of a block that adds nothing."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return torch.zeros_like(x)


def still(**changes: Any) -> Any:
    """Makes a host whose blocks change no row, so that its values identify every row."""
    host = deep(init_values=None, **changes)
    for block in host.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return host


@every_form
@pytest.mark.parametrize("at", [STAGES, BLOCKS])
@torch.no_grad()
def test_every_row_comes_back_to_its_place(representative, at):
    host = still()
    model = evo(host, at, representative=representative)
    entered = model.start_pass().embed(noise_images(), {}, track=False).x
    for tokens in model.trace(noise_images()):
        torch.testing.assert_close(tokens.dense_features(), entered, rtol=0, atol=1e-6)
    _, maps = model.forward_intermediates(noise_images())
    grid = entered[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert len(maps) == 6
    for each in maps:
        torch.testing.assert_close(each, grid, rtol=0, atol=1e-6)


@every_form
@torch.no_grad()
def test_what_waits_moves_by_what_its_stand_in_has_gained(representative):
    model = evo(deep(), (2,), representative=representative)
    before, *after = model.trace(noise_images())[1:]
    for tokens in after:
        kept = tokens.deferred.kept
        waits = torch.ones(3, PATCHES, dtype=torch.bool).scatter(1, kept, value=False)
        back = tokens.dense_features()[:, 1:]
        if not representative:
            assert torch.equal(back[waits], before.x[:, 1:][waits])
            continue
        moved = (back - before.x[:, 1:])[waits].view(3, 8, -1)
        torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-5)
        gained = tokens.x[:, -1] - tokens.deferred.stand_in[:, 0]
        torch.testing.assert_close(moved[:, 0], gained, rtol=0, atol=1e-5)
        assert moved.abs().max() > 0.1


# ------------------------------------------------------------------------ the algorithm written out


def attended(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes attention's output, and how much the class token attends to each row after it."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * attn.scale).softmax(dim=-1)
    mixed = attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return mixed, weights[:, :, 0, 1:].mean(dim=1)


def written_out(
    host: Any,
    x: Tensor,
    at: tuple[int, ...],
    *,
    representative: bool,
    early: float = 1.0,
    tradeoff: float = 0.5,
) -> Tensor:
    """Runs Evo-ViT with sorting, placeholders and the increments of each branch, image by image.

    With drop path, a block draws for attention and then for the feed-forward, as the host does.
    """
    rows = host._pos_embed(host.patch_embed(x))
    leading, patches = rows[:, :1], rows[:, 1:]
    half = patches.shape[1] // 2
    attention: Tensor | None = None
    waiting = gained = order = stale = None

    def together() -> tuple[Tensor, Tensor | None]:
        """Joins all patches and what is known of them, in raster order again."""
        if waiting is None:
            return patches, attention
        slow = patches[:, :half]
        fast = waiting + gained if representative else waiting
        places = order.argsort(dim=1)
        joined = torch.stack([torch.cat(p)[i] for *p, i in zip(slow, fast, places, strict=True)])
        return joined, torch.cat([attention, stale], dim=1).gather(1, places)

    for index, block in enumerate(host.blocks):
        if index in at:
            patches, attention = together()
            order = attention.argsort(dim=1, descending=True)
            patches = torch.stack([p[o] for p, o in zip(patches, order, strict=True)])
            attention, stale = attention.gather(1, order).split([half, half], dim=1)
            patches, waiting = patches.split([half, half], dim=1)
            if representative:
                share = stale / stale.sum(dim=1, keepdim=True)
                stand_in = (share.unsqueeze(2) * waiting).sum(dim=1, keepdim=True)
                patches = torch.cat([patches, stand_in], dim=1)
            gained = torch.zeros_like(patches[:, :1])
        sequence = torch.cat([leading, patches], dim=1)
        mixed, newest = attended(block.attn, block.norm1(sequence))
        if attention is None:
            attention = newest
        else:
            share = early if index < at[0] else tradeoff
            newest = newest[:, : attention.shape[1]]  # without the stand-in's
            attention = (1 - share) * attention + share * newest
        first = block.drop_path1(block.ls1(mixed))
        second = block.drop_path2(block.ls2(block.mlp(block.norm2(sequence + first))))
        if waiting is not None:
            gained = gained + first[:, -1:] + second[:, -1:]
        sequence = sequence + first + second
        leading, patches = sequence[:, :1], sequence[:, 1:]
    patches, _ = together()
    return host.forward_head(host.norm(torch.cat([leading, patches], dim=1)))


@every_form
@pytest.mark.parametrize("at", [STAGES, BLOCKS, (2,)])
@torch.no_grad()
def test_it_is_the_published_algorithm(representative, at):
    for settings in ({}, {"tradeoff": 0.3, "early": 0.7}):
        model = evo(deep(), at, representative=representative, **settings)
        wanted = written_out(
            model.host, noise_images(), at, representative=representative, **settings
        )
        torch.testing.assert_close(model(noise_images()), wanted, rtol=1e-5, atol=1e-5)


@every_form
@pytest.mark.parametrize("at", [STAGES, BLOCKS])
def test_waiting_rows_gain_what_the_stand_in_gains_in_training_with_drop_path(representative, at):
    """The gain of the stand-in is that of the branches not dropped, scaled as they are."""
    model = evo(deep(drop_path_rate=0.5), at, representative=representative).train()
    answers, slopes = [], []
    for run in (model, lambda x: written_out(model.host, x, at, representative=representative)):
        torch.manual_seed(3)
        answer = run(noise_images())
        model.zero_grad()
        answer.square().sum().backward()
        answers.append(answer.detach())
        slopes.append(model.host.blocks[1].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers[0], model.eval()(noise_images()), atol=1e-2)


# ------------------------------------------------------------------------ global class attention


def signals(logits: Tensor, block: int, **more: Any) -> Signals:
    """Makes a block in which the class token attends by these logits (B, n) before the softmax."""
    keys = torch.cat([torch.zeros(len(logits), 1), logits], dim=1)[:, None, :, None]
    return Signals(1, 1.0, torch.ones_like(keys), keys, None, block=block, **more)


def seen(logits: Tensor) -> Tensor:
    """Computes what the class token gives to each patch: a softmax over patches and itself."""
    return nn.functional.pad(logits, (1, 0)).softmax(dim=1)[:, 1:]


def remembered(method: Evo, known: Tensor | None, logits: Tensor, block: int) -> Tensor:
    tokens = Tokens(x=torch.zeros(2, 5, 3), prefix=1, grid=(2, 2), memory=known)
    return method.remember(tokens, signals(logits, block))


def test_the_newest_attention_has_the_weight_that_is_set():
    method = Evo(tradeoff=0.25, early=0.75)
    logits = torch.randn(3, 2, 4)
    first = remembered(method, None, logits[0], 0)
    torch.testing.assert_close(first, seen(logits[0]))
    second = remembered(method, first, logits[1], 1)
    torch.testing.assert_close(second, 0.25 * first + 0.75 * seen(logits[1]))
    wholly = Tokens(x=torch.zeros(2, 5, 3), prefix=1, grid=(2, 2), memory=second)
    waiting = Defer(Keep(torch.arange(4).expand(2, -1))).apply(wholly)  # all go on, in their order
    third = method.remember(waiting, signals(logits[2], 2))
    torch.testing.assert_close(third, 0.75 * second + 0.25 * seen(logits[2]))


def test_learned_tradeoffs_are_one_for_each_block_before_the_last_selection():
    method = Evo(learned=True)
    method.prepare(3, (2, 4))
    assert sorted(method.mixing) == ["1", "2", "3"]
    with torch.no_grad():
        method.mixing["3"].fill_(2.0)
    known, logits = torch.full((2, 4), 0.1), torch.randn(2, 4)
    halves = remembered(method, known, logits, 1)
    torch.testing.assert_close(halves, (known + seen(logits)) / 2)
    share = torch.tensor(2.0).sigmoid()
    mixed = remembered(method, known, logits, 3)
    torch.testing.assert_close(mixed, (1 - share) * known + share * seen(logits))


def test_a_subsampled_grid_keeps_the_sum_of_its_attention():
    method = Evo()
    method.prepare(3, (1,))
    tokens = Tokens(x=torch.zeros(2, 16, 3), prefix=1, grid=(3, 5), memory=torch.rand(2, 15))
    noted = method.remember(tokens, signals(torch.randn(2, 15), 2, stride=2))
    left = noted.unflatten(1, (3, 5))[:, ::2, ::2].flatten(1)
    assert left.shape == (2, 6)
    torch.testing.assert_close(left.sum(dim=1), tokens.memory.sum(dim=1))


@torch.no_grad()
def test_what_waits_keeps_its_attention_and_selection_is_sticky():
    model = evo(deep(), BLOCKS)
    traced = model.trace(noise_images())
    for before, after in itertools.pairwise(traced[1:5]):
        kept = after.deferred.kept
        waits = torch.ones(3, PATCHES, dtype=torch.bool).scatter(1, kept, value=False)
        known, now = before.rejoin().memory, after.rejoin().memory
        assert torch.equal(now[waits], known[waits])
        assert (now.gather(1, kept) != known.gather(1, kept)).all()
    kept = [set(tokens.deferred.kept[0].tolist()) for tokens in traced[2:]]
    again = [len(one & other) for one, other in itertools.pairwise(kept)]
    assert min(again) > 4  # chance alone would keep four of eight


@torch.no_grad()
def test_the_stand_in_is_weighed_by_the_attention_of_those_it_stands_for():
    memory = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    tokens = Tokens(x=torch.randn(1, 5, 3), prefix=1, grid=(2, 2), memory=memory)
    reduction = Evo().choose(tokens, Signals(1, block=1), 3)
    assert isinstance(reduction, Defer)
    assert isinstance(reduction.slow, Fuse)
    assert reduction.slow.kept.tolist() == [[1, 2]]
    left = reduction.apply(tokens)
    torch.testing.assert_close(left.x[:, -1], (tokens.x[:, 1] + 2 * tokens.x[:, 4]) / 3)
    assert torch.equal(left.rejoin().x, tokens.x)


# ------------------------------------------------------------------------------------- other hosts


def served(host: Any, x: Tensor, **settings: Any) -> SlimModel:
    """Slims a host and checks it: rows at every depth, and a finite answer."""
    model = patchslim.slim(host, "evo", keep_rate=0.5, at=(1, 2), **settings)
    with torch.no_grad():
        traced = model.trace(x)
        prefix, entered = traced[0].prefix, traced[0].x.shape[1]
        slow = (entered - prefix) // 2 + prefix + 1
        assert [tokens.x.shape[1] for tokens in traced] == [entered, slow, slow]
        assert {tokens.dense_features().shape[1] for tokens in traced} == {entered}
        logits = model.plan.adapter.logits
        got, dense = logits(model(x)), logits(host(x))
        assert got.shape == dense.shape
        assert got.isfinite().all()
        assert not torch.allclose(got, dense, atol=1e-4)
        same = patchslim.slim(host, "evo", keep_rate=1.0, at=(1, 2), **settings)
        torch.testing.assert_close(logits(same(x)), dense, rtol=1e-5, atol=1e-5)
    return model


def eva(**args: Any) -> Any:
    from timm.models.eva import Eva

    return Variant("eva", Eva, args).build()


def test_a_pooling_query_stands_in_for_a_class_token():
    host = tiny_vit(global_pool="map", class_token=False)
    model = served(host, random_images(host))
    with torch.no_grad():
        traced = model.trace(random_images(host))
        torch.testing.assert_close(traced[0].memory.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("kind", [{}, {"rope_type": "mixed"}], ids=["axial", "mixed"])
def test_rotary_positions_go_with_their_rows(kind):
    """The kept rows have their own cells, and the stand-in that of the row it is most of."""
    host = eva(use_rot_pos_emb=True, global_pool="token", **kind)
    model = served(host, random_images(host))
    with torch.no_grad():
        before, last = model.trace(random_images(host))[-2:]
    parked = last.deferred
    assert torch.equal(last.position[:, :-1], parked.kept)
    waiting = parked.whole.memory.scatter(1, parked.kept, 0.0)
    assert torch.equal(last.position[:, -1], waiting.argmax(dim=1))
    assert torch.equal(before.rejoin().memory, parked.whole.memory)


def test_registers_and_distillation_stay():
    for host, prefix in (
        (tiny_vit(reg_tokens=3), 4),
        (eva(use_rot_pos_emb=True, num_reg_tokens=2), 3),
    ):
        model = served(host, random_images(host))
        with torch.no_grad():
            last = model.trace(random_images(host))[-1]
        assert (last.prefix, last.deferred.whole.prefix) == (prefix, prefix)


def test_a_distilled_host_is_served():
    from timm.models.deit import VisionTransformerDistilled

    host = Variant("distilled", VisionTransformerDistilled, {}).build()
    served(host, random_images(host))


def test_transformers_is_served():
    host = tiny_hf("ViTForImageClassification")
    served(host, random_pixels(host))


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("settings", [{"tradeoff": 0.0}, {"tradeoff": 1.5}, {"early": 0.0}])
def test_weights_of_zero_or_above_one_are_refused(settings):
    with pytest.raises(BadSetting, match=f"{next(iter(settings))}=.*above 0 up to 1"):
        Evo(**settings)


def test_learning_without_a_representative_is_refused():
    with pytest.raises(BadSetting, match="representative=True"):
        Evo(learned=True, representative=False)


def test_selecting_in_the_first_block_is_refused():
    for budget in ({"keep_rate": 0.5, "at": (0, 2)}, {"r": 2}, {"keep": [9, 9, 9, 9, 9, 9]}):
        with pytest.raises(BadSchedule, match=r"in block 0\. Give keep_rate=0.5, at=\(2, 4\)"):
            patchslim.slim(deep(), "evo", **budget)


def test_a_host_without_a_class_token_is_refused():
    with pytest.raises(NeedsClassToken, match="Methods that need none"):
        evo(deep(class_token=False))


# -------------------------------------------------------------------- files, graphs, types, threads


@torch.no_grad()
def test_what_is_saved_gives_the_same_answer(tmp_path):
    host = deep()
    with pytest.warns(Untrained):
        model = evo(host, learned=True)
    for place, each in enumerate(model.method.mixing.values()):
        each.fill_(2.0 - place)
    model.save(tmp_path / "made")
    again = load(tmp_path / "made", model=deep())
    assert torch.equal(again(noise_images()), model(noise_images()))
    assert method_settings(again.method) == method_settings(model.method)
    for name, each in model.method.mixing.items():
        assert torch.equal(again.method.mixing[name], each)
    plain = evo(host)
    assert not torch.equal(again(noise_images()), plain(noise_images()))


@pytest.mark.slow  # one selection is a law by default
@torch.no_grad()
def test_two_selections_export_for_any_batch():
    model = evo(deep(depth=4), (1, 3))
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    graph = torch.export.export(model, (noise_images(),), dynamic_shapes={"images": batch}).module()
    for count in (1, 5):
        torch.testing.assert_close(
            graph(noise_images(count)), model(noise_images(count)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_form
@torch.no_grad()
def test_half_precision_stays_finite(dtype, representative):
    model = evo(deep().to(dtype), representative=representative)
    got = model(noise_images().to(dtype))
    assert got.dtype == dtype
    assert got.isfinite().all()


@torch.no_grad()
def test_attention_that_has_underflowed_gives_no_nan():
    """If nobody attends to the rows that wait, their stand-in has no weights to share out."""
    memory = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    tokens = Tokens(x=torch.randn(1, 5, 3), prefix=1, grid=(2, 2), memory=memory)
    left = Evo().choose(tokens, Signals(1, block=1), 3).apply(tokens)
    assert left.x.isfinite().all()


@torch.no_grad()
def test_two_threads_get_the_answers_of_one():
    model = evo(deep())
    batches = [noise_images(1 + i % 3) + i for i in range(12)]
    wanted = [model(each) for each in batches]
    with ThreadPoolExecutor(2) as pool:
        for got, want in zip(pool.map(model, batches), wanted, strict=True):
            torch.testing.assert_close(got, want)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    model = evo(deep(), BLOCKS)
    x = noise_images(4)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x.flip(0)).flip(0), model(x), rtol=1e-5, atol=1e-5)


def test_what_the_schedule_says_is_what_happens():
    model = slim_unchecked(deep(), Evo(), Rate(0.5, STAGES))
    assert model.plan.decision_blocks == STAGES
    tokens = model.start_pass().embed(noise_images(1), {}, track=False)
    steps = model.start_pass().steps(tokens, tail="full", layered=True)
    assert [step.index for step in steps if step.place is not None] == [2, 3, 4, 5]


@torch.no_grad()
def test_one_method_may_serve_two_models():
    """What it does follows from the tokens, and not from the schedule that it last got."""
    mine, images = patchslim.find_method("evo")(), noise_images()
    early = patchslim.slim(tiny_host(depth=6), mine, keep_rate=0.5, at=(3, 5))
    wanted = early(images)
    patchslim.slim(tiny_host(depth=6), mine, keep_rate=0.5, at=(1, 2))
    assert torch.equal(early(images), wanted)
