"""CaiT's heads talk to each other: what that means for merged tokens, and for methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patchslim
from patchslim.errors import BadSchedule, UnsupportedModel
from timm_small_hosts import CAIT


@pytest.fixture
def cait() -> Any:
    """Makes a tiny CaiT."""
    return CAIT[0].build()


def test_a_merged_key_counts_as_many_as_it_stands_for(cait: Any) -> None:
    """Also in what the second mixing adds to every key, which a softmax does not make small."""
    adapter = patchslim.find_adapter(cait)
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=noise) for _ in "qkv")
    times = torch.tensor([1, 3, 1, 2, 1, 1])
    repeated = (each.repeat_interleave(times, dim=2) for each in (k, v))
    sizes = times.log()[None, None, None, :]
    with torch.no_grad():
        wanted = adapter.attend(cait, 0, (q, *repeated), None)
        got = adapter.attend(cait, 0, (q, k, v), sizes)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_a_key_of_padding_counts_as_none(cait: Any) -> None:
    adapter = patchslim.find_adapter(cait)
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=noise) for _ in "qkv")
    mask = torch.zeros(2, 1, 1, 6)
    mask[..., 4:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        wanted = adapter.attend(cait, 0, (q, k[:, :, :4], v[:, :, :4]), None)
        got = adapter.attend(cait, 0, (q, k, v), mask)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_methods_that_read_attention_maps_are_refused(cait: Any) -> None:
    with pytest.raises(UnsupportedModel, match="mixes those of its heads"):
        patchslim.slim(cait, "mctf", r=2)
    reading = patchslim.slim(cait, "similarity", weight="received", keep=0.5)
    with pytest.raises(BadSchedule, match="mixes those of its heads"):
        reading(torch.randn(1, 3, 16, 20))
