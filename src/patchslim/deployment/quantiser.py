"""`Quantiser`: how a target makes a graph of eight-bit integers. It does not judge the result.

`int8.py` tries the recipes, judges them, and leaves places in float until the result is good.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from patchslim.deployment.graph import Graph


class Quantiser(ABC):
    """What a target that can be written in int8 knows how to do.

    Attributes:
        recipes: the ways to quantise, by what they are called, in the order in which they are
            tried: the next one only as long as each is better than the one before.
        needs: the distributions that it needs besides the target's, and their oldest versions.
        extra: the extra of patchslim that installs them.
    """

    recipes: ClassVar[Sequence[str]]
    needs: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    extra: ClassVar[str | None] = None

    @abstractmethod
    def quantise(self, converted: Any, graph: Graph, images: Sequence[Tensor], recipe: str) -> Any:
        """The converted graph in int8, with ranges from images; decisions stay in float32.

        Args:
            converted: what the target's `convert` gave. It is left as it is.
            graph: what it was converted from.
            images: batches of the size that the graph takes, of one image if it takes any number.
            recipe: one of `recipes`.
        """

    @abstractmethod
    def list_places(self, quantised: Any) -> list[str]:
        """Names of the places at which activations are rounded to eight bits."""

    @abstractmethod
    def leave_float(self, quantised: Any, places: Sequence[str]) -> Any:
        """A copy in which activations are not rounded at these places."""
