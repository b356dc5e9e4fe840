"""Groups of parameters: which learning rate and which weight decay each parameter gets.

It knows a slimmed model as named parameters and numbered blocks, and no family and no method.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from patchslim.model.model import SlimModel
from patchslim.training.config import TrainConfig

HOST_PREFIX = "host."  # where a SlimModel keeps its host


def group_parameters(
    slimmed: SlimModel, course: TrainConfig, more: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """The parameters that learn, `more` of them too, by factor on the rate and by weight decay."""
    spared = _no_decay_names(slimmed.host)
    factors = layer_lr_factors(slimmed, course.layer_decay)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in (*slimmed.named_parameters(), *(("", each) for each in more)):
        if not parameter.requires_grad:
            continue
        host = name.startswith(HOST_PREFIX)
        factor = course.host_lr * factors[name] if host else 1.0
        decays = parameter.ndim > 1 and name not in spared
        decay = course.weight_decay if decays else 0.0
        group = groups.setdefault(
            (factor, decay, host),
            {"params": [], "lr": course.lr, "weight_decay": decay, "factor": factor, "host": host},
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_lr_factors(slimmed: SlimModel, decay: float) -> dict[str, float]:
    """For each of the host's parameters decay**(layers above it): the head 1, the last block decay.

    What comes before the blocks is one layer, each block is one, and what comes after is one.
    """
    modules = slimmed.plan.adapter.blocks(slimmed.host)
    blocks = {id(block): index for index, block in enumerate(modules)}
    prefixes = {
        f"{name}.": blocks[id(module)] + 1
        for name, module in slimmed.named_modules()
        if id(module) in blocks
    }
    top = len(blocks) + 1
    factors: dict[str, float] = {}
    layer = 0
    for name, _ in slimmed.named_parameters():
        if name.startswith(HOST_PREFIX):
            own = [found for prefix, found in prefixes.items() if name.startswith(prefix)]
            # Hosts name their parts in the order of use, so the last block ends the body.
            layer = own[0] if own else (top if layer else 0)
            factors[name] = decay ** (top - layer)
    return factors


def _no_decay_names(host: nn.Module) -> set[str]:
    """Parameters that the host itself wants no weight decay on, by their names in a SlimModel."""
    says = getattr(host, "no_weight_decay", None)
    return {HOST_PREFIX + name for name in says()} if callable(says) else set()
