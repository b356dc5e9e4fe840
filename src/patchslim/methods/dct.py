"""`dct`: takes the sequence for a signal, and drops its highest frequencies.

He et al., "Fourier Transformer: Fast Long Range Modeling by Removing Sequence Redundancy with FFT
Operator" (Findings of ACL 2023), as OpenToMe applies it to images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchslim.methods import Method, Place, Placement, Signals
from patchslim.tokens.merging import Merge
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Resample(Merge):
    """Makes each new row of all old ones, by a `matrix` (m, n).

    For sizes and the map to the grid, a new row stands for the old ones at its place.
    """

    kind: ClassVar[str] = "merging"
    matrix: Tensor

    def move(
        self,
        t: Tensor,
        *,
        weight: Tensor | None = None,
        total: Tensor | None = None,
        prefix: int = 0,
    ) -> Tensor:
        """Multiplies rows of features by the matrix; adds up plain numbers of a row."""
        if t.ndim == 2:
            return super().move(t, weight=weight, total=total, prefix=prefix)
        moved = self.matrix.to(t.dtype) @ t[:, prefix:].flatten(2)
        moved = moved.view(t.shape[0], self.kept.shape[1], *t.shape[2:])
        return torch.cat([t[:, :prefix], moved], dim=1) if prefix else moved


class DCT(Method):
    """Drops the highest frequencies of the sequence of patches: every row is made of all others."""

    place = Place.BEFORE_BLOCK
    placement: ClassVar[Placement] = Placement.EVERY_BLOCK
    reads = ("x",)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Resample:
        """Keeps the `keep` lowest frequencies, and makes as many rows of them."""
        every = range(tokens.patches)
        to = torch.tensor([row * keep // len(every) for row in every], device=tokens.x.device)
        first = [-(-new * len(every) // keep) for new in range(keep)]
        kept, gone = tokens.rows()[:, first], tokens.rows()[:, sorted({*every} - {*first})]
        matrix = _cosines(keep, keep, tokens.sizes()).T @ _cosines(
            keep, tokens.patches, tokens.sizes()
        )
        return Resample(kept=kept, gone=gone, into=to[gone], matrix=matrix)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the product of the matrix and the rows, and that of its two factors."""
        return (block.left - prefix) * (rows - prefix) * (block.width + block.left - prefix)


def _cosines(frequencies: int, rows: int, like: Tensor) -> Tensor:
    """Makes the orthonormal cosines of the lowest frequencies over so many rows."""
    place = torch.arange(rows, device=like.device, dtype=like.dtype) + 0.5
    frequency = torch.arange(frequencies, device=like.device, dtype=like.dtype).unsqueeze(1)
    scale = torch.where(frequency == 0, 1.0, 2.0).to(like.dtype)
    return (scale / rows).sqrt() * (frequency * place * (math.pi / rows)).cos()
