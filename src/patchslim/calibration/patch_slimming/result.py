"""What the layer-by-layer search of Patch Slimming finds, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerResult:
    """What was found for one block.

    Attributes:
        block: its number.
        kept: patch rows that it gives out.
        error: of the next block's features, with `kept` rows, after tuning; mean square.
        scale: the mean square of those features themselves.
        curve: numbers of rows and their errors, as far as they were tried, before tuning.
    """

    block: int
    kept: int
    error: float
    scale: float
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PatchSlimmingResult:
    """The pyramid as far as it is known: from the last block down to `layers[-1].block`.

    Attributes:
        cells: all cells in order; the rows of every block found so far are the first of them.
        layers: the blocks that were searched, from the last but one down.
    """

    cells: tuple[int, ...]
    layers: tuple[LayerResult, ...] = ()

    def kept(self) -> dict[int, int]:
        """Patch rows that each block searched so far gives out."""
        return {layer.block: layer.kept for layer in self.layers}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PatchSlimmingResult:
        """What `to_json` gave."""
        layers = tuple(
            LayerResult(**{**each, "curve": tuple((int(n), float(e)) for n, e in each["curve"])})
            for each in data["layers"]
        )
        return PatchSlimmingResult(tuple(data["cells"]), layers)
