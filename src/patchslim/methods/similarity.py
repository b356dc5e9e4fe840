"""`similarity`: merges similar patches, by one of many ways to cluster them.

The default merges, in each block, the patches whose merging changes least of what the class token
reads: a step of Ward's clustering in which a patch weighs what the class token attends to it. The
others are well-defined relatives of "Efficient Patch Pruning for Vision Transformers via Patch
Similarity" (2025, not peer reviewed), which says too little to be rebuilt; preset="paper" is what
it does say. With a threshold, images keep different numbers of patches.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.errors import BadSetting, UnknownName
from patchslim.methods import Method, Place, Placement, Signals, Threshold
from patchslim.methods import _clustering as clustering
from patchslim.methods._clustering import Groups
from patchslim.methods._method import Read
from patchslim.methods._windows import Windows, best_in_squares
from patchslim.settings import Range, check_value
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import Keep
from patchslim.tokens.rows import mark_diagonal, take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MAX_PAIRWISE = 1024  # with more patches than this, only those of one window are compared
WINDOW_SIDE = 16  # side of that window, in grid cells
MIN_WEIGHT = 1e-12  # the smallest weight of a patch
SIDE = Range(0, 2**16)  # of a window or a square, in grid cells
DEDUP_STEPS = 4  # steps of iterative removal

PRESETS = {
    "best": ("ward", "l2", "features", "class", "weighted"),
    "paper": ("redundancy", "cosine", "embedding", "size", "alone"),
}
CHOICES = {
    "group": (
        "ward nearest bipartite leader components average density medoids iterative redundancy"
    ),
    "measure": "l2 cosine",
    "on": "features keys values embedding",
    "weight": "class received size",
    "survivor": "mean weighted medoid first heaviest alone",
}
READ_FOR: dict[str, Read] = {"features": "x", "keys": "k", "values": "v", "embedding": "embedding"}
READ_FOR_WEIGHT: dict[str, tuple[Read, ...]] = {"received": ("q", "k"), "class": ("k",), "size": ()}
AVERAGING = ("mean", "weighted")
DROPPING = ("iterative", "redundancy")  # patches are dropped, and none merge
SMALL_ONLY = ("average", "medoids")  # take too many rounds for large images
NEEDS_COUNT = ("density", "medoids", "iterative")  # have to know how many patches are to stay
NEEDS_THRESHOLD = ("leader", "components")  # have to know which patches count as near


class Similarity(Method):
    """Merges similar patches; with a `threshold`, as many in each image as are similar enough.

    A `preset` ("best", "paper") fills in settings that are not given: how groups are found
    (`group`), what is compared (`on`, `measure`), what a patch weighs (`weight`), and what a group
    leaves (`survivor`). At least the share `floor` of patches stays in each block. With a `window`,
    only patches of one window of that side merge; `squares` is the side of squares of the grid in
    each of which at least one patch stays.
    """

    placement: ClassVar[Placement] = Placement.LATER
    needs_class_token = True

    def __init__(  # noqa: PLR0913 (one setting for each choice that the family has)
        self,
        *,
        preset: str = "best",
        group: str = "",
        measure: str = "",
        on: str = "",
        weight: str = "",
        survivor: str = "",
        threshold: float = 0.0,
        floor: float = 0.7,
        window: int = 0,
        squares: int = 0,
    ) -> None:
        super().__init__()
        if preset not in PRESETS:
            raise UnknownName.of("preset of similarity", preset, PRESETS)
        natural = PRESETS[preset]
        self.preset = preset
        self.group = group or natural[0]
        usual = "l2" if self.group == "ward" else "cosine" if self.group in DROPPING else natural[1]
        self.measure = measure or usual
        self.on = on or natural[2]
        self.weight = weight or ("size" if self.on == "embedding" else natural[3])
        self.survivor = survivor or ("alone" if self.group in DROPPING else natural[4])
        self.threshold = check_value("threshold", threshold, float, Range(-1, 1e6))
        self.floor = floor
        self.adaptive = threshold != 0
        self.window = check_value("window", window, int, SIDE)
        self.squares = check_value("squares", squares, int, SIDE)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known.split():
                raise UnknownName.of(f"{name} of similarity", getattr(self, name), known.split())
        reason = self._conflict()
        if reason is not None:
            raise BadSetting(f"similarity: {reason}")
        self.place = Place.BEFORE_BLOCK if self.on == "embedding" else Place.BEFORE_FEED
        self.needs_class_token = self.weight == "class"
        self.reads = (*READ_FOR_WEIGHT[self.weight], READ_FOR[self.on])
        self.tuned_threshold = self._make_threshold()
        self.proportional = self.survivor != "alone"
        self.limit = 1 - threshold if self.measure == "cosine" else threshold

    def _conflict(self) -> str | None:
        """Says why these settings do not go together; None if they do."""
        group, threshold, cosine = self.group, self.threshold, self.measure == "cosine"
        reasons = {
            "group='ward' adds up squared differences: measure='l2'.": group == "ward" and cosine,
            f"group={group!r} is of mean cosine similarity: measure='cosine'.": (
                group in DROPPING and not cosine
            ),
            f"group={group!r} forms no groups; its survivors stay 'alone'.": (
                group in DROPPING and self.survivor != "alone"
            ),
            "there is no attention before the first block: weight='size' (on='embedding').": (
                self.on == "embedding" and self.weight != "size"
            ),
            f"group={group!r} is told how many stay; it takes no threshold.": (
                group in NEEDS_COUNT and threshold != 0
            ),
            f"group={group!r} needs a threshold, by which patches are near or not.": (
                group in NEEDS_THRESHOLD and threshold == 0
            ),
            f"threshold={threshold}: of squared differences, above 0 (0 is none).": (
                not 0 <= threshold < math.inf and not cosine
            ),
            f"threshold={threshold}: a cosine, between -1 and 1 (0 is none).": (
                not -1 < threshold < 1 and cosine
            ),
            f"floor={self.floor}: the share of patches that stay at least, from 0 to 1.": (
                not 0 <= self.floor <= 1
            ),
            "squares keep the heaviest of each; survivor is then mean, weighted or alone.": (
                self.squares > 0 and self.survivor in ("medoid", "first", "heaviest")
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _make_threshold(self) -> Threshold | None:
        """Makes the threshold for calibration to adjust, if this way of grouping has one."""
        if self.group in NEEDS_COUNT:
            return None
        if self.measure == "cosine":
            return Threshold("threshold", first=0.1, cosine=True, top=1.99)
        return Threshold("threshold", first=5e-4 if self.group == "ward" else 0.1)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep | Merge:
        """Chooses the patches that stay, and for each of the others the one that it joins."""
        keep = min(keep, tokens.patches)
        windows = self._windows(tokens, keep)
        weight = self._weight(tokens, signals)
        # Gradients pass through the rows that are moved, but not through the choice.
        compared = windows.of(self._compared_vectors(tokens, signals).detach())
        worth = windows.of(weight.detach())
        if self.group in DROPPING:
            groups = self._rank_by_redundancy(compared, windows.alive, keep)
            order, padding = self._sort_patches(tokens, windows, groups, weight, keep)
            return Keep(order[:, :keep], padding)
        whole = tokens.alive is None and windows.order is None
        cost = self._cost(compared, worth, None if whole else windows.alive)
        groups = self._groups(cost, worth, keep, signals.prefix)
        order, padding = self._sort_patches(tokens, windows, groups, weight, keep)
        kept, gone = order[:, :keep], order[:, keep:]
        if self.survivor == "alone":
            return Keep(kept, padding)
        stays = torch.zeros_like(order, dtype=torch.bool)
        is_real = torch.ones_like(kept, dtype=torch.bool) if padding is None else padding
        stays = stays.scatter(1, kept, is_real)
        mean = weight if self.survivor == "weighted" else None
        if padding is None and self.survivor in AVERAGING:
            into = _index_in_kept(kept, windows.assign_rows(groups, cost, stays, gone))
            return Merge(kept, gone, into, weight=mean)
        if self.survivor in AVERAGING:
            # A compiled graph cannot know how many rows stay, so it moves all of them.
            unknown = torch.compiler.is_compiling() or not len(order)
            least = 0 if unknown else int(is_real.sum(dim=1).min())
            gone = order[:, least:]
        else:
            gone = tokens.rows()
        joins = ~stays if tokens.alive is None else tokens.alive & ~stays
        joins = joins.gather(1, gone)
        head = torch.where(joins, windows.assign_rows(groups, cost, stays, gone), gone)
        into = _index_in_kept(kept, head)
        if self.survivor in AVERAGING:
            return Merge(kept, gone, into, padding, joins, mean)
        survivor = clustering.elect_heaviest(
            head, self._survivor_score(windows, cost, head, weight)
        )
        survives = survivor == gone
        real = stays | joins
        return Merge(
            survivor.gather(1, kept),
            gone,
            into,
            padding,
            real & ~survives,
            survives.to(weight.dtype),
        )

    def fewest(self, patches: int) -> int:
        """Counts one patch of each window that is compared; half of all with bipartite matching."""
        window = self._window_side(patches) ** 2 or patches
        if self.group in DROPPING:
            return 1
        if self.group != "bipartite":
            return max(1, -(-patches // window))
        whole, rest = divmod(patches, window)
        return whole * (window - window // 2) + rest - rest // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the comparisons of patches, and the attention by which they are weighed."""
        count = rows - prefix
        width = block.key_width if self.on == "keys" else block.width
        weighing = {
            "class": block.attention_row_macs(rows),
            "received": rows * rows * block.query_width,
        }
        compared = 0  # ways that only drop patches add vectors up and compare none
        if self.group not in DROPPING:
            window = self._window_side(count) ** 2 or count
            compared = -(-count // window) * window * min(window, count) * width
        return compared + weighing.get(self.weight, 0)

    def _window_side(self, patches: int) -> int:
        """Returns the side of the windows in which patches are compared; 0 if all are compared."""
        return self.window or (WINDOW_SIDE if patches > MAX_PAIRWISE else 0)

    def _windows(self, tokens: Tokens, keep: int) -> Windows:
        """Splits patches into windows; refuses more squares than patches that may stay."""
        height, width = tokens.grid
        side = self.squares
        least = -(-height // side) * -(-width // side) if side else 0
        if least > keep:
            raise BadSetting(
                f"squares={side} leaves at least one patch in each of {least} squares of this "
                f"{height}x{width} grid, and the schedule asks for {keep}. Make them larger."
            )
        small_only = self.weight == "received" or (self.group in SMALL_ONLY and not self.window)
        if tokens.patches > MAX_PAIRWISE and small_only:
            raise BadSetting(
                f"group={self.group!r}, weight={self.weight!r}: attention received is not meant "
                f"for more than {MAX_PAIRWISE} patches, nor are average linkage and "
                "k-medoids without a "
                f"window, and there are {tokens.patches}. Use group='ward', weight='class'."
            )
        side = 0 if self.group in DROPPING else self._window_side(tokens.patches)
        return Windows.from_cells(tokens.cells(), tokens.grid, tokens.alive, side)

    def _weight(self, tokens: Tokens, signals: Signals) -> Tensor:
        """Weighs each patch (B, n), in float32 or better."""
        if self.weight == "size":
            return tokens.sizes()
        if self.weight == "class":
            weight = signals.class_attention()
        else:
            weight = signals.attention_received(tokens.alive)
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).clamp(min=MIN_WEIGHT)

    def _compared_vectors(self, tokens: Tokens, signals: Signals) -> Tensor:
        """Makes the vectors of patches that are compared (B, n, d), in float32 or better."""
        x = tokens.x[:, tokens.prefix :]
        if self.on == "embedding":
            if tokens.content is None:
                raise BadSetting("on='embedding' compares embeddings; these tokens come without.")
            x = take(tokens.content(), tokens.cells())
        elif self.on == "keys":
            x = signals.keys()
        elif self.on == "values" and signals.v is not None:
            x = signals.v[:, :, tokens.prefix :].transpose(1, 2).flatten(2)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.measure == "cosine":
            return F.normalize(x, dim=2)
        if self.on == "features":
            return x  # `_cost` normalises them
        scaled: Tensor = x * x.shape[2] ** -0.5
        return scaled

    def _cost(self, compared: Tensor, worth: Tensor, alive: Tensor | None) -> Tensor:
        """Computes what it costs to merge two patches (B, n, n); infinite for padding."""
        # In place, since the matrix is large.
        if self.measure == "cosine":
            cost = (compared @ compared.transpose(1, 2)).neg_().add_(1)
        elif self.on == "features":
            cost = clustering.normalised_distances(compared)
        else:
            cost = clustering.squared_distances(compared)
        if self.group == "ward":
            inverse = 1 / worth
            cost.div_(inverse.unsqueeze(2) + inverse.unsqueeze(1))
        if alive is None:
            return cost
        return cost.masked_fill_(~(alive.unsqueeze(1) & alive.unsqueeze(2)), torch.inf)

    def _groups(self, cost: Tensor, worth: Tensor, keep: int, prefix: int) -> Groups:
        """Groups patches by what it costs to merge them."""
        match self.group:
            case "bipartite":
                groups = clustering.bipartite(cost, first=prefix % 2)
            case "leader":
                groups = clustering.leaders(cost, worth, self.limit)
            case "components":
                groups = clustering.components(cost, worth, self.limit)
            case "average":
                groups = clustering.agglomerative(cost, worth)
            case "density":
                groups = clustering.density(cost)
            case "medoids":
                groups = clustering.medoids(cost, worth, min(keep, cost.shape[1]))
            case _:
                groups = clustering.nearest(cost, worth)
        return groups

    def _rank_by_redundancy(self, unit: Tensor, alive: Tensor, keep: int) -> Groups:
        """Ranks patches by how little they resemble the others."""
        if self.group == "iterative":
            return clustering.iterative_redundancy(unit, alive, keep, DEDUP_STEPS)
        return clustering.redundancy(unit, alive)

    def _apart(self, tokens: Tokens, windows: Windows, groups: Groups, weight: Tensor) -> Tensor:
        """How far each patch is from joining another (B, n)."""
        apart = windows.to_rows(groups.apart)
        best = windows.best_rows(windows.of(weight))
        if best is not None:
            apart = torch.where(best, clustering.unjoinable_distance(apart), apart)
        if self.squares:
            squares = best_in_squares(tokens.cells(), tokens.grid, self.squares, weight)
            apart = torch.where(
                squares, 2 * clustering.unjoinable_distance(apart), apart
            )  # above all else
        if tokens.alive is not None:
            apart = apart.masked_fill(~tokens.alive, -torch.inf)
        return apart

    def _sort_patches(
        self, tokens: Tokens, windows: Windows, groups: Groups, weight: Tensor, keep: int
    ) -> tuple[Tensor, Tensor | None]:
        """Sorts patches, those that stay first; says which of the first `keep` really stay."""
        apart = self._apart(tokens, windows, groups, weight)
        order = apart.topk(tokens.patches, dim=1).indices
        if not self.adaptive:
            return order, None
        real = (apart > -torch.inf).sum(dim=1, keepdim=True)
        count = (apart > self.limit).sum(dim=1, keepdim=True)
        least = (real * self.floor).ceil().long().clamp(min=1)
        count = torch.maximum(count, least).clamp(max=keep)
        return order, torch.arange(keep, device=order.device) < torch.minimum(count, real)

    def _survivor_score(
        self, windows: Windows, cost: Tensor, head: Tensor, weight: Tensor
    ) -> Tensor:
        """Scores each patch (B, n); the highest of a group is the row that is left of it."""
        if self.survivor == "heaviest":
            return weight
        if self.survivor == "first":
            return -torch.arange(head.shape[1], device=head.device, dtype=weight.dtype).expand_as(
                head
            )
        of = windows.of(head)
        apart = (of.unsqueeze(2) != of.unsqueeze(1)) | cost.isinf()
        # Symmetric, so that in a group of two the first wins, whatever the rounding.
        both_ways = cost + cost.transpose(1, 2)
        within = both_ways.masked_fill(apart | mark_diagonal(apart), 0).sum(dim=2)
        return -windows.to_rows(within)


def _index_in_kept(kept: Tensor, rows: Tensor) -> Tensor:
    """Finds the index in `kept` (B, m) of each of `rows` (B, r), all of which are in it."""
    count = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return (
        kept.new_zeros(kept.shape[0], int(kept.shape[1] + rows.shape[1]))
        .scatter(1, kept, count)
        .gather(1, rows)
    )
