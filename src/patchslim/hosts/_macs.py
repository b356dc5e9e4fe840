"""Multiply-adds of a host's own layers, counted from their shapes."""

from __future__ import annotations

import copy

import torch
from torch import nn


def linear_macs(module: nn.Module | None) -> int:
    """Counts the multiply-adds a row of all linear layers and 1x1 convolutions in `module`."""
    layers = () if module is None else module.modules()
    return sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d))


def convolution_macs(embed: nn.Module, image: tuple[int, ...]) -> int:
    """Counts the multiply-adds of a convolutional stem, on a weightless copy.

    Running the stem itself would move the statistics of its norms in training.
    """
    from torch.utils.flop_counter import FlopCounterMode

    stem = copy.deepcopy(embed).to("meta").requires_grad_(False).eval()
    dtype = next(embed.parameters()).dtype
    with FlopCounterMode(display=False) as counter:
        stem(torch.empty(1, *image, device="meta", dtype=dtype))
    return int(counter.get_total_flops()) // 2
