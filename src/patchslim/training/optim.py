"""Sorts parameters into groups for the optimiser, by learning rate and weight decay.

It knows a slimmed model as named parameters and numbered blocks, and neither families nor methods.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from patchslim.model.model import SlimModel
from patchslim.training.config import TrainConfig

HOST_PREFIX = "host."  # where a SlimModel keeps its host


def group_parameters(
    slimmed: SlimModel, config: TrainConfig, more: Iterable[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Returns the parameter groups for the optimiser.

    Args:
        slimmed: the model. Parameters that take no gradient are left out.
        config: how to train.
        more: further parameters, which learn at the full rate.

    Returns:
        Groups as torch.optim takes them. Each also says its "factor" on the learning rate, and
        whether its parameters belong to the "host".
    """
    no_decay = _no_decay_names(slimmed.host)
    factors = layer_lr_factors(slimmed, config.layer_decay)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in (*slimmed.named_parameters(), *(("", each) for each in more)):
        if not parameter.requires_grad:
            continue
        host = name.startswith(HOST_PREFIX)
        factor = config.host_lr * factors[name] if host else 1.0
        decays = parameter.ndim > 1 and name not in no_decay
        decay = config.weight_decay if decays else 0.0
        group = groups.setdefault(
            (factor, decay, host),
            {"params": [], "lr": config.lr, "weight_decay": decay, "factor": factor, "host": host},
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_lr_factors(slimmed: SlimModel, decay: float) -> dict[str, float]:
    """Returns the factor on the learning rate of each of the host's parameters, by name.

    It is decay**(number of layers above). Everything before the blocks counts as one layer, each
    block is one, and everything after the blocks is one. So the head has 1, and the last block
    `decay`.
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
            own = [index for prefix, index in prefixes.items() if name.startswith(prefix)]
            # Hosts name their parts in the order of use: after the last block comes the head.
            layer = own[0] if own else (top if layer else 0)
            factors[name] = decay ** (top - layer)
    return factors


def _no_decay_names(host: nn.Module) -> set[str]:
    """Returns the names, in a SlimModel, of the parameters that the host exempts from decay."""
    list_names = getattr(host, "no_weight_decay", None)
    return {HOST_PREFIX + name for name in list_names()} if callable(list_names) else set()
