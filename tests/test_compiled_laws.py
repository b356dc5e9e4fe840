"""A SlimModel with fixed counts compiles without a break and exports for any number of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchslim
from comparison import is_close
from patchslim.model.model import SlimModel
from small_hosts import every_host, slim_host
from timm_variants import Variant, random_images

FIXED = ("tome", "evit", "topk", "random")  # methods whose counts are fixed
slow = pytest.mark.slow


def by_default(*methods: str) -> Any:
    """Marks which methods run by default; a law checks that all of them compile and export."""
    return pytest.mark.parametrize(
        "method", [each if each in methods else pytest.param(each, marks=slow) for each in FIXED]
    )


@by_default("tome")
@pytest.mark.parametrize("tail", [pytest.param("full", marks=slow), "exact"])
def test_compiles_without_a_break(vit: Any, method: str, tail: str) -> None:
    model = patchslim.slim(vit, method, keep_rate=0.7, at=(0, 1), tail=tail)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert is_close(compiled(random_images(vit)), model(random_images(vit)))


@slow
@every_host
def test_every_host_compiles_without_a_break(variant: Variant) -> None:
    host = variant.build()
    model = slim_host(host)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert is_close(compiled(random_images(host)), model(random_images(host)))


@slow
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.filterwarnings("ignore")
def test_compiles_with_inductor(vit: Any, method: str) -> None:
    model = slim_host(vit, method)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for batch in (2, 5):
            assert is_close(compiled(random_images(vit, batch)), model(random_images(vit, batch)))


def exported(model: SlimModel, x: Tensor) -> nn.Module:
    """Exports the model as a graph that takes any number of images."""
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes={"images": batch})
    return program.module()


@by_default("tome")
@pytest.mark.parametrize("tail", ["full", pytest.param("exact", marks=slow)])
def test_exports_for_any_batch(vit: Any, method: str, tail: str) -> None:
    model = patchslim.slim(vit, method, keep_rate=0.7, at=(0, 1), tail=tail)
    whole = exported(model, random_images(vit, 3))
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = random_images(vit, batch, seed=batch)
            assert is_close(whole(x), model(x))


@slow
@every_host
def test_every_host_exports_for_any_batch(variant: Variant) -> None:
    host = variant.build()
    model = slim_host(host)
    whole = exported(model, random_images(host, 3))
    with torch.no_grad():
        for batch in (1, 5):
            assert is_close(whole(random_images(host, batch)), model(random_images(host, batch)))
