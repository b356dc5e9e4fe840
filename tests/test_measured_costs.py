"""Counts from shapes alone against torch's own counter on running models of all kinds."""

from __future__ import annotations

import pytest

import patchslim
from comparison import ShuffleMap, ShuffleQueries, sample_methods, slim_unchecked
from hf_hosts import HF_HOSTS, HfHost, random_pixels
from patchslim.schedules.schedule import Rate
from patchslim.testing.counting import count_macs
from patchslim.tokens.shapes import dense_macs
from timm_options import OPTIONS
from timm_variants import Variant, random_images, registered_variants

EVERY = [*registered_variants(), *OPTIONS, *HF_HOSTS]
# The laws of families count what each spends; by default these also meet methods with each place.
SOME = """deit_base_distilled_patch16_224 vit_base_patch16_siglip_224 vit_base_patch16_18x2_224
vit_dlittle_patch16_reg1_gap_256 eva02_base_patch14_224 vit_pe_core_base_patch16_224""".split()
FEW = [
    pytest.param(
        each, marks=() if each.label in SOME or "Dinov2F" in each.label else pytest.mark.slow
    )
    for each in EVERY
]


@pytest.mark.parametrize("variant", FEW, ids=str)
def test_counted_is_what_runs(variant: Variant | HfHost) -> None:
    host = variant.build()
    x = random_images(host, 1) if isinstance(variant, Variant) else random_pixels(host, 1)
    shape = patchslim.find_adapter(host).shape(host)
    assert dense_macs(shape).total == pytest.approx(count_macs(host, x), rel=0.005)
    for method in [*sample_methods(host), ShuffleQueries(), ShuffleMap()]:
        for tail in ("full", "exact"):
            model = slim_unchecked(host, method, Rate(0.7, (0, 2)), tail)
            cost = model.macs()
            counted = count_macs(model, x)
            assert cost.total + cost.choosing == pytest.approx(counted, rel=0.005), (method, tail)
