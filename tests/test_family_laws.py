"""Every family on disk, every variant that its library builds, every public law of families.

A family's variants are listed by `variants(family)` in `tests/variants_<library>.py`. Each has a
`build()` that makes a small host, and a name. The first of a family runs by default. The others
are slow tests, and so are those of which the file's `is_combination(variant)` says that
they only combine options of others.
Nothing here names a family.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest
import torch

import patchslim
from comparison import assert_same_gradients, gradients
from patchslim.hosts._registry import find_family_library, load_adapter
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.schedules.schedule import Constant
from patchslim.testing import FAMILY_LAWS
from patchslim.testing.adapter_laws import AdapterTrial
from patchslim.testing.law import check_law

BY_DEFAULT = 1  # variants of a family in the default suite


def list_variants(family: str) -> tuple[Any, ...]:
    """Lists the small variants of a family."""
    module = importlib.import_module(f"variants_{find_family_library(family).name}")
    variants: tuple[Any, ...] = module.variants(family)
    return variants


SUBJECTS = [
    (family, variant) for family in patchslim.adapter_names() for variant in list_variants(family)
]


def only_combines(family: str, variant: Any) -> bool:
    """Tells whether a variant only combines options that others have by themselves."""
    module = importlib.import_module(f"variants_{find_family_library(family).name}")
    return bool(getattr(module, "is_combination", lambda _: False)(variant))


def is_slow(family: str, variant: Any, first: int) -> bool:
    """Tells whether a variant is a slow test: the default suite tries the first of each family."""
    alone = [each for each in list_variants(family) if not only_combines(family, each)]
    return str(variant) not in map(str, alone[:first])


def mark_slow(first: int) -> pytest.MarkDecorator:
    """Runs a test on the first variants of a family by default, and on all in the slow suite."""
    subjects = [
        pytest.param(
            *each,
            id="-".join(map(str, each)),
            marks=[pytest.mark.slow] * is_slow(*each, first),
        )
        for each in SUBJECTS
    ]
    return pytest.mark.parametrize(("family", "variant"), subjects)


@functools.cache
def trial(family: str, variant: Any) -> AdapterTrial:
    """Builds a host once for all laws, none of which changes it."""
    return AdapterTrial(variant.build(), load_adapter(family))


@mark_slow(BY_DEFAULT)
def test_the_family_keeps_the_laws(family: str, variant: Any) -> None:
    for law in FAMILY_LAWS:
        check_law(law, trial(family, variant), f"{family} on {variant}")


@mark_slow(BY_DEFAULT)
def test_training_equals_the_host(family: str, variant: Any) -> None:
    """The same random draws give the same gradient for every parameter, none of which is zero."""
    host, twin = variant.build(), variant.build()
    adapter = load_adapter(family)
    plan = plan_schedule(host, adapter, patchslim.find_method("identity")(), Constant(0), "full")
    slimmed = SlimModel(host, plan).train()
    x = AdapterTrial(host, adapter).images()

    def answer(model: Any, x: torch.Tensor) -> torch.Tensor:
        output = model(x)
        if isinstance(output, tuple):  # heads that answer apart in training, or rows beside them
            return torch.cat([each.flatten(1) for each in output], dim=1)
        logits = adapter.logits(output)
        pooled = output.get("pooler_output") if hasattr(output, "get") else None
        return logits if pooled is None else logits.mean() + pooled.mean()

    got = gradients(functools.partial(answer, slimmed), host, x)
    wanted = gradients(functools.partial(answer, twin.train()), twin, x)
    assert host.training
    assert_same_gradients(got, wanted)
    for name, statistic in twin.named_buffers():
        mine = host.get_buffer(name)
        assert torch.allclose(mine, statistic, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("family", patchslim.adapter_names())
def test_every_law_runs_by_default_on_every_family(family: str) -> None:
    if not list_variants(family):
        pytest.skip("this version of the library has no host of the family")
    alone = [each for each in list_variants(family) if not only_combines(family, each)]
    assert len(alone) >= BY_DEFAULT


@pytest.mark.parametrize("family", patchslim.adapter_names())
def test_a_family_has_variants_with_names_of_their_own(family: str) -> None:
    every = list_variants(family)
    if not every:
        pytest.skip("this version of the library has no host of the family")
    assert len(every) >= 3
    assert len({str(each) for each in every}) == len(every)


@mark_slow(BY_DEFAULT)
def test_a_variant_is_served_by_its_family(family: str, variant: Any) -> None:
    found = patchslim.find_adapter(trial(family, variant).host)
    assert type(found) is type(load_adapter(family))
