"""Backbones of transformers: models that return maps of features, after the stages asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchslim.hosts._adapter import STATES
from patchslim.tokens.tokens import Tokens


def is_backbone(host: Any) -> bool:
    """Tells whether it is a backbone, which returns maps of features."""
    return type(host).__name__.endswith("Backbone")


def returns_last_stage(host: Any) -> bool:
    """Tells whether a backbone returns its last stage and no other."""
    return list(host.out_features) == host.stage_names[-1:]


def returned_stages(host: Any, tokens: Tokens, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Finds the rows of the stages that a backbone returns: of the last, if no states are given."""
    if STATES not in options:
        return {host.stage_names[-1]: tokens.dense_features()}
    every = zip(host.stage_names, options[STATES], strict=True)
    return {name: rows for name, rows in every if name in host.out_features}


def lay_out_map(tokens: Tokens, rows: Tensor) -> Tensor:
    """Lays the patches of rows out as a map (B, C, H, W)."""
    patches = rows[:, tokens.prefix :].transpose(1, 2)
    return patches.unflatten(2, tokens.grid).contiguous()
