"""`atc`: merges tokens by agglomerative clustering of their keys.

Haurum et al., "Agglomerative Token Clustering" (ECCV 2024).
"""

from __future__ import annotations

import torch.nn.functional as F

from patchslim.errors import BadSetting
from patchslim.methods import Method, Signals
from patchslim.methods import _clustering as clustering
from patchslim.methods._method import share_of_all
from patchslim.settings import check_choice
from patchslim.tokens.merging import Merge
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MOST_PATCHES = 1024  # with more, the rounds of clustering take longer than they save


class ATC(Method):
    """Merges patches bottom up, always the two nearest clusters, until as few are left as wanted.

    `linkage` says how far two clusters are apart: the "average", "complete" (greatest) or "single"
    (least) cosine distance between the keys of their patches.
    """

    proportional = True
    reads = ("k",)

    def __init__(self, *, linkage: str = "average") -> None:
        super().__init__()
        check_choice("linkage", linkage, tuple(clustering.LINKAGES))
        self.linkage = linkage

    def check_step(self, block: int, patches: int, keep: int) -> None:
        """Refuses too many patches."""
        if patches > MOST_PATCHES:
            raise BadSetting(
                f"atc compares clusters round after round, and is not meant for more than "
                f"{MOST_PATCHES} patches; there are {patches}. Use similarity or tome."
            )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Merge:
        """Builds the tree of clusters, and cuts it where `keep` of them are left."""
        keys = F.normalize(signals.keys(), dim=2).to(tokens.sizes().dtype)
        distance = 1 - keys @ keys.transpose(1, 2)
        tree = clustering.agglomerative(distance, tokens.sizes(), self.linkage)
        return Merge(*clustering.join_nearest(tree, distance, keep))

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Counts a share of all patches, `rate` to the power of the stage, rounded down."""
        return share_of_all(rate, stage, patches, rows)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the distances between all patches."""
        return (rows - prefix) ** 2 * block.key_width
