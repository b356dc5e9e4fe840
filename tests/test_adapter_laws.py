"""What timm's families keep besides the public laws, which `test_family_laws.py` runs on all.

Features, methods of every place, masks, image sizes, replaced projections, recomputed activations.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import patchslim
from comparison import (
    Shuffle,
    ShuffleMap,
    ShuffleQueries,
    assert_same_gradients,
    gradients,
    is_close,
    sample_methods,
    slim_unchecked,
)
from patchslim.errors import WrongInput
from patchslim.schedules.schedule import Rate
from patchslim.tokens.rows import take
from timm_options import OPTIONS
from timm_variants import (
    HOSTS,
    PATCH,
    Variant,
    candidate_names,
    random_images,
    registered_variants,
)

EVERY = [*registered_variants(), *OPTIONS]
FREE = [variant for variant in EVERY if variant.args.get("dynamic_img_size")]
PREFIXED = [variant for variant in EVERY if variant.prefix]
SLOW = pytest.mark.slow


def each_option(variants: list[Variant], every: int = 1) -> Any:
    """Lists options by themselves by default, or one in `every`; the others are slow.

    So are the registry's combinations of options. All public laws run on all of them by default.
    """
    quick = OPTIONS[::every]
    marked = [each if each in quick else pytest.param(each, marks=SLOW) for each in variants]
    return pytest.mark.parametrize("variant", marked, ids=str)


@functools.cache
def built(variant: Variant) -> Any:
    """Builds one host for all laws that do not change it."""
    return variant.build()


def test_variants_of_the_registry() -> None:
    every = [name for variant in registered_variants() for name in variant.names]
    sys.stdout.write(
        f"timm {timm.__version__}: {len(every)} names -> {len(registered_variants())} variants"
    )
    assert len(every) == len(set(every)) >= 240
    assert 50 <= len(registered_variants()) <= 120
    assert {variant.host for variant in registered_variants()} == set(HOSTS)


def test_no_registered_host_is_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of timm that do not know our host classes build none; only classes are asked for."""

    class ClassFound(Exception):
        pass

    def stop(host: type[nn.Module], *args: Any, **kwargs: Any) -> None:
        raise ClassFound(host)

    for module in list(sys.modules.values()):
        if "build_model_with_cfg" in vars(module):  # what makes every model of timm
            monkeypatch.setattr(module, "build_model_with_cfg", stop)
    others = set(timm.list_models()) - set(candidate_names())
    assert len(others) > 900
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in others:
            with pytest.raises(ClassFound) as stopped:
                timm.create_model(name)
            assert not issubclass(stopped.value.args[0], HOSTS), name


@each_option(EVERY)
def test_features_of_everything_equal_the_hosts(variant: Variant) -> None:
    host = built(variant)
    slimmed, x = patchslim.slim(host, "identity"), random_images(host)
    with torch.no_grad():
        assert is_close(slimmed.forward_features(x), host.forward_features(x))
    assert slimmed.host is host


@each_option(EVERY, every=4)
def test_reduced_model_runs(variant: Variant) -> None:
    host = built(variant)
    x = random_images(host)
    with torch.no_grad():
        wanted, features = host(x), host.forward_features(x)
        for method in [*sample_methods(host), Shuffle(), ShuffleQueries(), ShuffleMap()]:
            slimmed = slim_unchecked(host, method, Rate(0.7, (0, 1)))
            got, traced = slimmed(x), slimmed.trace(x)
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), method
            assert torch.isfinite(got).all(), method
            assert traced[-1].dense_features().shape == features.shape, method
            entering, prefix = traced[0].origin.shape[1] + traced[0].prefix, traced[0].prefix
            counts = slimmed.schedule.counts(entering, prefix, len(traced), method)
            assert tuple(each.x.shape[1] for each in traced) == counts, method


@each_option(EVERY)
def test_dropping_equals_masking_in_the_host(variant: Variant) -> None:
    """Dropping a patch equals letting no row attend to it: the other rows agree."""
    host = built(variant)
    if "attn_mask" not in inspect.signature(host.forward_features).parameters:
        pytest.skip("this timm's hosts take no attention mask")
    x = random_images(host)
    slimmed = slim_unchecked(host, Shuffle(), Rate(0.5, (0,)))
    with torch.no_grad():
        left = slimmed.trace(x)[-1]
        rows = left.cells() + left.prefix
        mask = torch.zeros(left.prefix + left.grid[0] * left.grid[1], dtype=torch.bool)
        mask[: left.prefix] = True
        mask[rows[0]] = True
        wanted = host.forward_features(x, attn_mask=mask.expand(len(mask), -1))
        got = host.norm(left.x)
    assert is_close(got[:, : left.prefix], wanted[:, : left.prefix]) if left.prefix else True
    assert is_close(got[:, left.prefix :], take(wanted, rows))


@each_option(PREFIXED, every=4)
def test_prefix_stays_first_and_untouched(variant: Variant) -> None:
    """A reduction after the last attention, or of its queries, cannot change any prefix row."""
    host = built(variant)
    depth, prefix = len(host.blocks), host.num_prefix_tokens
    assert prefix == variant.prefix
    with torch.no_grad():
        wanted = host.forward_features(random_images(host))[:, :prefix]
        for method in [*sample_methods(host), ShuffleQueries()]:
            traced = slim_unchecked(host, method, Rate(0.5, (depth - 1,))).trace(
                random_images(host)
            )
            assert traced[-1].patches < traced[-2].patches, method
            assert is_close(host.norm(traced[-1].x)[:, :prefix], wanted), method


@each_option(PREFIXED, every=4)
def test_exact_tail_gives_the_same_answer(variant: Variant) -> None:
    host = built(variant)
    x = random_images(host)
    with torch.no_grad():
        for method in [*sample_methods(host), ShuffleQueries(), ShuffleMap()]:
            full, exact = (
                slim_unchecked(host, method, Rate(0.6, (0, 2)), tail) for tail in ("full", "exact")
            )
            assert is_close(exact(x), full(x)), method


@pytest.mark.parametrize("variant", FREE, ids=str)
def test_other_image_sizes(variant: Variant) -> None:
    host = built(variant)
    odd = int(bool(variant.args.get("dynamic_img_pad")))
    size = (PATCH * 6 + odd, PATCH * 3 - 2 * odd)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5)).to(variant.dtype)
    with torch.no_grad():
        assert is_close(patchslim.slim(host, "identity")(x), host(x))
        slimmed = patchslim.slim(host, "tome", r=2)
        assert slimmed(x).shape == host(x).shape
        assert slimmed.forward_features(x).shape == host.forward_features(x).shape
        assert slimmed.trace(x)[-1].x.shape[1] == slimmed.counts(size)[-1]


@pytest.mark.parametrize("pad", [False, True])
def test_other_image_sizes_of_a_stem(pad: Any) -> None:
    stem = next(each for each in EVERY if each.label == "vit_base_r50_s16_224")
    free = {"dynamic_img_size": True, "dynamic_img_pad": pad}
    host = Variant("dynamic stem", stem.host, {**stem.args, **free}).build()
    model = patchslim.slim(host, "tome", r=1)
    x = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert is_close(patchslim.slim(host, "identity")(x), host(x))
        assert model.forward_features(x).shape == host.forward_features(x).shape
        with pytest.raises(WrongInput, match="multiples of the patch, 16x16"):
            model(x[..., :40])


class Doubled(nn.Linear):
    """Projection that is more than its weight, as quantized and low-rank ones are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("label", ["deit_base_patch16_224", "eva no biases", "eva plain"])
def test_replaced_projections_are_called(label: str) -> None:
    """The host is refused if its own code does not call the projection (EvaAttention)."""
    host = next(each for each in EVERY if each.label == label).build()
    plain = patchslim.slim(host, ShuffleQueries(), keep_rate=0.7, at=(0,))
    with torch.no_grad():
        before = plain(random_images(host))
        for block in host.blocks:
            block.attn.qkv.__class__ = Doubled
        full = patchslim.slim(host, ShuffleQueries(), keep_rate=0.7, at=(0,))(random_images(host))
        for block in host.blocks:
            block.attn.qkv.__class__ = nn.Linear
            if label != "eva plain":
                for p in block.attn.qkv.parameters():
                    p *= 2
        assert is_close(full, plain(random_images(host)))
        assert is_close(full, before) == (label == "eva plain")


@pytest.mark.parametrize("label", ["deit_base_patch16_224", "eva plain"])
def test_activations_can_be_recomputed(label: str) -> None:
    host = next(each for each in EVERY if each.label == label).build()
    x = random_images(host)
    model = patchslim.slim(host, "tome", r=2).train()
    wanted = gradients(model, host, x)
    model.set_grad_checkpointing()
    assert_same_gradients(gradients(model, host, x), wanted)
