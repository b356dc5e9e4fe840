"""Checks the state of a training before anything of the run is replaced by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from patchslim.runs.state_checks import check_alike

# Entries of a group in which versions of torch differ; torch adds what is missing.
OPTIONAL = frozenset(
    """amsgrad maximize foreign capturable differentiable fused decoupled_weight_decay""".split()
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each weight


def check_training_state(
    state: Mapping[str, Any],
    *,
    module: nn.Module,
    optimizer: Optimizer,
    average: Mapping[str, Any],
    scaler: Mapping[str, Any],
    student: nn.Module,
    total_steps: int,
) -> None:
    """Refuses the state of a checkpoint that has not the form of this run.

    Args:
        state: what the checkpoint holds.
        module: the module that is trained, without a wrapper of several processes.
        optimizer: its optimiser.
        average: the averaged weights, or nothing.
        scaler: the state of the gradient scaler.
        student: the model whose best weights are kept.
        total_steps: how many steps the run has.

    Raises:
        TypeError: it says where they differ.
        LookupError: an entry is missing.
    """
    check_alike("step", state["step"], 0)
    if not 0 <= state["step"] <= total_steps:
        raise ValueError(f"step is {state['step']}, and the run has {total_steps}")
    check_alike("model", state["full"]["model"], module.state_dict())
    check_alike("average", state["average"], average)
    check_alike("scaler", state["scaler"], scaler)
    check_alike("recent", state["recent"], [0.0])
    _check_optimizer(state["full"]["optimizer"], optimizer)
    if state["best"] is not None:
        check_alike("best", state["best"], {"step": 0, "score": 0.0, "state": student.state_dict()})


def _check_optimizer(saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Refuses settings and moments that are not those of these parameters."""
    groups = optimizer.state_dict()["param_groups"]
    if len(saved["param_groups"]) != len(groups):
        raise TypeError(f"the optimiser has {len(groups)} groups of weights, and not as many there")
    for before, now in zip(saved["param_groups"], groups, strict=True):
        missing = now.keys() - before.keys() - OPTIONAL
        if missing:
            raise TypeError(f"the optimiser has no {', '.join(sorted(missing))} there")
        for name in before.keys() & now.keys():
            check_alike(f"optimizer.{name}", before[name], now[name])
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for index, moments in saved["state"].items():
        for name in MOMENTS:
            check_alike(f"optimizer.{index}.{name}", moments[name], parameters[index])
        if float(moments["step"]) < 0:
            raise ValueError(f"optimizer.{index}.step is {moments['step']}")
