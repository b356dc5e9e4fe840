"""`Method`: a method. It looks at `Tokens` and `Signals` and decides; it moves nothing itself.

A method is one file in `patchslim/methods`, whose name is the method's name; finding it imports
it. A third party subclasses `Method` in code of its own and passes an instance.
"""

from __future__ import annotations

import enum
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.errors import BadSchedule, BadSetting, NeedsClassToken
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.tokens import ContentKind, Tokens

if TYPE_CHECKING:
    from patchslim.tokens.shapes import BlockShape


Setting = bool | int | float | str


class Place(enum.Enum):
    """Where in a block the decision falls, and so which part of the block is already smaller."""

    BEFORE_BLOCK = "P0"  # the whole block sees fewer rows
    BEFORE_FEED = "P1"  # attention on the old rows, feed-forward on the new
    ON_QUERIES = "P2"  # only surviving rows ask; all rows that entered are keys and values
    ON_MAP = "P3"  # the query-key map on the old rows, values and all that follows on the new


class Placement(enum.Enum):
    """Where a method removes tokens unless told otherwise."""

    EVERY_BLOCK = "a constant number in every block"
    STAGES = "a constant rate at a quarter, a half and three quarters of the depth"
    FIRST = "one cut before the first block"
    LATER = "a constant rate in every block from a quarter of the depth, or earlier for deep cuts"
    UNITS = "a rate of all patches at the first block of each stage: a third and two thirds"


@dataclass(frozen=True)
class Signals:
    """What a block has computed when a decision falls, read-only, for the method to look at.

    Attributes:
        prefix: how many leading rows are not patches.
        scale: the factor on the query-key product.
        q, k, v: queries, keys, values (B, H, N, d), or None where the place comes before them.
            On queries (P2), `q` has the prefix rows only.
        bias: what attention adds to its logits, or None.
        readout: attention of a pooling head's query over the patches (B, n), where the host has
            such a head instead of a class token.
        block: the number of the block, from 0.
        stride: of a block after which only every second row and column is left: 2.
    """

    prefix: int
    scale: float = 1.0
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    bias: Tensor | None = None
    readout: Callable[[], Tensor] | None = None
    block: int = 0
    stride: int = 1

    def keys(self) -> Tensor:
        """The keys of the patches, averaged over the heads (B, n, d)."""
        if self.k is None:
            raise BadSchedule("Keys exist only inside a block; this method decides before it (P0).")
        return self.k[:, :, self.prefix :].mean(dim=1)

    def class_attention(self) -> Tensor:
        """How much the class token attends to each patch, averaged over the heads (B, n).

        The softmax runs over all rows, so the patches' shares add up to less than one. Hosts
        whose head pools by a query of its own lend that query instead.
        """
        if self.readout is not None:
            return self.readout()
        if not self.prefix or self.q is None or self.k is None:
            raise NeedsClassToken("There is no class token in this sequence to score patches by.")
        # A product and a sum: a matrix product would first copy the keys into rows of their own.
        logits = (self.q[:, :, :1] * self.scale * self.k).sum(dim=-1)
        if self.bias is not None:
            logits = logits + self.bias[:, :, 0]
        return logits.softmax(dim=-1)[:, :, self.prefix :].mean(dim=1)

    def attention_received(self, alive: Tensor | None) -> Tensor:
        """How much all rows attend to each patch, averaged over rows and heads (B, n)."""
        if self.q is None or self.k is None:
            raise BadSchedule("Attention exists only inside a block; this method decides before.")
        logits = (self.q * self.scale) @ self.k.transpose(-2, -1)
        if self.bias is not None:
            logits = logits + self.bias
        weights = logits.softmax(dim=-1)[..., self.prefix :].mean(dim=1)
        if alive is None:
            return weights.mean(dim=1)
        asking = F.pad(alive.to(weights.dtype), (self.prefix, 0), value=1.0)
        return (weights * asking.unsqueeze(2)).sum(dim=1) / asking.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Decision:
    """What a method decided in one block: the tokens it left, and the share it was to leave.

    Attributes:
        block: the number of the block.
        share: patch rows scheduled to be left, as a share of those that entered the first block.
        alive: how much of each row is still there (B, n), for a method that masks in training.
    """

    block: int
    share: float
    alive: Tensor | None


@dataclass(frozen=True)
class Threshold:
    """The setting by which an adaptive method keeps more or fewer patches of each image.

    It is turned by a tolerance above zero: how unlike patches may be that join. The larger it is,
    the fewer stay.

    Attributes:
        setting: the name of the setting.
        first: a usual tolerance, the first to be tried.
        cosine: whether the setting is a cosine similarity: one less the tolerance.
        top: the largest tolerance.
    """

    setting: str
    first: float
    cosine: bool = False
    top: float = math.inf

    def setting_at(self, tolerance: float) -> float:
        """The setting at a tolerance."""
        return 1 - tolerance if self.cosine else tolerance


class Method(nn.Module, ABC):
    """A method of choosing which patch rows stay. Its arguments are its settings, kept by name.

    Class attributes:
        place: where in the block it decides.
        spread: where it removes tokens unless told otherwise.
        needs_class_token: whether it scores by class attention.
        proportional: whether later attention weighs each token by the patches it stands for.
        adds: rows it creates beyond the ones it keeps (EViT's fused token).
        shows: what `tokens.content` is to hold until the first decision: "pixels" of each patch, or
            its "embedding" without the position.
        looks: which of x, q, k and v it looks at, where they take work to lay out: of images of
            different numbers of patches; the prefix of q comes in any case. Others are not there.
        adaptive: whether images may keep different numbers of patches; the schedule is then the
            most that is kept.
        parks: whether rows only wait, and all are there again at the next decision; rates are then
            of all patches, and a block decides anew where the schedule leaves the count as it is.
        remembers: whether it takes note of each patch row in the blocks before a decision; it
            cannot decide in the first block then. Where it decides on queries or on the map, it
            takes no note.
        course: what its authors train otherwise than by default, in the words of `Course`.
    """

    place: Place = Place.BEFORE_FEED
    placement: ClassVar[Placement] = Placement.STAGES
    needs_class_token: bool = False
    course: ClassVar[Mapping[str, Any]] = {}
    proportional: bool = False
    extra_rows: int = 0
    content_kind: ContentKind | None = None
    reads: str = "xqkv"
    adaptive: bool = False
    defers: bool = False
    remembers: bool = False

    def __init__(self) -> None:
        super().__init__()  # nn.Module's own signature hides that there are no settings

    @abstractmethod
    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """The reduction that leaves `keep` patch rows (those it adds are counted among them).

        An adaptive method leaves each image at most so many, and pads: real rows first. What
        enters may be padded too (`tokens.alive`), and have fewer rows than `keep` asks for.
        """

    def remember(self, tokens: Tokens, signals: Signals) -> Tensor:
        """What to remember of each patch row (B, n), after attention in a block before a decision.

        What was remembered so far is `tokens.memory`: None in the first block.
        """
        raise BadSetting(f"{type(self).__name__} says remembers=True; give it remember() too.")

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes the parameters of a method that learns, where they are not there yet.

        Args:
            width: channels of the host's tokens.
            blocks: the numbers of the blocks in which it will decide.
        """

    @property
    def tuned_threshold(self) -> Threshold | None:
        """What `patchslim calibrate` turns until the mean cost of images meets a budget.

        An adaptive method without one is calibrated by its schedule.
        """
        return None

    @property
    def always_decides(self) -> bool:
        """Whether it decides in every block that the schedule names, whatever the counts."""
        return self.adaptive or self.defers

    @property
    def is_trainable(self) -> bool:
        """Whether it has parameters, which have to be trained."""
        return next(self.parameters(), None) is not None

    @property
    def missing(self) -> str | None:
        """What it needs before its choice means anything, as a sentence with the cure; or None."""
        return None

    def loss(self, decisions: Sequence[Decision]) -> Tensor | None:
        """What the method itself wants to be small in training, or None."""
        return None

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Patch rows after a stage that keeps the share `rate` of those that enter it, rounded up.

        Of a method whose rows wait it is the share of all.

        Args:
            rate: the share that each stage keeps.
            stage: how many stages there have been, this one included.
            patches: patch rows that entered the first block.
            rows: patch rows that enter this one.
        """
        among = patches if self.defers else rows
        return min(among, math.ceil(rate * among - 1e-9) + self.extra_rows)

    def fewest(self, patches: int) -> int:
        """The smallest number of rows that one decision can leave of `patches`."""
        return min(patches, 1 + self.extra_rows)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Multiply-adds of one decision among `rows` rows, prefix included."""
        return 0

    def settings(self) -> dict[str, bool | int | float | str]:
        """The arguments that make an equal method, for the recipe."""
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """The settings, as shown by print()."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class ModulePerBlock(nn.ModuleDict):
    """A small module for each block in which a method decides, made for one host."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.make = make
        self.width = 0

    def prepare(self, width: int, blocks: Sequence[int]) -> None:
        """Makes them, each the same in every run; those that there are must fit the host."""
        if len(self):
            self.check(width, blocks)
            return
        self.width = width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for block in blocks:
                self[str(block)] = self.make(width)

    def for_block(self, block: int, width: int) -> nn.Module:
        """The module of one block."""
        if str(block) not in self:
            self.check(width, [block])
        return self[str(block)]

    def check(self, width: int, blocks: Sequence[int]) -> None:
        """Refuses a host for which they were not made."""
        own = tuple(int(block) for block in self)
        if width != self.width or not set(own).issuperset(blocks):
            raise BadSetting(
                f"This method has a {self.make.__name__} for {self.width} channels in blocks "
                f"{own}, and here are {width} channels and decisions in blocks {tuple(blocks)}. "
                "Use the host and the schedule that it was made for, or make a new one."
            )
