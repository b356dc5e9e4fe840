"""What a graph computes in other words than eager code decides the same, equal rows included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import patchslim
from patchslim.deployment.graph import Graph, Outputs, Witness
from patchslim.methods import _clustering as clustering
from patchslim.methods import _sorting as sorting
from patchslim.methods import ats, duplicates, random
from patchslim.methods._windows import best_in_squares
from patchslim.tokens.rows import mark_diagonal
from patchslim.tokens.spelling import spell_by_product
from timm_variants import tiny_vit

SEEDS = range(6)


@pytest.fixture
def in_graph(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function as if a graph were being made of it."""

    def call(function: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return function(*args)

    return call


def numbers(seed: int, count: int = 9) -> Tensor:
    """Numbers of which many are equal, and some infinite (3, count)."""
    noise = torch.Generator().manual_seed(seed)
    few = torch.randint(4, (3, count), generator=noise).float()
    return few.masked_fill(few == 3, -torch.inf)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("function", [sorting.is_heavier, sorting.rank_rows, sorting.sort_rows])
def test_rows_sort_and_rank_the_same(in_graph: Any, function: Any, seed: int) -> None:
    worth = numbers(seed)
    assert torch.equal(in_graph(function, worth), function(worth))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_heaviest_of_a_label_is_the_same(in_graph: Any, seed: int) -> None:
    worth = numbers(seed)
    label = torch.randint(9, worth.shape, generator=torch.Generator().manual_seed(seed))
    own = torch.zeros_like(label).scatter(1, label, label).gather(1, label)
    got = in_graph(clustering.elect_heaviest, own, worth)
    assert torch.equal(got, clustering.elect_heaviest(own, worth))


def test_no_graph_counts_in_numbers_without_a_sign() -> None:
    """OpenVINO has none of 16 bits, and PyTorch takes them for more than 255 rows."""

    class Diagonal(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(mark_diagonal(x), 0)

    exported = torch.export.export(Diagonal(), (torch.ones(1, 300, 300),)).run_decompositions()
    values = [node.meta.get("val") for node in exported.graph.nodes]
    assert {each.dtype for each in values if isinstance(each, Tensor)} <= {
        torch.float32,
        torch.int64,
        torch.bool,
    }
    made = Path(patchslim.__file__).parent
    for room in ("methods", "model", "tokens", "hosts"):  # what graphs are made of
        for path in (made / room).glob("*.py"):
            assert "torch.eye(" not in path.read_text(encoding="utf-8"), path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atc", "dpcknn", "kmedoids"])
def test_a_grid_of_more_than_255_patches_is_exported(method: str, tmp_path: Path) -> None:
    host = timm.create_model("eva02_tiny_patch14_224", depth=2).eval()
    slimmed = patchslim.slim(host, method, keep_rate=0.6, at=(1,), tail="full")
    assert slimmed.plan.decision_blocks
    written = patchslim.export(slimmed, tmp_path / "model", to="openvino")
    assert written.check is not None
    assert written.check.compared > 0


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_normalised_features_are_as_far_apart_in_graphs(mean: float) -> None:
    x = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0)) * 5 + mean
    x[:, 3] = x[:, 7] + 1e-3
    want = clustering.normalised_distances(x.double())
    assert want[:, 3, 7].max() < 1e-6
    with spell_by_product():
        torch.testing.assert_close(
            clustering.normalised_distances(x), want.float(), rtol=0, atol=2e-6
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_components_are_the_same(in_graph: Any, seed: int) -> None:
    x = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(seed))
    cost, worth = torch.cdist(x, x), numbers(seed, 12)[:2].clamp(min=0.5)
    got = in_graph(clustering.components, cost, worth, 0.7)
    want = clustering.components(cost, worth, 0.7)
    assert torch.equal(got.parent, want.parent)
    assert torch.equal(got.apart, want.apart)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_best_of_each_square_is_the_same(in_graph: Any, seed: int) -> None:
    cells = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:13].sort().values
    args = (cells.expand(3, -1), (4, 5), 2, numbers(seed, 13))
    assert torch.equal(in_graph(best_in_squares, *args), best_in_squares(*args))


@pytest.mark.parametrize("seed", SEEDS)
def test_samples_hit_the_same_patches(in_graph: Any, seed: int) -> None:
    score = numbers(seed, 14).clamp(min=0) + 0.1
    alive = torch.arange(14) < torch.tensor([[14], [9], [1]])
    for mask in (None, alive):
        given = score if mask is None else score * mask
        got = in_graph(ats._sample_mask, given, mask, 6)
        assert torch.equal(got, ats._sample_mask(given, mask, 6))


@pytest.mark.parametrize("seed", [0, 1, 77, 2**31])
def test_the_table_of_random_numbers_has_their_order(seed: int) -> None:
    numbers = random._random_numbers(torch.arange(400), seed)
    ranks = torch.tensor(random.cell_ranks(400, seed))
    assert torch.equal(ranks.argsort(), numbers.argsort())


@pytest.mark.parametrize("seed", SEEDS)
def test_identical_patches_are_found_the_same(in_graph: Any, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    shown = torch.randn(5, 70, generator=noise)[torch.randint(5, (3, 12), generator=noise)]
    real = torch.arange(12) < torch.tensor([[12], [7], [1]])
    for side in (0, 2):
        window = duplicates.window_of(torch.arange(12).expand(3, -1), (3, 4), side)
        want = duplicates.first_identical(shown, window, real)
        assert torch.equal(in_graph(duplicates.first_identical, shown, window, real), want)
        assert torch.equal(in_graph(duplicates._previous_kept, want % 2 == 0),
                           duplicates._previous_kept(want % 2 == 0))  # fmt: skip


SPELT = {
    "tome": ("tome", {}),
    "tome, plain": ("tome", {"proportional": False}),
    "ward": ("similarity", {}),
    "sizes": ("similarity", {"survivor": "mean", "weight": "size"}),
    "bipartite": ("similarity", {"group": "bipartite", "on": "keys", "measure": "cosine"}),
    "average": ("similarity", {"group": "average"}),
    "windows": ("similarity", {"window": 2}),
    "squares": ("similarity", {"squares": 3}),
    "evit": ("evit", {}),
}


def slim_tiny(method: str, **settings: Any) -> Any:
    return patchslim.slim(tiny_vit().eval(), method, keep=0.6, **settings)


def test_no_graph_has_an_output_without_numbers() -> None:
    """OpenVINO's converter ends the process where it computes one of a fixed size in advance."""
    host = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )
    slimmed = patchslim.slim(host.eval(), "adamerge", r=2, tail="exact")
    assert slimmed.plan.steps[-1].read == 1  # the class token
    assert slimmed.plan.decision_blocks[-1] == 2
    program = Graph(slimmed, Outputs("tensor", ("output",)), 2).program(by_product=True)
    shapes = [node.meta["val"].shape for node in program.graph.nodes if "val" in node.meta
              and isinstance(node.meta["val"], Tensor)]  # fmt: skip
    assert all(0 not in shape for shape in shapes)


@pytest.mark.parametrize("name", SPELT)
def test_products_move_the_same_rows_as_lookups(name: str) -> None:
    method, settings = SPELT[name]
    slimmed = slim_tiny(method, **settings)
    images = torch.randn(3, *slimmed.plan.adapter.describe(slimmed.host).image_shape)
    images[1, :, :, images.shape[3] // 2 :] = 0.5  # many patches that are the same
    images[2] = images[1].roll(3, dims=2)
    witness = Witness(slimmed, Outputs("tensor", ("output",)))
    with torch.no_grad():
        want = witness(images)
        with spell_by_product():
            got = witness(images)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-5)
    assert len(want) > 1
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "similarity"])
def test_a_graph_by_products_has_no_slow_search_and_adds_no_rows_one_by_one(method: str) -> None:
    graph = Graph(slim_tiny(method), Outputs("tensor", ("output",)), 2)
    searches = {"sort", "argmin", "argmax", "argsort", "max", "scatter_add", "scatter_add_"}

    def searched(*, by_product: bool) -> set[str]:
        nodes = graph.program(tells=False, by_product=by_product).graph.nodes
        names = [str(node.target).split(".") for node in nodes if node.op == "call_function"]
        return {name[1] for name in names if len(name) > 1} & searches

    assert searched(by_product=False)
    assert not searched(by_product=True)


@pytest.mark.slow
def test_openvino_swaps_no_axes_twice() -> None:
    from patchslim.deployment.registry import find_target

    graph = Graph(slim_tiny("similarity"), Outputs("tensor", ("output",)), 2)
    for node in find_target("openvino").convert(graph).get_ordered_ops():
        if node.get_type_name() == "Transpose":
            assert node.input_value(0).get_node().get_type_name() != "Transpose"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reduce_min", "reduce_max", "reduce_sum"])
@pytest.mark.parametrize("after", ["add", "subtract", "multiply"])
def test_openvino_computes_right_from_what_whole_numbers_add_up_to(kind: str, after: str) -> None:
    """It is wrong without the choice between both, on a processor with AVX-512."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    from patchslim.deployment.targets._openvino_sums import part_sums

    given = ops.parameter([-1, 7, 6], np.int64)
    reduced = getattr(ops, kind)(given, ops.constant(np.array([2])), False)
    result = getattr(ops, after)(reduced, ops.constant(np.array(4, np.int64)))
    model = openvino.Model([result], [given])
    part_sums(model)
    run = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    reduce = getattr(np, kind.removeprefix("reduce_"))
    compute = getattr(np, after)
    for batch in (1, 2, 8, 16):
        whole = np.random.default_rng(batch).integers(0, 6, (batch, 7, 6))
        assert np.array_equal(run(whole)[0], compute(reduce(whole, axis=2), 4))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "ats", "saint", "similarity"])
def test_no_graph_for_openvino_computes_at_once_from_a_sum_of_whole_numbers(method: str) -> None:
    """What holds on every processor, whether OpenVINO is wrong there or not."""
    from patchslim.deployment.registry import find_target
    from patchslim.deployment.targets._openvino_sums import SAFE

    graph = Graph(slim_tiny(method), Outputs("tensor", ("output",)), 2)
    sums = [
        node
        for node in find_target("openvino").convert(graph).get_ordered_ops()
        if node.get_type_name().startswith("Reduce")
        and node.get_output_element_type(0).is_integral_number()
    ]
    uses = [
        each.get_node().get_type_name()
        for node in sums
        for each in node.output(0).get_target_inputs()
    ]
    assert uses or method in ("tome", "similarity")  # which add up floats
    assert set(uses) <= SAFE
