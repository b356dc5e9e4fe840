"""`similarity`: patches that show the same are one. Clusters of similar patches, in one family.

The default joins, in each block, those patches whose joining loses least of what the class token
reads: a step of Ward's clustering in which a patch weighs what the class token attends to. The
others are the well-defined relatives of "Efficient Patch Pruning for Vision Transformers via Patch
Similarity" (2025, not peer reviewed), which says too little to be rebuilt: preset="paper" is what
it does say. With a threshold every image keeps a number of patches of its own.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchslim.errors import BadSetting, UnknownName
from patchslim.methods import Method, Place, Placement, Signals, Threshold
from patchslim.methods import _clustering as grouping
from patchslim.methods._clustering import Groups
from patchslim.methods._method import Read
from patchslim.methods._windows import Windows, best_in_squares
from patchslim.tokens.reduction import Keep, Merge, Reduction
from patchslim.tokens.rows import take
from patchslim.tokens.shapes import BlockShape
from patchslim.tokens.tokens import Tokens

MAX_PAIRWISE = (
    1024  # patches that are compared each with each; of more, those of a square of the grid
)
WINDOW_SIDE = 16  # of that square, in cells
MIN_WEIGHT = 1e-12  # what a patch weighs at least
DEDUP_STEPS = 4  # of iterative de-duplication

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
READ_FOR: dict[str, Read] = {
    "features": "x",
    "keys": "k",
    "values": "v",
    "embedding": "embedding",
}
READ_FOR_WEIGHT: dict[str, tuple[Read, ...]] = {"received": ("q", "k"), "class": ("k",), "size": ()}
AVERAGING = ("mean", "weighted")
DROPPING = ("iterative", "redundancy")  # nobody joins anybody
SMALL_ONLY = ("average", "medoids")  # whose rounds are too many for large images
NEEDS_COUNT = ("density", "medoids", "iterative")  # that have to know how many are wanted
NEEDS_THRESHOLD = ("leader", "components")  # that have to know how near is near


class Similarity(Method):
    """Joins similar patches; with a `threshold`, as many in each image as there are.

    A `preset` ("best", "paper") sets what is not set: how groups are found (`group`), what is
    compared (`on`, `measure`), what a patch weighs (`weight`), what a group leaves (`survivor`).
    The share `floor` of patches stays at least in each decision. With a `window`, patches join
    within runs of as many as a square of that side has cells, in the order of such squares; in
    each square of side `squares` one stays.
    """

    placement: ClassVar[Placement] = Placement.LATER
    needs_class_token = True

    def __init__(  # noqa: PLR0913 (a family: one word for each of its choices)
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
        self.threshold, self.floor = threshold, floor
        self.adaptive = threshold != 0
        self.window, self.squares = window, squares
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
        """Why these settings do not go together, or None."""
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
            "window and squares are sides in cells, or 0 for none.": (
                self.window < 0 or self.squares < 0
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _make_threshold(self) -> Threshold | None:
        """The threshold for calibration to adjust, if this way of grouping has one."""
        if self.group in NEEDS_COUNT:
            return None
        if self.measure == "cosine":
            return Threshold("threshold", first=0.1, cosine=True, top=1.99)
        return Threshold("threshold", first=5e-4 if self.group == "ward" else 0.1)

    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """The patches that stay, and which of them each other one joins."""
        keep = min(keep, tokens.patches)
        tiles = self._windows(tokens, keep)
        weight = self._weight(tokens, signals)
        # No gradient passes a choice, only what it moves.
        compared = tiles.of(self._compared_vectors(tokens, signals).detach())
        worth = tiles.of(weight.detach())
        if self.group in DROPPING:
            groups = self._rank_by_redundancy(compared, tiles.alive, keep)
            order, padding = self._sort_patches(tokens, tiles, groups, weight, keep)
            return Keep(order[:, :keep], padding)
        whole = tokens.alive is None and tiles.order is None
        cost = self._cost(compared, worth, None if whole else tiles.alive)
        groups = self._groups(cost, worth, keep, signals.prefix)
        order, padding = self._sort_patches(tokens, tiles, groups, weight, keep)
        kept, gone = order[:, :keep], order[:, keep:]
        if self.survivor == "alone":
            return Keep(kept, padding)
        stays = torch.zeros_like(order, dtype=torch.bool)
        there = torch.ones_like(kept, dtype=torch.bool) if padding is None else padding
        stays = stays.scatter(1, kept, there)
        mean = weight if self.survivor == "weighted" else None
        if padding is None and self.survivor in AVERAGING:
            into = _index_in_kept(kept, tiles.assign_rows(groups, cost, stays, gone))
            return Merge(kept, gone, into, weight=mean)
        if (
            self.survivor in AVERAGING
        ):  # in a graph all rows may be gone, for all that is known there
            least = 0 if torch.compiler.is_compiling() else int(there.sum(dim=1).min())
            gone = order[:, least:]
        else:
            gone = tokens.rows()
        joins = ~stays if tokens.alive is None else tokens.alive & ~stays
        joins = joins.gather(1, gone)
        head = torch.where(joins, tiles.assign_rows(groups, cost, stays, gone), gone)
        into = _index_in_kept(kept, head)
        if self.survivor in AVERAGING:
            return Merge(kept, gone, into, padding, joins, mean)
        speaker = grouping.elect_heaviest(head, self._speaker_score(tiles, cost, head, weight))
        spoken = speaker == gone
        real = stays | joins
        return Merge(
            speaker.gather(1, kept), gone, into, padding, real & ~spoken, spoken.to(weight.dtype)
        )

    def fewest(self, patches: int) -> int:
        """One of each square in which patches are compared; of a bipartite matching, half."""
        run = self._window_side(patches) ** 2 or patches
        if self.group in DROPPING:
            return 1
        if self.group != "bipartite":
            return max(1, -(-patches // run))
        whole, rest = divmod(patches, run)
        return whole * (run - run // 2) + rest - rest // 2

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """What is compared with what, and the attention by which patches are weighed."""
        count = rows - prefix
        width = block.key_width if self.on == "keys" else block.width
        weighing = {
            "class": block.attention_row_macs(rows),
            "received": rows * rows * block.query_width,
        }
        compared = 0  # where nobody joins anybody, sums of vectors do
        if self.group not in DROPPING:
            run = self._window_side(count) ** 2 or count
            compared = -(-count // run) * run * min(run, count) * width
        return compared + weighing.get(self.weight, 0)

    def _window_side(self, patches: int) -> int:
        """The side of the squares in which patches are compared; 0 where all are."""
        return self.window or (WINDOW_SIDE if patches > MAX_PAIRWISE else 0)

    def _windows(self, tokens: Tokens, keep: int) -> Windows:
        """How patches are dealt into squares; refused where more squares need one than may stay."""
        height, width = tokens.grid
        side = self.squares
        least = -(-height // side) * -(-width // side) if side else 0
        if least > keep:
            raise BadSetting(
                f"squares={side} leaves at least one patch in each of {least} squares of this "
                f"{height}x{width} grid, and the schedule asks for {keep}. Make them larger."
            )
        beyond = self.weight == "received" or (self.group in SMALL_ONLY and not self.window)
        if tokens.patches > MAX_PAIRWISE and beyond:
            raise BadSetting(
                f"group={self.group!r}, weight={self.weight!r}: attention received is not meant "
                f"for more than {MAX_PAIRWISE} patches, nor are average linkage and "
                "k-medoids without a "
                f"window, and there are {tokens.patches}. Use group='ward', weight='class'."
            )
        side = 0 if self.group in DROPPING else self._window_side(tokens.patches)
        return Windows.from_cells(tokens.cells(), tokens.grid, tokens.alive, side)

    def _weight(self, tokens: Tokens, signals: Signals) -> Tensor:
        """What each patch weighs (B, n), in float32 at least."""
        if self.weight == "size":
            return tokens.sizes()
        if self.weight == "class":
            weight = signals.class_attention()
        else:
            weight = signals.attention_received(tokens.alive)
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).clamp(min=MIN_WEIGHT)

    def _compared_vectors(self, tokens: Tokens, signals: Signals) -> Tensor:
        """The vector of each patch that is compared (B, n, d), in float32 at least."""
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
        if self.on == "features":  # as the next layer sees them, but for its learned scale
            x = F.layer_norm(x, x.shape[2:])
        scaled: Tensor = x * x.shape[2] ** -0.5
        return scaled

    def _cost(self, compared: Tensor, worth: Tensor, alive: Tensor | None) -> Tensor:
        """What it costs to join two patches (B, n, n); inf for padding. In place: it is large."""
        if self.measure == "cosine":
            cost = (compared @ compared.transpose(1, 2)).neg_().add_(1)
        else:
            square = compared.square().sum(dim=2)
            cost = square.unsqueeze(2) + square.unsqueeze(1)
            cost = torch.baddbmm(cost, compared, compared.transpose(1, 2), alpha=-2)
        if self.group == "ward":
            light = 1 / worth
            cost.div_(light.unsqueeze(2) + light.unsqueeze(1))
        if alive is None:
            return cost
        return cost.masked_fill_(~(alive.unsqueeze(1) & alive.unsqueeze(2)), torch.inf)

    def _groups(self, cost: Tensor, worth: Tensor, keep: int, prefix: int) -> Groups:
        """Groups of patches by what it costs to join them."""
        match self.group:
            case "bipartite":
                groups = grouping.bipartite(cost, first=prefix % 2)
            case "leader":
                groups = grouping.leaders(cost, worth, self.limit)
            case "components":
                groups = grouping.components(cost, worth, self.limit)
            case "average":
                groups = grouping.agglomerative(cost, worth)
            case "density":
                groups = grouping.density(cost)
            case "medoids":
                groups = grouping.medoids(cost, worth, min(keep, cost.shape[1]))
            case _:
                groups = grouping.nearest(cost, worth)
        return groups

    def _rank_by_redundancy(self, unit: Tensor, alive: Tensor, keep: int) -> Groups:
        """Patches by how little they are like all the others."""
        if self.group == "iterative":
            return grouping.iterative_redundancy(unit, alive, keep, DEDUP_STEPS)
        return grouping.redundancy(unit, alive)

    def _sort_patches(
        self, tokens: Tokens, tiles: Windows, groups: Groups, weight: Tensor, keep: int
    ) -> tuple[Tensor, Tensor | None]:
        """All patches, those that stay first, and which of the first `keep` really stay."""
        apart = tiles.to_rows(groups.apart)
        best = tiles.best_rows(tiles.of(weight))
        if best is not None:
            apart = torch.where(best, grouping.unjoinable_distance(apart), apart)
        if self.squares:
            squares = best_in_squares(tokens.cells(), tokens.grid, self.squares, weight)
            apart = torch.where(
                squares, 2 * grouping.unjoinable_distance(apart), apart
            )  # above all else
        if tokens.alive is not None:
            apart = apart.masked_fill(~tokens.alive, -torch.inf)
        order = apart.topk(tokens.patches, dim=1).indices
        if not self.adaptive:
            return order, None
        real = (apart > -torch.inf).sum(dim=1, keepdim=True)
        count = (apart > self.limit).sum(dim=1, keepdim=True)
        least = (real * self.floor).ceil().long().clamp(min=1)
        count = torch.maximum(count, least).clamp(max=keep)
        return order, torch.arange(keep, device=order.device) < torch.minimum(count, real)

    def _speaker_score(self, tiles: Windows, cost: Tensor, head: Tensor, weight: Tensor) -> Tensor:
        """How much each patch claims to speak for its group (B, n)."""
        if self.survivor == "heaviest":
            return weight
        if self.survivor == "first":
            return -torch.arange(head.shape[1], device=head.device, dtype=weight.dtype).expand_as(
                head
            )
        of = tiles.of(head)
        apart = (of.unsqueeze(2) != of.unsqueeze(1)) | cost.isinf()
        itself = torch.eye(of.shape[1], dtype=torch.bool, device=of.device)
        # Both ways, so that of a group of two the first speaks, and rounding has no say.
        both = cost + cost.transpose(1, 2)
        within = both.masked_fill(apart | itself, 0).sum(dim=2)
        return -tiles.to_rows(within)


def _index_in_kept(kept: Tensor, rows: Tensor) -> Tensor:
    """The place in `kept` (B, m) of each of `rows` (B, r), which are among them."""
    count = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return (
        kept.new_zeros(kept.shape[0], int(kept.shape[1] + rows.shape[1]))
        .scatter(1, kept, count)
        .gather(1, rows)
    )
