"""`kmedoids`: clusters tokens by k-medoids, and keeps the medoids.

Marin et al., "Token Pooling in Vision Transformers for Image Classification" (WACV 2023), as
Haurum et al., "Which Tokens to Use?" (ICCV Workshops 2023) apply it.
"""

from __future__ import annotations

from torch import Tensor

from patchslim.errors import BadSchedule, BadSetting
from patchslim.methods import Method, Place, Signals
from patchslim.methods import _clustering as clustering
from patchslim.methods._method import share_of_all
from patchslim.tokens.reduction import Keep
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MOST_PATCHES = 1024  # with more, the rounds of clustering take longer than they save
LEAST = 1e-12  # the smallest attention that a patch counts as getting


class KMedoids(Method):
    """Keeps the patches from which all others are least far, weighted by class attention.

    The class attention is that of the block before, and its best patches are the first medoids.
    """

    place = Place.BEFORE_BLOCK
    needs_class_token: bool = True
    reads = ("x", "k")

    def check_step(self, block: int, patches: int, keep: int) -> None:
        """Refuses too many patches."""
        if patches > MOST_PATCHES:
            raise BadSetting(
                f"kmedoids compares clusters round after round, and is not meant for more than "
                f"{MOST_PATCHES} patches; there are {patches}. Use similarity or tome."
            )

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep:
        """Lets patches and medoids choose each other for a few rounds."""
        if tokens.memory is None:
            raise BadSchedule("kmedoids chooses by class attention, and these tokens lack that.")
        distance = clustering.feature_distances(tokens.x[:, tokens.prefix :])
        worth = tokens.memory.to(distance.dtype).clamp(min=LEAST)
        medoids = clustering.medoids(distance, worth, keep, weighted=True)
        return Keep(medoids.apart.topk(keep, dim=1).indices)

    def remember(self, tokens: Tokens, signals: Signals) -> Tensor:
        """Notes how much the class token attends to each patch in this block."""
        return signals.class_attention()

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Counts a share of all patches, `rate` to the power of the stage, rounded down."""
        return share_of_all(rate, stage, patches, rows)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the distances between all patches."""
        return (rows - prefix) ** 2 * block.width
