"""What the search of Patch Slimming finds, layer by layer, as plain values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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

    def check(self, last: int, patches: int) -> None:
        """Refuses what no search finds that begins at the block `last` of a grid of `patches`.

        Raises:
            ValueError: it says what is wrong.
        """
        if sorted(self.cells) != list(range(patches)):
            raise ValueError(f"its cells are not those of a grid of {patches}")
        if [layer.block for layer in self.layers] != [*range(last, -1, -1)][: len(self.layers)]:
            raise ValueError(f"its layers are not those from block {last} down")
        check_counts(self.kept(), [layer.block for layer in self.layers], patches)
        numbers = [each for layer in self.layers for each in (layer.error, layer.scale)]
        if not all(isinstance(each, float) and math.isfinite(each) for each in numbers):
            raise ValueError("an error of a layer is not a number")

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


def check_counts(counts: Mapping[int, Any], blocks: Collection[int], patches: int) -> None:
    """Refuses counts of patches that no block can give out.

    Raises:
        ValueError: it says what is wrong.
    """
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in counts.values())
    if {*counts} != {*blocks} or not whole or not all(0 <= n <= patches for n in counts.values()):
        raise ValueError(f"the counts {dict(counts)!r:.100} are not those of {len(blocks)} blocks")
