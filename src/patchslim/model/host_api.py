"""timm's `forward_intermediates`, answered by the tokens that are left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from patchslim.errors import WrongInput
from patchslim.model.plan import Plan
from patchslim.settings import Range, check_choice, check_value
from patchslim.tokens.tokens import Tokens


class TracedModel(Protocol):
    """What a `SlimModel` has that features are read from."""

    plan: Plan

    @property
    def host(self) -> nn.Module:
        """Model that was given, unchanged."""

    def trace(self, images: Tensor, blocks: int | None = None) -> list[Tokens]:
        """Returns the tokens after each of the first `blocks` blocks, with the map to the grid."""


def forward_intermediates(  # noqa: PLR0913 (timm's own arguments)
    model: TracedModel,
    x: Tensor,
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,  # noqa: FBT001, FBT002
    norm: bool = False,  # noqa: FBT001, FBT002
    stop_early: bool = False,  # noqa: FBT001, FBT002
    output_fmt: Literal["NCHW", "NLC"] = "NCHW",
    intermediates_only: bool = False,  # noqa: FBT001, FBT002
    output_dict: bool = False,  # noqa: FBT001, FBT002
) -> Any:
    """Features after the blocks `indices`, every grid cell in its place (timm's own call)."""
    host, adapter = model.host, model.plan.adapter
    check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
    facts = adapter.describe(host)
    levels = facts.feature_blocks or tuple(range(len(facts.scales)))
    blocks = [levels[index] for index in _block_indices(len(levels), indices)]
    traced = model.trace(x, blocks[-1] + 1 if stop_early or intermediates_only else None)
    rows = [traced[index].dense_features() for index in blocks]
    if norm:
        rows = [adapter.norm(host, each) for each in rows]
    prefix = facts.prefix
    leading, maps = [each[:, :prefix] for each in rows], [each[:, prefix:] for each in rows]
    if output_fmt == "NCHW":
        grids = [traced[index].grid for index in blocks]
        maps = [
            each.transpose(1, 2).unflatten(2, grid).contiguous()
            for each, grid in zip(maps, grids, strict=True)
        ]
    paired = return_prefix_tokens and prefix > 0
    result: dict[str, Any] = {"image_intermediates": maps}
    if paired and output_dict:
        result["image_intermediates_prefix"] = leading
    elif paired:
        result["image_intermediates"] = list(zip(maps, leading, strict=True))
    if not intermediates_only:
        result["image_features"] = adapter.norm(host, traced[-1].dense_features())
    if output_dict:
        return result
    if intermediates_only:
        return result["image_intermediates"]
    return result["image_features"], result["image_intermediates"]


def _block_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Lists the blocks meant: the last n, all, or those given; negatives count from the end."""
    if indices is None:
        return list(range(depth))
    cure = f"This host has levels 0 to {depth - 1}; a number alone means the last so many of them."
    if not isinstance(indices, Sequence) or isinstance(indices, str | bytes):
        last = check_value("indices", indices, int, Range(1, depth), WrongInput, cure)
        return list(range(depth - last, depth))
    within = Range(-depth, depth - 1)
    listed = [check_value("indices", each, int, within, WrongInput, cure) for each in indices]
    if not listed:
        raise WrongInput(f"indices={indices}: none. {cure}")
    return sorted({index % depth for index in listed})
