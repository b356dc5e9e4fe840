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
from patchslim.tokens.tokens import Tokens

Part = Literal["qkv", "qk", "kv", "q", "v"]
STATES = "dense states"  # the option in which `head` finds them, if a call asks for them


@dataclass(frozen=True)
class HostFacts:
    """What the loop must know about a host, as it is now.

    Attributes:
        prefix: leading rows that are not patches: class, distillation and register tokens.
        image_shape: channels, height and width of the images that the host is made for. A video
            has frames before them; a spectrogram has no channels.
        scales: for each block the factor on the query-key product.
        dropouts: for each block the attention dropout that is in force now; 0 in evaluation.
        has_class_token: whether the first row is a class token.
        rows_read: how many leading rows the head reads; None where it may read all of them.
        has_relative_bias: whether its attention adds a bias by relative position (`Adapter.bias`).
        returns_rows: whether the host returns its sequence, which is then put back in order.
        has_query_pooling: whether the head pools with a query of its own, which can stand in for
            a class token.
        strides: for each block how many rows and columns of the grid become one. Empty in a flat
            host. In a block with a stride the queries are every `stride`-th row and column.
        feature_blocks: blocks after which the host's own `forward_intermediates` gives features;
            None for all of them.
        mixes_heads: whether its attention is not a softmax of query-key products for each head by
            itself, so that `Adapter.attend` computes it.
        recomputes_activations: whether the host was asked to recompute activations in the backward
            pass.
    """

    prefix: int
    image_shape: tuple[int, ...]
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]
    has_class_token: bool
    rows_read: int | None
    has_relative_bias: bool = False
    returns_rows: bool = False
    has_query_pooling: bool = False
    strides: tuple[int, ...] = ()
    feature_blocks: tuple[int, ...] | None = None
    mixes_heads: bool = False
    recomputes_activations: bool = False

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the host is made for."""
        return self.image_shape[-2], self.image_shape[-1]

    def stride(self, block: int) -> int:
        """Says how many rows and columns of the grid become one in a block: 1 in a flat host."""
        return self.strides[block] if self.strides else 1


class Adapter(ABC):
    """Takes a host apart into embed, project, mix, feed and head, using the host's own modules.

    A family says the classes of its hosts, and gives nine methods: `describe`, `shape`, `blocks`,
    `embed`, `project`, `mix`, `feed`, `norm` and `head`. The others have defaults that suit a plain
    image classifier.

    Attributes:
        family: what the family is called in messages and tables.
        host_classes: the classes of its hosts, with those that derive from them, by their dotted
            names ("timm.models.eva.Eva"), so that asking imports nothing.
        host_attributes: attributes of the host that its slimmed form shows as its own. None of
            them may run a forward pass of the dense host.
    """

    family: ClassVar[str]
    host_classes: ClassVar[frozenset[str]] = frozenset()
    host_attributes: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def describe(self, host: nn.Module) -> HostFacts:
        """Reads what the loop must know about the host as it is now, in every forward pass."""

    @abstractmethod
    def shape(self, host: nn.Module, image_size: tuple[int, int] | None = None) -> HostShape:
        """Counts rows and costs of the host at its own image size (None), or at another."""

    @abstractmethod
    def blocks(self, host: nn.Module) -> nn.ModuleList | nn.Sequential:
        """Lists the blocks in order."""

    @abstractmethod
    def embed(self, host: nn.Module, images: Tensor, options: Mapping[str, Any]) -> Tokens:
        """Embeds images: returns the tokens that enter the first block."""

    @abstractmethod
    def project(
        self, host: nn.Module, index: int, tokens: Tokens, part: Part
    ) -> tuple[Tensor, ...]:
        """Projects tokens to queries, keys, values, as `part` says (B, heads, N, channels)."""

    @abstractmethod
    def mix(self, host: nn.Module, index: int, queries: Tokens, attended: Tensor) -> Tensor:
        """Adds attention to the residual stream, for the rows that asked."""

    @abstractmethod
    def feed(self, host: nn.Module, index: int, x: Tensor) -> Tensor:
        """Adds the feed-forward to the residual stream."""

    @abstractmethod
    def norm(self, host: nn.Module, x: Tensor) -> Tensor:
        """Applies what the host does to features after its last block.

        It is called where features are returned. `head` gets tokens on which it was not called.
        """

    @abstractmethod
    def head(self, host: nn.Module, tokens: Tokens, options: Mapping[str, Any]) -> Any:
        """Returns what the host itself would return, from the tokens after the last block.

        The tokens come straight from the block: the host's final norm is called here.
        """

    def serves(self, host: nn.Module) -> bool:
        """Tells whether this is the adapter for hosts of this class: one of `host_classes`."""
        names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(host).__mro__}
        return not names.isdisjoint(self.host_classes)

    def unsupported_reason(self, host: nn.Module) -> str | None:
        """Says why this very host cannot be slimmed exactly, or None.

        The answer continues the sentence "this model cannot be slimmed:", and ends in a full stop.
        """
        return None

    def size_mismatch(
        self, host: nn.Module, size: tuple[int, int], options: Mapping[str, Any]
    ) -> str | None:
        """Says why images of this height and width do not fit the host, or None."""
        height, width = self.describe(host).image_size
        if size == (height, width):
            return None
        return f"this host takes {height}x{width} pixels. Resize the images."

    def options(self, host: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keyword arguments of a call that can be honoured; raises for any other."""
        if given:
            raise WrongInput(f"A slimmed {self.family} takes images alone, not {sorted(given)}.")
        return {}

    def asks_for_states(self, options: Mapping[str, Any]) -> bool:
        """Tells whether a call asks for the sequence before and after every block.

        Then `head` finds the list of them, in the dense order, among its options as `STATES`.
        """
        return False

    def logits(self, output: Any) -> Tensor:
        """Picks the tensor to compare from what the host returned."""
        tensor: Tensor = output
        return tensor

    def recipe(self, host: nn.Module) -> dict[str, Any] | None:
        """Describes the host as plain data for `rebuild`; None if it cannot be described.

        It is kept as JSON, from which a tuple comes back as a list.
        """
        return None

    def rebuild(self, recipe: Mapping[str, Any]) -> nn.Module:
        """Builds a host of the architecture that `recipe` describes, with any weights."""
        raise UnsupportedModel(f"{self.family}: its adapter cannot rebuild a host.")

    def bias(self, host: nn.Module, index: int, queries: Tokens, keys: Tokens) -> Tensor | None:
        """Computes what the host adds to attention logits, by relative position; None for nothing.

        Broadcastable to (B, heads, queries, keys). Each row is where its `Tokens.cells()` says, in
        the grid of its own tokens.
        """
        return None

    def attend(
        self,
        host: nn.Module,
        index: int,
        qkv: tuple[Tensor, Tensor, Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        """Computes attended values as the host does, if `HostFacts.mixes_heads`.

        The bias is for the logits right before the softmax, as that of `bias` is.
        """
        raise UnsupportedModel(f"{self.family}: its adapter does not say how heads are mixed.")

    def embedding(self, host: nn.Module, images: Tensor) -> Tensor:
        """Computes the embedding of each patch, without its position (B, H*W, C)."""
        raise UnsupportedModel(
            f"{self.family}: its adapter does not tell patch embeddings from positions."
        )

    def readout(self, host: nn.Module, tokens: Tokens) -> Tensor:
        """Computes the attention of a pooling head's query over the patches (B, n)."""
        raise UnsupportedModel(f"{self.family}: this host's head has no query of its own.")

    def pooled_classifiers(self, host: nn.Module) -> list[nn.Module]:
        """Lists the host's classifiers of a head that does not read the class token.

        They take rows (B, C). There are two if one of them learns from a teacher. Copies of
        them make the auxiliary head of a training run.
        """
        raise UnsupportedModel(
            f"auxiliary= (--auxiliary) trains a second head on the class token, of hosts that have "
            f"one and classify by the mean of their patches; {self.family}: this host is none. In "
            'timm that is global_pool="avg" beside class_token=True.'
        )


def patch_pixels(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cuts out the pixels that each cell of the grid covers (B, H*W, C*h*w)."""
    if images.ndim != 4:
        raise WrongInput(
            f"Patches are compared by their pixels in images alone, not in a batch of shape "
            f"{tuple(images.shape)}."
        )
    (height, width), (down, right) = images.shape[2:], grid
    if height % down or width % right:
        raise WrongInput(
            f"Images of {height}x{width} pixels have no whole number of pixels for each of "
            f"{down}x{right} patches, so that patches cannot be compared by pixels."
        )
    cells = images.unflatten(3, (right, -1)).unflatten(2, (down, -1))
    pixels: Tensor = cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return pixels
