"""`dpcknn`: clusters tokens around density peaks, and replaces each cluster by its mean.

Zeng et al., "Not All Tokens Are Equal: Human-centric Visual Analysis via Token Clustering
Transformer" (CVPR 2022), as Haurum et al., "Which Tokens to Use?" (ICCV Workshops 2023) apply it
to a plain transformer.
"""

from __future__ import annotations

import torch

from patchslim.errors import BadSetting
from patchslim.methods import Method, Place, Signals
from patchslim.methods import _clustering as clustering
from patchslim.methods._method import share_of_all
from patchslim.tokens.merging import Merge
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MOST_PATCHES = 4096  # with more, the distances of all to all take too much memory


class DPCKNN(Method):
    """Clusters patches around those in dense regions that are far from any denser one.

    A cluster becomes the plain mean of its rows, and later attention weighs it like any other row.
    """

    place = Place.BEFORE_BLOCK
    reads = ("x",)

    def check_step(self, block: int, patches: int, keep: int) -> None:
        """Refuses too many patches."""
        if patches > MOST_PATCHES:
            raise BadSetting(
                f"dpcknn compares all patches with all, and is not meant for more than "
                f"{MOST_PATCHES}; there are {patches}. Use similarity or tome."
            )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Keeps the `keep` highest peaks; each other patch joins the nearest of them."""
        distance = clustering.feature_distances(tokens.x[:, tokens.prefix :])
        peaks = clustering.density(distance, itself=True)
        kept, gone, into = clustering.join_nearest(peaks, distance, keep)
        return Merge(kept, gone, into, weight=torch.ones_like(tokens.sizes()))

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Counts a share of all patches, `rate` to the power of the stage, rounded down."""
        return share_of_all(rate, stage, patches, rows)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the distances between all patches."""
        return (rows - prefix) ** 2 * block.width
