"""Reductions, tokens and attention by themselves, against the same arithmetic written as loops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from patchslim.errors import BadSchedule, NeedsClassToken
from patchslim.methods import Signals
from patchslim.tokens.attention import (
    MAX_EXPLICIT_KEYS,
    SOFT_MASK_EPS,
    attention,
    attention_bias,
    attention_map,
)
from patchslim.tokens.merging import Merge
from patchslim.tokens.mixing import Mix
from patchslim.tokens.reduction import Defer, Fixed, Fuse, Keep, Mask
from patchslim.tokens.rows import take, with_prefix
from patchslim.tokens.tokens import Tokens

CASES = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shuffled(batch, rows, seed):
    noise = torch.Generator().manual_seed(seed)
    return torch.rand(batch, rows, generator=noise).argsort(dim=1)


@st.composite
def decisions(draw_from):
    """Draws two images, some rows, how many stay, and a reduction of each kind."""
    rows = draw_from(st.integers(2, 12))
    keep = draw_from(st.integers(1, rows - 1))
    seed = draw_from(st.integers(0, 1000))
    order = shuffled(2, rows, seed)
    into = torch.randint(keep, (2, rows - keep), generator=torch.Generator().manual_seed(seed))
    share = torch.rand(2, rows, generator=torch.Generator().manual_seed(seed))
    kept = order[:, :keep]
    reductions = {
        "keep": Keep(kept),
        "merge": Merge(kept, gone=order[:, keep:], into=into),
        "fuse": Fuse(kept, share=share.double().scatter(1, kept, 0.0)),
        "fixed": Fixed(keep, order[0]),
        "first": Fixed(keep),
    }
    return rows, reductions[draw_from(st.sampled_from(sorted(reductions)))]


def kept_rows(reduction, rows):
    """Lists the old rows that are left as rows of their own (2, m)."""
    if not isinstance(reduction, Fixed):
        return reduction.kept
    order = torch.arange(rows) if reduction.order is None else reduction.order
    return order[: reduction.count].expand(2, -1)


def groups(reduction, image, rows):
    """Lists the old rows of every new row, the one that represents it first."""
    kept = kept_rows(reduction, rows)[image].tolist()
    made = [[row] for row in kept]
    if isinstance(reduction, Merge):
        for row, place in zip(
            reduction.gone[image].tolist(), reduction.into[image].tolist(), strict=True
        ):
            made[place].append(row)
    if isinstance(reduction, Fuse):
        others = [row for row in range(rows) if row not in kept]
        made.append(sorted(others, key=lambda row: -float(reduction.share[image, row])))
    return made


@CASES
@given(decisions(), st.integers(0, 3))
def test_rows_are_added_or_averaged_as_written(decision, prefix):
    rows, reduction = decision
    t = draw(2, prefix + rows, 3, 2)
    weight = draw(2, rows).abs() + 0.1
    added = reduction.move(t, prefix=prefix)
    averaged = reduction.move(t, weight=weight, prefix=prefix)
    for image in range(2):
        assert torch.equal(added[image, :prefix], t[image, :prefix])
        assert torch.equal(averaged[image, :prefix], t[image, :prefix])
        for place, group in enumerate(groups(reduction, image, rows)):
            members = t[image, prefix:][group]
            torch.testing.assert_close(added[image, prefix + place], members.sum(dim=0))
            share = weight[image, group] / weight[image, group].sum()
            if isinstance(reduction, Fuse) and place == reduction.kept.shape[1]:
                share = reduction.share[image, group]
            wanted = (members * share[:, None, None]).sum(dim=0)
            torch.testing.assert_close(averaged[image, prefix + place], wanted)


@CASES
@given(decisions())
def test_two_dimensional_rows_move_like_all_others(decision):
    rows, reduction = decision
    sizes = draw(2, rows).abs() + 1
    flat = reduction.move(sizes)
    torch.testing.assert_close(flat, reduction.move(sizes.unsqueeze(2)).squeeze(2))
    prefixed = draw(2, rows + 2)
    same = reduction.move(prefixed.unsqueeze(2), prefix=2).squeeze(2)
    torch.testing.assert_close(reduction.move(prefixed, prefix=2), same)


@CASES
@given(decisions())
def test_maps_in_both_directions_agree(decision):
    rows, reduction = decision
    every = torch.arange(rows).expand(2, -1)
    speaking, remap = reduction.represent(every), reduction.remap(rows)
    for image in range(2):
        wanted = [-1] * rows
        for place, group in enumerate(groups(reduction, image, rows)):
            assert speaking[image, place] == group[0]
            for row in group:
                wanted[row] = place
        assert remap.expand(2, -1)[image].tolist() == wanted


@CASES
@given(decisions(), st.integers(0, 2))
def test_a_folded_map_is_the_mean_of_rows_and_the_sum_of_columns(decision, prefix):
    rows, reduction = decision
    if isinstance(reduction, Fuse):
        return
    weights = draw(2, 2, prefix + rows, prefix + rows).softmax(dim=3)
    folded = reduction.fold(weights, prefix)
    for image in range(2):
        joined = [[row] for row in range(prefix)]
        joined += [[row + prefix for row in each] for each in groups(reduction, image, rows)]
        mean = torch.stack([weights[image][:, each].mean(dim=1) for each in joined], dim=1)
        wanted = torch.stack([mean[:, :, each].sum(dim=2) for each in joined], dim=2)
        torch.testing.assert_close(folded[image], wanted / wanted.sum(dim=2, keepdim=True))


def group_by_hand(share):
    """The group of each old row, and the row that leads each group, for one image (m, n)."""
    best = [max(range(len(share)), key=lambda i: share[i][row]) for row in range(len(share[0]))]
    members = [[row for row, i in enumerate(best) if i == each] for each in range(len(share))]
    leads = [
        max(rows, key=lambda row: share[i][row], default=None) for i, rows in enumerate(members)
    ]
    free = [row for row in range(len(share[0])) if row not in leads]
    for i, row in enumerate(leads):
        if row is None:
            leads[i] = free.pop(0)
            best[leads[i]] = i
    return best, leads


@CASES
@given(st.integers(1, 12), st.data())
def test_slots_mix_all_rows_and_each_leads_a_group_of_its_own(rows, data):
    keep, few = data.draw(st.integers(1, rows)), data.draw(st.integers(1, 3))
    # With few different values, slots are alike and many would have no row.
    share = (draw(2, keep, rows, seed=rows) * few).round().softmax(dim=2)
    mix, x = Mix.of_slots(share), draw(2, 1 + rows, 3, seed=1)
    got = mix.move(x, weight=torch.ones(2, rows), prefix=1)
    torch.testing.assert_close(got, torch.cat([x[:, :1], share @ x[:, 1:]], dim=1))
    every = torch.arange(rows).expand(2, -1)
    for image in range(2):
        to, leads = group_by_hand(share[image].tolist())
        assert mix.remap(rows)[image].tolist() == to
        assert mix.represent(every)[image].tolist() == leads
        assert mix.move(torch.ones(2, rows))[image].tolist() == [to.count(i) for i in range(keep)]


def tokens(rows=16, prefix=1, grid=(4, 4), **parts):
    return Tokens(x=draw(2, prefix + rows, 4), prefix=prefix, grid=grid, **parts)


def test_tokens_carry_all_that_belongs_to_a_row():
    kept = torch.tensor([[3, 1], [0, 2]])
    size = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    alive = torch.tensor([[True, True, False, True], [True, False, True, True]])
    start = tokens(4, grid=(2, 2), size=size, alive=alive).with_origin()
    after = Keep(kept).apply(start)
    assert after.size.tolist() == [[4, 2], [5, 7]]
    assert after.cells().tolist() == [[3, 1], [0, 2]]
    assert after.alive.tolist() == [[True, True], [True, True]]
    assert after.origin.tolist() == [[-1, 1, -1, 0], [0, -1, 1, -1]]
    again = Merge(
        torch.tensor([[1], [0]]), torch.tensor([[0], [1]]), torch.zeros(2, 1).long()
    ).apply(after)
    assert again.size.tolist() == [[6], [12]]
    assert again.cells().tolist() == [[1], [0]]
    assert again.origin.tolist() == [[-1, 0, -1, 0], [0, -1, 0, -1]]
    share = torch.tensor([4 / 6, 7 / 12]).double()
    mean = torch.stack(
        [
            after.x[0, 2] * (1 - share[0]) + after.x[0, 1] * share[0],
            after.x[1, 1] * (1 - share[1]) + after.x[1, 2] * share[1],
        ]
    )
    torch.testing.assert_close(again.x[:, 1], mean)


def test_a_fixed_reduction_is_keeping_the_same_rows_of_every_image():
    order = shuffled(1, 16, seed=3)[0]
    parts = {"size": 1 + draw(2, 16).abs(), "alive": draw(2, 16, seed=1) > 0}
    start = tokens(**parts).with_origin()
    fixed, kept = Fixed(9, order).apply(start), Keep(order[:9].expand(2, -1)).apply(start)
    for _ in range(2):
        for part in ("x", "size", "position", "alive", "origin"):
            assert torch.equal(getattr(fixed, part), getattr(kept, part)), part
        assert torch.equal(fixed.dense_features(), kept.dense_features())
        fixed, kept = Fixed(4).apply(fixed), Keep(torch.arange(4).expand(2, -1)).apply(kept)


def test_features_are_restored_to_the_grid():
    start = tokens(16).with_origin()
    merged = Merge(
        torch.arange(15).expand(2, -1), torch.tensor([[15], [15]]), torch.tensor([[2], [7]])
    ).apply(start)
    restored = merged.dense_features()
    assert torch.equal(restored[:, 1:16], merged.x[:, 1:16])
    assert torch.equal(restored[0, 16], merged.x[0, 3])
    assert torch.equal(restored[1, 16], merged.x[1, 8])
    dropped = Keep(torch.tensor([[0, 15], [5, 6]])).apply(start)
    rows = dropped.dense_features()[:, 1:].unflatten(1, (4, 4))
    assert torch.equal(rows[0, 0, 1], dropped.x[0, 1])
    assert torch.equal(rows[0, 3, 2], dropped.x[0, 2])
    assert torch.equal(rows[1, 3, 0], dropped.x[1, 1])
    assert torch.equal(rows[1, 0, 3], dropped.x[1, 2])


def test_padded_rows_never_stand_in_for_dropped_cells():
    start = tokens(16).with_origin()
    padding = torch.tensor([[True, False], [True, True]])
    after = Keep(torch.tensor([[0, 15], [0, 15]]), padding=padding).apply(start)
    rows = after.dense_features()[:, 1:].unflatten(1, (4, 4))
    assert torch.equal(rows[0, 3, 2], after.x[0, 1])
    assert torch.equal(rows[1, 3, 2], after.x[1, 2])


def test_masks_multiply():
    soft = torch.tensor([[0.5, 1.0, 0.0]])
    start = Tokens(x=draw(1, 3, 4), prefix=0, grid=(1, 3))
    once = Mask(soft).apply(start)
    twice = Mask(soft).apply(once)
    assert torch.equal(once.x, start.x)
    assert twice.alive.tolist() == [[0.25, 1.0, 0.0]]
    kept = Keep(torch.tensor([[2, 0]]), padding=torch.tensor([[True, True]])).apply(twice)
    assert kept.alive.tolist() == [[0.0, 0.25]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes_are_exact_in_half_precision(dtype):
    """bfloat16 counts to 256 only; an image of 4,097 tokens has larger groups."""
    rows = 4096
    start = Tokens(x=draw(1, rows, 2, dtype=dtype), prefix=0, grid=(64, 64))
    gone = torch.arange(1, rows)[None]
    after = Merge(torch.zeros(1, 1).long(), gone, torch.zeros_like(gone)).apply(start)
    assert after.sizes().tolist() == [[4096.0]]
    fused = Fuse(torch.tensor([[7]]), share=torch.ones(1, rows, dtype=dtype) / rows).apply(start)
    assert fused.sizes().tolist() == [[1.0, 4095.0]]
    assert after.x.dtype == fused.x.dtype == dtype


def test_shares_that_underflow_still_name_a_row_that_left():
    kept = torch.tensor([[0, 1]])
    cells = Fuse(kept, share=torch.zeros(1, 4)).represent(torch.arange(4)[None])
    assert cells.tolist() == [[0, 1, 2]]


def test_take_counts_from_the_prefix():
    x = torch.arange(12).view(2, 6)
    rows = torch.tensor([[1, 0], [3, 2]])
    assert take(x, rows, 2).tolist() == [[3, 2], [11, 10]]
    wide = x[..., None].expand(-1, -1, 3)
    assert torch.equal(take(wide, rows, 2)[..., 0], take(x, rows, 2))
    assert with_prefix(rows, 2).tolist() == [[0, 1, 3, 2], [0, 1, 5, 4]]
    assert with_prefix(rows, 0) is rows


def test_there_is_no_bias_where_nothing_is_known():
    assert attention_bias(tokens(), proportional=True) is None
    sized = tokens(size=torch.ones(2, 16))
    assert attention_bias(sized, proportional=False) is None


def test_the_bias_of_sizes_spares_the_prefix():
    size = torch.arange(1.0, 33).view(2, 16)
    bias = attention_bias(tokens(size=size), proportional=True)
    assert bias.shape == (2, 1, 1, 17)
    assert (bias[..., 0] == 0).all()
    torch.testing.assert_close(bias[:, 0, 0, 1:], size.log().double())


def test_padding_gets_no_weight_at_all():
    alive = torch.ones(2, 16, dtype=torch.bool)
    alive[0, 3] = False
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        start = tokens(alive=alive)
        bias = attention_bias(start.with_x(start.x.to(dtype)), proportional=True)
        weights = bias.expand(2, 1, 17, 17).float().softmax(dim=3)
        assert (weights[0, :, :, 4] == 0).all()
        assert bias.isfinite().all()


def test_a_soft_mask_spares_a_token_for_itself_but_keeps_its_size():
    alive = torch.linspace(0, 1, 32).view(2, 16).double()
    size = torch.arange(1.0, 33).view(2, 16).double()
    bias = attention_bias(tokens(alive=alive, size=size), proportional=True)
    assert bias.shape == (2, 1, 17, 17)
    for image in range(2):
        for key in range(16):
            log_size = size[image, key].log()
            column = bias[image, 0, :, key + 1]
            torch.testing.assert_close(column[key + 1], log_size)
            others = torch.cat([column[: key + 1], column[key + 2 :]])
            wanted = log_size + (alive[image, key] + SOFT_MASK_EPS).log()
            torch.testing.assert_close(others, wanted.expand(16))
    assert (bias[..., 0] == 0).all()


def test_attention_and_its_map_agree():
    q, k, v = draw(2, 3, 5, 4, seed=1), draw(2, 3, 7, 4, seed=2), draw(2, 3, 7, 6, seed=3)
    bias = draw(2, 1, 1, 7, seed=4)
    weights = attention_map(q, k, scale=0.3, bias=bias)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 3, 5).double())
    torch.testing.assert_close(weights @ v, attention(q, k, v, scale=0.3, bias=bias))


@pytest.mark.parametrize("keys", [7, MAX_EXPLICIT_KEYS + 1])
def test_training_in_bfloat16_agrees_with_the_kernel_whichever_way_it_is_computed(keys):
    exact = draw(2, 3, 5, 4, seed=1), draw(2, 3, keys, 4, seed=2), draw(2, 3, keys, 6, seed=3)
    bias, weights = draw(2, 1, 1, keys, seed=4), draw(2, 3, 5, 6, seed=5)
    exact = [each.requires_grad_() for each in exact]
    wanted = F.scaled_dot_product_attention(*exact, attn_mask=bias, scale=0.3)
    (wanted * weights).sum().backward()
    half = [each.detach().bfloat16().requires_grad_() for each in exact]
    got = attention(*half, scale=0.3, bias=bias.bfloat16(), training=True)
    (got * weights).sum().backward()
    torch.testing.assert_close(got.double(), wanted, atol=0.03, rtol=0.03)
    for one, other in zip(half, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=0.05, rtol=0.05)
    q, k, v = half
    kernel = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.bfloat16(), scale=0.3)
    by_map = attention_map(q, k, scale=0.3, bias=bias.bfloat16()) @ v
    assert torch.equal(got, kernel if keys > MAX_EXPLICIT_KEYS else by_map)
    # Evaluation is the dense model's, whether or not gradients of it are needed.
    assert torch.equal(attention(q, k, v, scale=0.3, bias=bias.bfloat16()), kernel)


def test_class_attention_is_one_row_of_the_map():
    q, k = draw(2, 3, 7, 4, seed=1), draw(2, 3, 7, 4, seed=2)
    bias = draw(2, 1, 7, 7, seed=3)
    for each in (None, bias, bias[:, :, :1]):
        whole = attention_map(q, k, scale=0.5, bias=each)
        wanted = whole[:, :, 0, 2:].mean(dim=1)
        signals = Signals(2, 0.5, q, k, bias=each)
        torch.testing.assert_close(signals.class_attention(), wanted)
    torch.testing.assert_close(signals.keys(), k[:, :, 2:].mean(dim=1))


def test_signals_say_what_is_missing():
    with pytest.raises(NeedsClassToken, match="no class token"):
        Signals(0, q=draw(1, 1, 2, 2), k=draw(1, 1, 2, 2)).class_attention()
    with pytest.raises(BadSchedule, match="Keys exist only inside a block"):
        Signals(1).keys()


# ---------------------------------------------------------------------------------- rows that wait

FEW = settings(CASES, max_examples=12)


@st.composite
def parkings(draw_from):
    """Draws two images of a grid; some rows go on, alone or with a stand-in for the others."""
    grid = draw_from(st.sampled_from([(1, 2), (2, 3), (3, 4)]))
    rows = grid[0] * grid[1]
    seed = draw_from(st.integers(0, 1000))
    kept = shuffled(2, rows, seed)[:, : draw_from(st.integers(1, rows - 1))]
    share = draw(2, rows, seed=seed).abs().scatter(1, kept, 0.0)
    slow = draw_from(st.sampled_from([Keep(kept), Fuse(kept, share=share)]))
    prefix = draw_from(st.integers(0, 3))
    x = draw(2, prefix + rows, 3, seed=seed)
    memory = draw(2, rows, seed=seed + 1) if draw_from(st.booleans()) else None
    return Tokens(x=x, prefix=prefix, grid=grid, memory=memory).with_origin(), Defer(slow)


@FEW
@given(parkings())
def test_defer_moves_rows_as_its_inner_reduction_does(made):
    tokens, park = made
    inner, outer = park.slow.apply(tokens), park.apply(tokens)
    for name in ("x", "size", "position", "origin", "memory"):
        one, other = getattr(inner, name), getattr(outer, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert park.merges == park.slow.merges
    assert inner.deferred is None
    assert outer.deferred.whole is tokens


@FEW
@given(parkings())
def test_rows_that_waited_come_back_as_written(made):
    tokens, park = made
    slow = park.apply(tokens)
    after = slow.with_x(slow.x + draw(*slow.x.shape, seed=7))
    if tokens.memory is not None:
        after = after.with_memory(slow.memory + 1)
    back, first = after.rejoin(), tokens.prefix
    assert (back.deferred, back.position, back.size) == (None, None, None)
    assert torch.equal(back.origin, tokens.origin)
    assert torch.equal(back.x[:, :first], after.x[:, :first])
    for image, kept in enumerate(park.slow.kept.tolist()):
        gained = torch.zeros(3).double()
        if isinstance(park.slow, Fuse):
            gained = after.x[image, -1] - slow.x[image, -1]
        for row in range(tokens.patches):
            got = back.x[image, first + row]
            if row in kept:
                assert torch.equal(got, after.x[image, first + kept.index(row)])
            else:
                torch.testing.assert_close(got, tokens.x[image, first + row] + gained)
            if tokens.memory is not None:
                assert back.memory[image, row] == tokens.memory[image, row] + (row in kept)
    assert torch.equal(after.dense_features(), back.x)
    assert torch.equal(after.to_grid().x, back.x)
    assert back.rejoin() is back


@FEW
@given(parkings(), st.integers(0, 100))
def test_the_grid_is_whole_again_before_a_stride(made, seed):
    """A cell that was merged or dropped shows the row that stands for it."""
    tokens, _ = made
    order = shuffled(2, tokens.patches, seed)
    keep = (tokens.patches + 1) // 2
    into = torch.zeros_like(order[:, keep:])
    for reduction in (Keep(order[:, :keep]), Merge(order[:, :keep], order[:, keep:], into)):
        left = reduction.apply(tokens)
        whole = left.to_grid()
        assert (whole.position, whole.size, whole.alive) == (None, None, None)
        assert torch.equal(whole.x, left.dense_features())
        for image in range(2):
            rows = whole.x[image, tokens.prefix :]
            for place, cell in enumerate(left.cells()[image].tolist()):
                assert torch.equal(rows[cell], left.x[image, tokens.prefix + place])
                if tokens.memory is not None:
                    assert whole.memory[image, cell] == left.memory[image, place]


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 5), (4, 4)])
def test_a_subsampling_block_leaves_every_second_row_and_column(grid):
    height, width = grid
    cells = torch.arange(height * width).view(grid)
    x = torch.cat([torch.tensor([-1.0, -2.0]), cells.flatten()])[None, :, None]
    memory = cells.flatten()[None] / 10
    left = Tokens(x=x, prefix=2, grid=grid, memory=memory).subsample(2)
    wanted = [row * width + column for row in range(0, height, 2) for column in range(0, width, 2)]
    assert left.x.flatten().tolist() == [-1, -2, *wanted]
    assert left.grid == ((height + 1) // 2, (width + 1) // 2)
    assert torch.equal(left.memory, torch.tensor([wanted]) / 10)
    assert left.origin.tolist() == [list(range(len(wanted)))]
    assert left.position is None


def test_cells_that_nobody_tracked_cannot_be_put_back():
    tokens = Tokens(x=draw(1, 4, 3), prefix=0, grid=(2, 2))
    assert tokens.to_grid() is tokens
    with pytest.raises(ValueError, match="not tracked"):
        Keep(torch.tensor([[2, 0]])).apply(tokens).to_grid()
