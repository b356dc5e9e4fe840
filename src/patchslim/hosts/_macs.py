"""Multiply-adds of a host's own layers, counted from their shapes."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


def linear_macs(module: nn.Module | None) -> int:
    """Counts the multiply-adds a row of all linear layers and 1x1 convolutions in `module`.

    A quantised layer stores its weights in another form, so features are counted and not weights.
    """
    if module is None:
        return 0
    parts = _running_parts(module)
    if parts is not None:
        return sum(map(linear_macs, parts))
    inner = sum(map(linear_macs, module.children()))
    if inner:  # a layer with a low-rank update is the layers that it is made of
        return inner
    if isinstance(module, nn.Conv2d):
        return module.weight.numel()
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return math.prod(each for each in features if each) if all(features) else 0


def _running_parts(module: nn.Module) -> list[nn.Module] | None:
    """Lists what runs now in a layer that PEFT has put in a layer's place; None for any other."""
    original, base = (getattr(module, name, None) for name in ("original_module", "base_layer"))
    if isinstance(original, nn.Module):  # a layer that is trained whole, beside its first state
        return [original]
    sides = [getattr(module, name, None) for name in ("lora_A", "lora_B")]
    if not isinstance(base, nn.Module) or not all(isinstance(x, nn.ModuleDict) for x in sides):
        return None
    idle = getattr(module, "merged", False) or getattr(module, "disable_adapters", False)
    active = () if idle else getattr(module, "active_adapters", ())
    return [base, *(side[name] for side in sides for name in active if name in side)]  # type: ignore[index, operator]


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
