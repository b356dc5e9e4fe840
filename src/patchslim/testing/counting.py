"""Multiply-adds of a running model, by torch's own counter: the check on counts from shapes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, images: Tensor) -> int:
    """What torch counts while `model` answers for `images`, in multiply-adds an image.

    With attention written out, which every version of the counter sees on every device, and on a
    copy without gradients, which the counter cannot follow where they are switched off.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops()) // 2 // images.shape[0]
