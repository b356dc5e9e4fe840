"""What libraries ask of their own models, answered for a slimmed one.

timm's `forward_intermediates`, from the tokens that are left; attributes of the host that name its
parameters, by the names that these have here; and what to call instead of what cannot be had.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from torch import Tensor, nn

from patchslim.errors import BadFile, WrongExport, WrongInput
from patchslim.model.plan import Plan
from patchslim.settings import Range, check_choice, check_value
from patchslim.tokens.tokens import Tokens

PREFIX: Final = "host."  # of the host's parameters in a slimmed model
# What to do instead of reading attributes of timm's that a slimmed model cannot have.
INSTEAD = {
    "get_intermediate_layers": (
        "Call slimmed.forward_intermediates(images, n, output_fmt='NLC', intermediates_only=True), "
        "or read slimmed.trace(images)."
    ),
    "prune_intermediate_layers": "Prune the model before it is slimmed.",
    "set_input_size": (
        "Set the size before it is slimmed: slimmed.host.set_input_size(...), and slim the host "
        "again."
    ),
    "load_pretrained": "Load weights into the model itself: slimmed.host.load_pretrained(...).",
}
# Functions of the host that call the model: here they call the slimmed one.
REBOUND = frozenset({"forward_with_filtered_kwargs"})
OTHERWISE = "The untouched model is at .host (beware: calling it runs the dense model)."


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
        grids = [traced[index].axes for index in blocks]
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


def host_attribute(model: TracedModel, name: str) -> Any:
    """Reads an attribute of the host; where it names parameters, by the slimmed model's names."""
    value = getattr(model.host, name)
    if name in REBOUND:
        return types.MethodType(value.__func__, model)
    rename = RENAMING.get(name)
    return value if rename is None else functools.partial(rename, value)


def _no_weight_decay(list_names: Callable[[], set[str]]) -> set[str]:
    """Lists the parameters that are not decayed."""
    return {PREFIX + name for name in list_names()}


def _group_matcher(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Makes the patterns, or the function, by which timm groups parameters into layers."""
    matcher = make(*args, **options)
    if not isinstance(matcher, Mapping):
        return lambda name: matcher(name.removeprefix(PREFIX))
    return {group: _prefix_patterns(patterns) for group, patterns in matcher.items()}


def _prefix_patterns(patterns: Any) -> Any:
    """Puts the prefix before a pattern that is matched from the start, or before several."""
    if isinstance(patterns, str):
        from_start = re.sub(r"(?<![\[\\])\^", "", patterns)
        return rf"{re.escape(PREFIX)}(?:{from_start})"
    if patterns is None:
        return None
    return [(_prefix_patterns(pattern), suffix) for pattern, suffix in patterns]


RENAMING: dict[str, Callable[..., Any]] = {
    "no_weight_decay": _no_weight_decay,
    "group_matcher": _group_matcher,
}


def check_names(state: Mapping[str, Tensor], prefix: str, host: nn.Module) -> None:
    """Refuses weights of the dense model, which would be passed over where loading is lenient."""
    if any(name.startswith(prefix + PREFIX) for name in state):
        return
    dense = next((prefix + name for name in host.state_dict() if prefix + name in state), None)
    if dense is not None:
        raise BadFile(
            f"These weights have the names of the dense model ({dense}), and a slimmed one keeps "
            f"it in its .host ({prefix}{PREFIX}{dense.removeprefix(prefix)}). Load them into "
            ".host, or before slimming."
        )


def refuse_fx() -> WrongExport:
    """Says what to call instead of tracing by torch.fx."""
    return WrongExport(
        "torch.fx cannot trace a slimmed model, since what happens to its tokens depends on their "
        "shapes. Its graph comes from torch.export.export(slimmed, (images,)), and features of "
        "its blocks from slimmed.forward_intermediates(images)."
    )


def refuse_script() -> WrongExport:
    """Says what to call instead of compiling by TorchScript."""
    return WrongExport(
        "torch.jit.script cannot compile a slimmed model. Call patchslim.export(slimmed, path), or "
        "torch.export.export(slimmed, (images,))."
    )
