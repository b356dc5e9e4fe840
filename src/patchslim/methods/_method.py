"""`Method`: the contract of everything in this folder.

A method chooses which patch rows stay. It reads `Tokens` and `Signals` and returns a `Reduction`;
it moves no rows itself, and knows neither hosts nor training loops. One file here is one method,
and the name of the file is the name of the method.
"""

from __future__ import annotations

import enum
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor, nn

from patchslim.errors import BadSetting, UnknownName
from patchslim.methods._signals import Signals
from patchslim.settings import check_setting, show_value
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.tokens import ContentKind, Tokens

if TYPE_CHECKING:
    from patchslim.tokens.shapes import BlockShape


Setting = bool | int | float | str
Read = Literal["x", "q", "k", "v", "pixels", "embedding", "entering"]
BY_POSITION = {
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
}


class Place(enum.Enum):
    """Where in a block a method chooses, and so which parts of the block get fewer rows."""

    BEFORE_BLOCK = "P0"  # the whole block gets the new rows
    BEFORE_FEED = "P1"  # attention gets the old rows, the feed-forward the new ones
    ON_QUERIES = "P2"  # only the rows that stay are queries; all old rows are keys and values
    ON_MAP = "P3"  # the attention map is that of the old rows; values and the rest are new


class Placement(enum.Enum):
    """In which blocks a method removes rows unless the caller names blocks."""

    EVERY_BLOCK = "a constant number in every block"
    STAGES = "a constant rate at a quarter, a half and three quarters of the depth"
    FIRST = "one cut before the first block"
    LATER = "a constant rate in every block from a quarter of the depth, or earlier for deep cuts"
    UNITS = "a rate of all patches at the first block of each stage: a third and two thirds"


@dataclass(frozen=True)
class Threshold:
    """A setting by which an adaptive method keeps more or fewer patches of each image.

    Calibration does not vary the setting itself but a tolerance above zero: how different patches
    may be and still join. The larger it is, the fewer patches stay.

    Attributes:
        setting: the name of the setting.
        first: the tolerance that calibration tries first.
        cosine: whether the setting is a cosine similarity, which is one minus the tolerance.
        top: the largest tolerance.
    """

    setting: str
    first: float
    cosine: bool = False
    top: float = math.inf

    def setting_at(self, tolerance: float) -> float:
        """Turns a tolerance into a value of the setting."""
        return 1 - tolerance if self.cosine else tolerance


class _ChecksSettings:
    """Checks settings before `__init__` gets them. A class of its own, as `Method` has `__init__`.

    (`inspect.signature` would read `__new__` where one class has both.)
    """

    def __new__(cls, *unnamed: Any, **settings: Any) -> Self:
        """Refuses settings without a name, of no such name, or of another type than the default."""
        parameters = inspect.signature(cls).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        if unnamed and not kinds & BY_POSITION:
            shown = ", ".join(map(show_value, unnamed))
            raise BadSetting(
                f"{cls.__name__}({shown}) does not say which settings these are. Give them by name"
                f"{': ' if parameters else '; it has none'}{', '.join(parameters)}."
            )
        for name, value in settings.items():
            if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
                unknown = UnknownName.of(f"setting of {cls.__name__}", name, parameters)
                raise BadSetting(str(unknown))
            default = parameters[name].default if name in parameters else None
            if isinstance(default, bool | int | float | str):
                check_setting(name, value, type(default))
        return super().__new__(cls)


class Method(_ChecksSettings, nn.Module, ABC):
    """A way of choosing which patch rows stay.

    Write `choose`. Everything else has a default that fits a method which drops rows at a few
    blocks, and `patchslim.testing.check_method` tells you if a default does not fit yours::

        class LongestKeys(Method):
            \"\"\"Keeps the patches with the longest keys.\"\"\"

            def __init__(self, *, power: float = 2.0) -> None:
                super().__init__()
                self.power = power

            def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Keep:
                length = signals.keys().norm(p=self.power, dim=-1)
                return Keep(length.topk(keep, dim=1).indices)

    Settings are keyword arguments with defaults, each kept in an attribute of the same name, so
    that a saved model can make the method again. For parameters to train or a calibration to
    wait for, subclass `LearnedMethod` instead. The guide is
    `patchslim/guides/adding-a-method.md`.

    Attributes:
        place: where in a block `choose` is called.
        placement: in which blocks, unless the caller names blocks.
        needs_class_token: set it if `choose` calls `signals.class_attention()`. Hosts with neither
            a class token nor a pooling query are then refused.
        proportional: whether attention afterwards weighs a token by the number of patches that it
            stands for (ToMe).
        extra_rows: rows that the method adds to those it keeps, such as EViT's fused token.
        adaptive: whether images may keep different numbers of patches. The schedule is then the
            most that an image keeps.
        tuned_threshold: the setting that `patchslim calibrate` adjusts until images meet a budget
            on average; without one it adjusts the schedule.
        reads: tensors that `choose` reads. In a packed batch only these are unpacked. "pixels",
            "embedding" (the patch embedding without its position) or "entering" (what enters the
            first block) makes `tokens.content` available.
        defers: whether rows that are not kept wait and come back (`Defer`) instead of being
            removed. A keep rate is then a share of all patches.
        own_counts: tokens left after each block, a class token included, if the settings name a
            published list of them. It is the schedule unless a budget is given.
        training_defaults: values of `TrainConfig` that the authors use, where they are not the
            usual ones.
    """

    place: Place = Place.BEFORE_FEED
    placement: ClassVar[Placement] = Placement.STAGES
    needs_class_token: bool = False
    proportional: bool = False
    extra_rows: int = 0
    adaptive: bool = False
    tuned_threshold: Threshold | None = None
    reads: tuple[Read, ...] = ("x", "q", "k", "v")
    defers: bool = False
    own_counts: tuple[int, ...] = ()
    training_defaults: ClassVar[Mapping[str, Any]] = {}
    _learns: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()  # `method_settings` reads this signature; nn.Module's has **kwargs

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuses members that only a `LearnedMethod` has: nothing would ever call them."""
        super().__init_subclass__(**options)
        unused = sorted({"loss", "missing", "prepare"} & set(vars(cls)))
        if unused and not cls._learns:
            raise TypeError(
                f"{cls.__name__} defines {', '.join(unused)}, which only a learned method has. "
                "Subclass LearnedMethod instead of Method, or besides a method that is none."
            )

    @abstractmethod
    def choose(self, tokens: Tokens, signals: Signals, keep: int) -> Reduction:
        """Returns the reduction that leaves `keep` patch rows, any `extra_rows` included.

        An adaptive method leaves at most `keep` rows of each image and pads, real rows first. Its
        tokens may be padded on entry too (`tokens.alive`), and have fewer rows than `keep`.
        """

    def check_step(self, block: int, patches: int, keep: int) -> None:
        """Refuses a choice that it cannot make, by its numbers alone.

        `slim` asks for each choice of a schedule; a call asks again, since images may be larger.

        Args:
            block: the number of the block.
            patches: patch rows that enter it.
            keep: how many are to be left.
        """

    def remember(self, tokens: Tokens, signals: Signals) -> Tensor:
        """Returns a number for each patch row (B, n), to be read as `tokens.memory` later.

        A method that overrides this is asked after attention in every block before its last
        choice, and cannot choose in block 0. `tokens.memory` is what it returned before, or None.
        """
        raise NotImplementedError(f"{type(self).__name__} remembers nothing.")

    def rows_left(self, rate: float, stage: int, patches: int, rows: int) -> int:
        """Counts the patch rows that a keep rate means: the share of `rows`, rounded up.

        A method that defers keeps a share of all `patches`.

        Args:
            rate: the share to keep, as in `keep_rate=0.7`.
            stage: which choice this is, from 1.
            patches: patch rows that entered the first block.
            rows: patch rows that enter this block.
        """
        among = patches if self.defers else rows
        return min(among, math.ceil(rate * among - 1e-9) + self.extra_rows)

    def fewest(self, patches: int) -> int:
        """Returns the smallest number of rows that one choice can leave of `patches`."""
        return min(patches, 1 + self.extra_rows)

    def macs(self, rows: int, prefix: int, block: BlockShape) -> int:
        """Counts the multiply-adds of one choice among `rows` rows, `prefix` rows included."""
        return 0

    def __repr__(self) -> str:
        """Writes the call that makes an equal method."""
        settings = ", ".join(f"{name}={value!r}" for name, value in method_settings(self).items())
        return f"{type(self).__name__}({settings})"


def method_settings(method: Method) -> dict[str, Setting]:
    """Reads the arguments that make an equal method, as a recipe saves them."""
    names = inspect.signature(type(method)).parameters
    return {name: getattr(method, name) for name in names}


def remembers(method: Method) -> bool:
    """Tells whether the method overrides `remember`, so it is called before it chooses."""
    return type(method).remember is not Method.remember


def share_of_all(rate: float, stage: int, patches: int, rows: int) -> int:
    """Counts a share of all patches, `rate` to the power of the stage, rounded down.

    Many published methods count like this, where `Method.rows_left` takes a share of what is left.
    """
    return min(rows, max(1, int(patches * rate**stage + 1e-9)))


def needs_no_budget(method: Method | type[Method]) -> bool:
    """Tells whether a method removes what it finds in an image, whatever the budget."""
    return method.adaptive and method.placement is Placement.FIRST


def always_decides(method: Method) -> bool:
    """Tells whether the method chooses in every block of the schedule, even if no row has to go."""
    return method.adaptive or method.defers


def content_kind(method: Method) -> ContentKind | None:
    """Returns what `tokens.content` has to give this method; None if it reads no content."""
    # Written out, since it is asked in every forward pass and torch 2.6 cannot trace `next`.
    if "pixels" in method.reads:
        return "pixels"
    if "entering" in method.reads:
        return "entering"
    return "embedding" if "embedding" in method.reads else None
