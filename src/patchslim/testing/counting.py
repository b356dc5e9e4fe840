"""Multiply-adds of a running model, from torch's own counter, to check counts from shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Counts the multiply-adds an image that torch sees while `model` runs on `images`.

    The counter knows products of matrices, but not every fused operation that torch may run
    instead. So attention is computed unfused, also in `nn.MultiheadAttention`. No weight requires
    a gradient meanwhile: with gradients switched off, the counter cannot follow one that does.
    """
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        _without_fast_path(),
        _without_gradients(model),
        FlopCounterMode(display=False) as counter,
    ):
        model(images)
    return int(counter.get_total_flops()) // 2 // images.shape[0]


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keeps `nn.MultiheadAttention` from running as one operation that the counter cannot see."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Lets no weight require a gradient within the block, and restores all flags afterwards."""
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
