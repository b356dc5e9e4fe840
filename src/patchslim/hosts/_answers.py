"""Outputs of a host for fixed images, and the difference of two outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from patchslim.hosts._adapter import Adapter

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Computes the largest deviation, relative to the largest value where that is above one."""
    scale = max(1.0, float(wanted.abs().max()))
    return float((got - wanted).abs().max()) / scale


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode for a while; then restores the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def noise_logits(adapter: Adapter, host: nn.Module, like: nn.Module | None = None) -> list[float]:
    """Computes the host's first 16 output values for one fixed noise image, with all tokens kept.

    A model of another family, such as a teacher, gets images of the size that `like` needs.
    """
    noise = torch.Generator().manual_seed(0)
    images = torch.randn((1, *adapter.describe(like or host).image_shape), generator=noise)
    parameter = next(host.parameters())
    with eval_mode(host), torch.no_grad():
        output = host(images.to(parameter.device, parameter.dtype))
    logits = adapter.logits(output) if like is None else getattr(output, "logits", output)
    answers: list[float] = logits.flatten()[:16].double().tolist()
    return answers
