"""What the search of Patch Slimming finds, layer by layer, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerResult:
    """What was found for one block.

    Attributes:
        block: the number of the block.
        kept: how many patch rows it outputs.
        error: the mean squared error of the next block's features with `kept` rows, after tuning.
        scale: the mean square of those features themselves.
        curve: the numbers of rows that were tried and their errors, before tuning.
    """

    block: int
    kept: int
    error: float
    scale: float
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PatchSlimmingResult:
    """What was found so far, from the last block down to `layers[-1].block`.

    Attributes:
        cells: all cells of the grid in order. Each block keeps the first of them.
        layers: the blocks that were searched, in the order of the search: the last block first.
    """

    cells: tuple[int, ...]
    layers: tuple[LayerResult, ...] = ()

    def kept(self) -> dict[int, int]:
        """Returns how many patch rows each searched block outputs."""
        return {layer.block: layer.kept for layer in self.layers}

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, which `from_json` reads."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> PatchSlimmingResult:
        """Reads what `to_json` returned."""
        layers = tuple(
            LayerResult(**{**each, "curve": tuple((int(n), float(e)) for n, e in each["curve"])})
            for each in data["layers"]
        )
        return PatchSlimmingResult(tuple(data["cells"]), layers)
