"""Operation counts: the published and computed facts, and torch's own counter on running models."""

import copy
import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch

import patchslim
import toy_methods
from patchslim.hosts._registry import find_adapter
from patchslim.methods._method import remembers
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.schedules.macs import slim_macs
from patchslim.schedules.schedule import Constant, Counts
from patchslim.testing.counting import count_macs
from patchslim.testing.trial import noise_images, tiny_host
from patchslim.tokens.shapes import BlockShape, Flow, block_macs, dense_macs, host_macs

ROOT = Path(__file__).parent.parent


@functools.cache
def benchmark(name):
    """Imports a script of the benchmarks folder as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow  # `make test` runs it as a command, too
def test_every_golden_number_is_rebuilt(capsys):
    golden = benchmark("golden_macs")
    assert golden.main([]) == 0
    assert capsys.readouterr().out == "compared 205 values, 0 differ\n"


@pytest.mark.slow
def test_a_wrong_golden_number_is_reported(tmp_path, capsys):
    golden = benchmark("golden_macs")
    facts = json.loads(golden.FACTS.read_text())
    facts["evit_fuse_blocks_3_6_9"]["S"]["0.7"] += 0.001
    del facts["mctf"]["T"]["8"]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(facts))
    assert golden.main([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "compared 205 values, 2 differ" in printed
    assert "/evit_fuse_blocks_3_6_9/S/0.7: stored 3.03, computed 3.029" in printed
    assert "/mctf/T/8: stored None, computed 0.964" in printed


def test_the_figure_of_the_command_line():
    """patchslim macs deit_small_patch16_224 --method evit --keep-rate 0.7 --at 3,6,9: 3.029."""
    import timm

    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    cost = patchslim.macs(host, "evit", keep_rate=0.7, at=(3, 6, 9))
    assert str(cost) == "3.029 GMACs"
    assert cost.rows == (*[197] * 3, *[140] * 3, *[100] * 3, *[72] * 3)
    assert round(patchslim.macs(host).total / 1e9, 3) == 4.599
    topk = patchslim.macs(host, "topk", keep_rate=0.7, at=(3, 6, 9))
    assert round(topk.total / 1e9, 3) == 2.997


def running():
    """Lists every method and every toy, with each tail, on each kind of head that serves it.

    Other settings of a method are counted by the law `macs_are_what_it_spends`, with both tails and
    the first of these heads. So only the exact tail of the others is tried by default.
    """
    plain = [each for each in toy_methods.shipped_methods() if each.id in patchslim.method_names()]
    for subject in [*plain, *toy_methods.all_toys()]:
        for readout in ("class", "average", "query"):
            if readout != "average" or not subject.values[0].needs_class_token:
                for tail in ("full", "exact"):
                    repeats = tail == "full" or readout == "class"
                    yield pytest.param(
                        *subject.values,
                        tail,
                        readout,
                        id=f"{subject.id}-{tail}-{readout}",
                        marks=[pytest.mark.slow] * repeats,
                    )


@functools.cache
def counted_host(readout):
    """Makes a host for all methods, none of which changes it, and counts it once."""
    host = tiny_host(readout=readout, num_heads=4)
    return host, count_macs(host, noise_images(1))


@pytest.mark.parametrize(("method", "tail", "readout"), list(running()))
def test_torch_counts_the_same(method, tail, readout):
    """The method decides in the first block that it can decide in, and the last; or in none."""
    (host, dense), prefix = counted_host(readout), int(readout == "class")
    first = 16 if remembers(method) else 12
    left = [method.fewest(16)] * 3 if method.fewest(16) == 16 else [first, 12, 8]
    schedule = Counts(tuple(rows + prefix for rows in left), 16 + prefix, prefix)
    slimmed = SlimModel(
        host, plan_schedule(host, find_adapter(host), copy.deepcopy(method).eval(), schedule, tail)
    )
    with torch.no_grad():
        (cost,) = slimmed.macs_of(noise_images(1))
    expected = cost.total + cost.choosing
    assert expected == pytest.approx(count_macs(slimmed, noise_images(1)), rel=0.005)
    assert cost == slimmed.macs() or (method.adaptive and cost.total <= slimmed.macs().total)
    assert slimmed.dense_macs().total == pytest.approx(dense, rel=0.005)


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (32, 24)])
def test_torch_counts_the_same_at_other_image_sizes(size):
    host = tiny_host(dynamic_img_size=True)
    slimmed = patchslim.slim(host, "tome", r=2)
    images = torch.randn(1, 3, *size)
    cost = slimmed.macs(size)
    assert cost.total + cost.choosing == pytest.approx(count_macs(slimmed, images), rel=0.005)
    assert slimmed.counts(size)[-1] == size[0] * size[1] // 16 + 1 - 6
    dense = slimmed.dense_macs(size).total
    assert dense == pytest.approx(count_macs(host, images), rel=0.005)


def test_the_exact_tail_is_seven_percent_of_deit():
    import timm

    with torch.device("meta"):
        host = timm.create_model("deit_small_patch16_224")
    shape = find_adapter(host).shape(host)
    identity = patchslim.find_method("identity")()
    counts = [shape.entering] * shape.depth
    full = slim_macs(shape, identity, counts, tail=False).total
    exact = slim_macs(shape, identity, counts, tail=True).total
    assert full == dense_macs(shape).total
    assert 0.06 < 1 - exact / full < 0.075


def test_parts_add_up():
    cost = patchslim.macs(tiny_host(), "evit", keep_rate=0.5, at=(1,))
    assert cost.total == cost.embed + sum(cost.blocks) + cost.head
    assert cost.embed == 16 * 3 * 16 * 16
    assert cost.head == 16 * 5
    assert cost.choosing == 17 * 16 + 16 * 16
    assert cost.rows == (17, 10, 10)


def test_a_block_is_the_formula_of_the_literature():
    block = BlockShape.standard(384, 6)
    n, c = 197, 384
    assert block_macs(block, Flow.uniform(n)) == 4 * n * c * c + 2 * n * n * c + 8 * n * c * c
    rectangular = block_macs(block, Flow(27, n, n, 27, 27))
    assert rectangular == 2 * 27 * c * c + 2 * n * c * c + 2 * 27 * n * c + 8 * 27 * c * c


def test_costs_need_no_weights_and_no_forward_pass():
    with torch.device("meta"):
        host = tiny_host()
    assert next(host.parameters()).device.type == "meta"
    assert patchslim.macs(host, "tome", r=3) == patchslim.macs(tiny_host(), "tome", r=3)


def test_a_flow_with_fewer_rows_costs_no_more():
    shape = find_adapter(tiny_host()).shape(tiny_host())
    method = patchslim.find_method("tome")()
    costs = [
        slim_macs(shape, method, Constant(r).counts(17, 1, 3, method), tail=False).total
        for r in range(8)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == host_macs(shape, [Flow.uniform(17)] * 3).total


@functools.cache
def published(key):
    """Returns the numbers of one family in the table of published ones."""
    return json.loads((ROOT / "tests" / "reference" / "golden_macs.json").read_text())[key]


def weightless(name):
    import timm

    import patchslim.architectures.evo_levit  # noqa: F401 (registers its names)

    with torch.device("meta"):
        return timm.create_model(name, num_classes=1000)


@pytest.mark.parametrize("size", ["128S", "128", "192", "256", "384"])
def test_evo_levit_costs_what_was_published(size):
    cost = patchslim.macs(weightless(f"evo_levit_{size.lower()}"), "evo", keep_rate=0.5)
    assert round(cost.total / 1e6) == published("evo_levit_224_stagewise_mmacs")[size]


@pytest.mark.parametrize("size", ["128S", "128", "192", "256", "384"])
def test_levit_costs_what_was_published(size):
    cost = patchslim.macs(weightless(f"levit_{size.lower()}"))
    assert round(cost.total / 1e6) == published("levit_dense_mmacs")[size]


@pytest.mark.parametrize(("size", "name"), [("T", "tiny"), ("S", "small"), ("B", "base")])
def test_evo_vit_costs_what_was_published(size, name):
    host = weightless(f"deit_{name}_patch16_224")
    cost = patchslim.macs(host, "evo", keep_rate=0.5, representative=False)
    wanted = published("evo_deit_p0.5_blocks_4_8_no_representative")[size]
    assert round(cost.total / 1e9, 3) == wanted
