"""What a slimmed model shows of its host's surface, so that the host library's tools run on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from patchslim.errors import WrongInput
from patchslim.hosts._adapter import Adapter
from patchslim.tokens.tokens import Tokens


class HostApi(nn.Module):
    """timm's and Hugging Face's own calls, answered by the tokens that are left."""

    host: nn.Module
    adapter: Adapter

    @abstractmethod
    def trace(self, images: Tensor, blocks: int | None = None) -> list[Tokens]:
        """The tokens after each of the first `blocks` blocks, with the map from cells to rows."""

    def __getattr__(self, name: str) -> Any:
        """Parts of the host's surface that run no dense forward pass."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            adapter = self.__dict__.get("adapter")
            if adapter is not None and name in adapter.host_attributes:
                return getattr(self.host, name)
            raise AttributeError(
                f"SlimModel has no {name!r}. The untouched model is at .host (beware: calling it "
                "runs the dense model)."
            ) from None

    def forward_features(self, images: Tensor) -> Tensor:
        """Features after the last norm, in the dense host's shape and order."""
        return self.adapter.norm(self.host, self.trace(images)[-1].dense_features())

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:  # noqa: FBT001, FBT002
        """The host's own head on features from `forward_features`."""
        head = self.host.get_submodule("").forward_head
        result: Tensor = head(x, pre_logits=pre_logits)  # type: ignore[operator]
        return result

    def forward_intermediates(  # noqa: PLR0913
        self,
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
        levels = self.adapter.feature_blocks(self.host)
        wanted = [levels[index] for index in _block_indices(len(levels), indices)]
        early = stop_early or intermediates_only
        traced = self.trace(x, wanted[-1] + 1 if early else None)
        prefix = self.adapter.prefix(self.host)
        rows = [traced[index].dense_features() for index in wanted]
        if norm:
            rows = [self.adapter.norm(self.host, each) for each in rows]
        leading, maps = [each[:, :prefix] for each in rows], [each[:, prefix:] for each in rows]
        if output_fmt == "NCHW":
            grids = [traced[index].grid for index in wanted]
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
            result["image_features"] = self.adapter.norm(self.host, traced[-1].dense_features())
        if output_dict:
            return result
        if intermediates_only:
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
