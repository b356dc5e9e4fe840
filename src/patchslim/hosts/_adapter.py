"""`Adapter`: where one family of models keeps its parts.

An adapter knows a host library and nothing of methods or schedules. It is stateless: every call
gets the host. A family is one file in `patchslim/hosts`, named `<library>_<family>.py`; only the
files of the library that a model comes from are imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from patchslim.errors import UnsupportedModel, WrongInput
from patchslim.tokens.shapes import HostShape
from patchslim.tokens.tokens import ContentKind, Tokens

Part = Literal["qkv", "qk", "kv", "q", "v"]


@dataclass(frozen=True)
class HostFacts:
    """What the loop must know about a host, as it is now.

    Attributes:
        prefix: leading rows that are not patches: class, distillation and register tokens.
        image_shape: channels, height and width of the images that the host is made for.
        scales: for each block the factor on the query-key product.
        dropouts: for each block the attention dropout that is in force now; 0 in evaluation.
        has_class_token: whether the first row is a class token.
        rows_read: how many leading rows the head reads; None where it may read all of them.
        returns_rows: whether the host returns its sequence, which is then put back in order.
        has_query_pooling: whether the head pools with a query of its own, which can stand in for
            a class token.
        strides: for each block how many rows and columns of the grid become one. Empty in a flat
            host. In a block with a stride the queries are every `stride`-th row and column.
        feature_blocks: blocks after which the host's own `forward_intermediates` gives features;
            None for all of them.
        recomputes_activations: whether the host was asked to recompute activations in the backward
            pass.
    """

    prefix: int
    image_shape: tuple[int, int, int]
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    has_class_token: bool
    rows_read: int | None
    returns_rows: bool = False
    has_query_pooling: bool = False
    strides: tuple[int, ...] = ()
    feature_blocks: tuple[int, ...] | None = None
    recomputes_activations: bool = False

    def stride(self, block: int) -> int:
        """How many rows and columns of the grid become one in a block: 1 in a flat host."""
        return self.strides[block] if self.strides else 1


class Adapter(ABC):
    """Takes a host apart into embed, project, mix, feed and head, using the host's own modules.

    Class attributes:
        family: what the family is called in messages and tables.
        surface: attributes of the host that its slimmed form shows as its own. None of them may
            run a forward pass of the dense host.
        relative: whether its attention adds a bias by relative position (`bias`).
    """

    family: ClassVar[str]
    host_attributes: ClassVar[frozenset[str]] = frozenset()
    has_relative_bias: ClassVar[bool] = False

    @abstractmethod
    def serves(self, host: nn.Module) -> bool:
        """Whether this is the adapter for hosts of this class."""

    @abstractmethod
    def unsupported_reason(self, host: nn.Module) -> str | None:
        """Why this very host cannot be served exactly, or None."""

    def describe(self, host: nn.Module) -> HostFacts:
        """What the loop must know about the host, as it is now."""
        indices = range(len(self.blocks(host)))
        strides = tuple(self.stride(host, index) for index in indices)
        return HostFacts(
            prefix=self.prefix(host),
            image_shape=self.image_shape(host),
            scales=tuple(self.scale(host, index) for index in indices),
            dropouts=tuple(self.dropout(host, index) for index in indices),
            has_class_token=self.has_class_token(host),
            rows_read=self.rows_read(host),
            returns_rows=self.returns_rows(host),
            has_query_pooling=self.has_query_pooling(host),
            strides=strides if max(strides) > 1 else (),
            feature_blocks=self.feature_blocks(host),
            recomputes_activations=self.recomputes_activations(host),
        )

    @abstractmethod
    def prefix(self, host: nn.Module) -> int:
        """How many leading rows are not patches."""

    @abstractmethod
    def rows_read(self, host: nn.Module) -> int | None:
        """How many leading rows the head reads, or None where it may read all of them."""

    @abstractmethod
    def size_mismatch(
        self, host: nn.Module, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Why images of this height and width do not fit the host, or None."""

    @abstractmethod
    def shape(self, host: nn.Module, image_size: tuple[int, int] | None = None) -> HostShape:
        """Rows and costs of the host at its own image size, or at another."""

    @abstractmethod
    def image_shape(self, host: nn.Module) -> tuple[int, int, int]:
        """Channels, height and width of the images that the host is made for."""

    @abstractmethod
    def embed(self, host: nn.Module, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """The tokens that enter the first block."""

    @abstractmethod
    def blocks(self, host: nn.Module) -> nn.ModuleList | nn.Sequential:
        """The blocks in order."""

    @abstractmethod
    def scale(self, host: nn.Module, index: int) -> float:
        """The factor on the query-key product in block `index`."""

    @abstractmethod
    def dropout(self, host: nn.Module, index: int) -> float:
        """The attention dropout that is in force now in block `index`."""

    @abstractmethod
    def project(
        self, host: nn.Module, index: int, tokens: Tokens, part: Part
    ) -> tuple[Tensor, ...]:
        """The queries, keys, values named by `part`, each (B, heads, N, channels)."""

    @abstractmethod
    def mix(self, host: nn.Module, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """The residual stream after attention, for the rows that asked."""

    @abstractmethod
    def feed(self, host: nn.Module, index: int, x: Tensor) -> Tensor:
        """The residual stream after the feed-forward."""

    @abstractmethod
    def norm(self, host: nn.Module, x: Tensor) -> Tensor:
        """What the host does to features after its last block."""

    @abstractmethod
    def head(self, host: nn.Module, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """What the host itself would return, from the tokens after the last block."""

    @abstractmethod
    def logits(self, output: Any) -> Tensor:
        """The tensor to compare in what the host returned."""

    @abstractmethod
    def returns_rows(self, host: nn.Module) -> bool:
        """Whether the host returns its sequence, so that it has to be put back in order."""

    @abstractmethod
    def options(self, host: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a call that can be honoured; an error for any other."""

    @abstractmethod
    def recipe(self, host: nn.Module) -> dict[str, Any] | None:
        """Plain data from which `rebuild` makes a host of the same architecture, or None."""

    @abstractmethod
    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """A host of the architecture that `recipe` describes, with any weights."""

    @abstractmethod
    def has_class_token(self, host: nn.Module) -> bool:
        """Whether the first row is a class token."""

    def patch_content(
        self, host: nn.Module, images: Tensor, what: ContentKind, grid: tuple[int, int]
    ) -> Tensor:
        """What each cell of the grid shows by itself (B, H*W, D): its pixels, or its embedding."""
        if what == "embedding":
            return self.embedding(host, images)
        (height, width), (down, right) = images.shape[2:], grid
        if height % down or width % right:
            raise WrongInput(
                f"Images of {height}x{width} pixels have no whole number of pixels for each of "
                f"{down}x{right} patches, so that patches cannot be compared by pixels."
            )
        cells = images.unflatten(3, (right, -1)).unflatten(2, (down, -1))
        pixels: Tensor = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return pixels

    def embedding(self, host: nn.Module, images: Tensor) -> Tensor:
        """The embedding of each patch, without its position (B, H*W, C)."""
        raise UnsupportedModel(
            f"{self.family}: its adapter does not tell patch embeddings from positions."
        )

    def has_query_pooling(self, host: nn.Module) -> bool:
        """Whether the head pools with a query of its own, which can stand in for a class token."""
        return False

    def readout(self, host: nn.Module, tokens: Tokens) -> Tensor:
        """Attention of the pooling head's query over the patches (B, n), where it pools so."""
        raise UnsupportedModel(f"{self.family}: this host's head has no query of its own.")

    def stride(self, host: nn.Module, index: int) -> int:
        """How many rows and columns of the grid become one in block `index`: 1 in a flat host.

        In such a block the queries are every `stride`-th row and column, and keys and values all.
        """
        return 1

    def grids_after_stride(self, host: nn.Module) -> dict[int, tuple[int, int]]:
        """The grid that is left after each block with a stride: none in a flat host."""
        return {}

    def feature_blocks(self, host: nn.Module) -> tuple[int, ...]:
        """The blocks after which the host's own `forward_intermediates` gives features."""
        return tuple(range(len(self.blocks(host))))

    def bias(self, host: nn.Module, index: int, queries: Tokens, keys: Tokens) -> Tensor | None:
        """What the host adds to its attention logits, by relative position; None for nothing.

        Broadcastable to (B, heads, queries, keys). Each row is where its `Tokens.cells()` says, in
        the grid of its own tokens.
        """
        return None

    def pooled_classifiers(self, host: nn.Module) -> list[nn.Module]:
        """The host's classifiers, for rows (B, C), of a head that does not read the class token.

        One, or two where the host answers its teacher apart. Copies of them make the auxiliary head
        of a course.
        """
        raise UnsupportedModel(
            f"auxiliary= (--auxiliary) trains a second head on the class token, of hosts that have "
            f"one and classify by the mean of their patches; {self.family}: this host is none. In "
            'timm that is global_pool="avg" beside class_token=True.'
        )

    def recomputes_activations(self, host: nn.Module) -> bool:
        """Whether the host was asked to recompute activations in the backward pass."""
        return False
