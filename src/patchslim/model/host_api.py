"""timm's `forward_intermediates`, answered by the tokens that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from patchslim.errors import WrongInput
from patchslim.hosts._adapter import Adapter
from patchslim.tokens.tokens import Tokens


@dataclass(frozen=True)
class Features:
    """What a call of `forward_intermediates` asks for, in timm's words."""

    indices: int | Sequence[int] | None
    return_prefix_tokens: bool
    norm: bool
    stop_early: bool
    output_fmt: Literal["NCHW", "NLC"]
    intermediates_only: bool
    output_dict: bool


def gather_features(
    wanted: Features,
    host: nn.Module,
    adapter: Adapter,
    trace: Callable[[int | None], list[Tokens]],
) -> Any:
    """Features after the blocks that are asked for, every grid cell in its place.

    `trace` gives the tokens after each of the first so many blocks, or after all for None.
    """
    facts = adapter.describe(host)
    levels = facts.feature_blocks or tuple(range(len(facts.scales)))
    blocks = [levels[index] for index in _block_indices(len(levels), wanted.indices)]
    early = wanted.stop_early or wanted.intermediates_only
    traced = trace(blocks[-1] + 1 if early else None)
    rows = [traced[index].dense_features() for index in blocks]
    if wanted.norm:
        rows = [adapter.norm(host, each) for each in rows]
    prefix = facts.prefix
    leading, maps = [each[:, :prefix] for each in rows], [each[:, prefix:] for each in rows]
    if wanted.output_fmt == "NCHW":
        grids = [traced[index].grid for index in blocks]
        maps = [
            each.transpose(1, 2).unflatten(2, grid).contiguous()
            for each, grid in zip(maps, grids, strict=True)
        ]
    paired = wanted.return_prefix_tokens and prefix > 0
    result: dict[str, Any] = {"image_intermediates": maps}
    if paired and wanted.output_dict:
        result["image_intermediates_prefix"] = leading
    elif paired:
        result["image_intermediates"] = list(zip(maps, leading, strict=True))
    if not wanted.intermediates_only:
        result["image_features"] = adapter.norm(host, traced[-1].dense_features())
    if wanted.output_dict:
        return result
    if wanted.intermediates_only:
        return result["image_intermediates"]
    return result["image_features"], result["image_intermediates"]


def _block_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """The blocks meant: the last n, all, or those listed (negative ones count from the end)."""
    if indices is None:
        return list(range(depth))
    listed = range(-indices, 0) if isinstance(indices, int) else indices
    if not listed or any(not -depth <= index < depth for index in listed):
        raise WrongInput(
            f"indices={indices}: this host has levels 0 to {depth - 1}; a number alone means the "
            "last so many of them."
        )
    return sorted({index % depth for index in listed})
