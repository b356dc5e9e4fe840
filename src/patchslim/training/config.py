"""`Course`: how a slimmed model is to be trained. Plain values, checked where they are made.

It knows no models, no data and no devices. One field is one word: the keyword in Python, the option
on the command line, and the entry in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from patchslim.errors import BadSetting, UnknownName
from patchslim.settings import check_kind

Distil = Literal["soft", "hard", "token", "none"]
Precision = Literal["float32", "bfloat16", "float16"]


def _setting(default: Any, about: str) -> Any:
    """A field with its default and what it is about."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: length, optimiser, losses, augmentation, machine."""

    epochs: float = _setting(1.0, "passes over the images")
    steps: int = _setting(0, "steps of the optimiser, instead of epochs; 0 for epochs")
    batch: int = _setting(64, "images a step, over all processes")
    accumulate: int = _setting(
        1, "parts that a process cuts its share of a batch into, to save memory"
    )
    lr: float = _setting(5e-5, "peak learning rate")
    lr_end: float = _setting(0.01, "learning rate at the end, as a share of the peak")
    warmup: float = _setting(0.05, "share of the steps in which the learning rate rises")
    weight_decay: float = _setting(0.05, "AdamW's, on matrices only")
    layer_decay: float = _setting(
        1.0, "factor on the learning rate from each block to the one below"
    )
    host_lr: float = _setting(
        1.0, "factor on the learning rate of the host, beside a method's own parts"
    )
    freeze: float = _setting(0.0, "share of the steps in which only a method's own parts learn")
    clip: float = _setting(1.0, "largest norm of a gradient; 0 for any")
    ema: float = _setting(
        0.0, "decay of the moving average of the weights, such as 0.999; 0 for none"
    )
    wise: float = _setting(
        1.0, "share of the way that the host goes from its given weights to the learned ones"
    )
    labels: float = _setting(1.0, "weight of the task loss; 0 leaves labels unused")
    distil: Distil = _setting("soft", "what is learned of the teacher's answers")  # noqa: RUF009
    distil_weight: float = _setting(1.0, "weight of the teacher's answers")
    temperature: float = _setting(1.0, "of soft answers")
    tokens: float = _setting(
        0.0, "weight of the teacher's final tokens at the patches that are left"
    )
    smoothing: float = _setting(0.0, "label smoothing")
    mixup: float = _setting(0.0, "alpha of mixup; 0 for none")
    cutmix: float = _setting(0.0, "alpha of cutmix; 0 for none")
    crop: float = _setting(
        0.5, "smallest share of a picture that a random crop keeps; 1 for no crop"
    )
    flip: float = _setting(0.5, "probability of a mirrored picture")
    jitter: float = _setting(0.0, "strength of random changes of colour")
    randaugment: str = _setting("", "timm's policy, such as rand-m9-mstd0.5-inc1; empty for none")
    erasing: float = _setting(0.0, "probability of an erased rectangle")
    shrink: float = _setting(
        0.0, "share of the steps in which the kept share falls to the scheduled one"
    )
    layered: float = _setting(
        0.0,
        "share of the steps in which every block from the first of --at on selects anew, before "
        "--at holds",
    )
    auxiliary: float = _setting(
        0.0, "share in the losses of a second head, on the class token, which is not kept"
    )
    precision: Precision = _setting("float32", "of the arithmetic, not the weights")  # noqa: RUF009
    compile: bool = _setting(False, "whether torch.compile makes the step")
    recompute: bool = _setting(False, "whether activations are computed twice instead of kept")
    shard: bool = _setting(
        False, "whether several processes share weights' state (FSDP2), not copy it"
    )
    workers: int = _setting(2, "processes that read images, for each that trains; 0 for none")
    checkpoint: int = _setting(200, "steps between two checkpoints")
    validate: int = _setting(0, "steps between two validations; 0 for four in all")
    seed: int = _setting(0, "of everything that is drawn")

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for each in fields(self):
            check_kind(each.name, getattr(self, each.name), kinds[each.name])
        for names, low, high, what in LIMITS:
            for name in names.split():
                value = getattr(self, name)
                if not low <= value <= high:
                    raise BadSetting(f"{name}={value!r}: {name} is {what}.")
        if self.distil_weight == 0 and self.distil != "none":
            raise BadSetting("distil_weight=0: to learn nothing of the answers say distil='none'.")
        if self.freeze == 1:
            raise BadSetting("freeze=1: the host would never learn; use host_lr=0 if you mean it.")

    @classmethod
    def of(cls, usual: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
        """The course with a method's `usual` values, and before them the `given` ones."""
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownName.of("setting of training", name, known)
        return cls(**{**usual, **given})

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is needed."""
        return self.distil != "none" or self.tokens > 0

    def total_steps(self, images: int) -> int:
        """Steps of the whole course over this many images."""
        return self.steps or max(1, math.ceil(self.epochs * images / self.batch - 1e-9))

    def lr_factor(self, step: int, total: int) -> float:
        """The factor on the learning rate at a step: a linear rise, then half a cosine."""
        rising = math.ceil(self.warmup * total)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, total - rising)
        return self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * done)) / 2

    def removal_share(self, step: int, total: int) -> float:
        """The share of what the schedule removes that is removed at a step (EViT's shrinking)."""
        shrinking = self.shrink * total
        if step >= shrinking:
            return 1.0
        return (1 - math.cos(math.pi * step / shrinking)) / 2

    def is_layered(self, step: int, total: int) -> bool:
        """Whether every block selects anew at a step (Evo-ViT's layer-to-stage training)."""
        return step < self.layered * total

    def is_host_frozen(self, step: int, total: int) -> bool:
        """Whether the host rests at a step."""
        return step < self.freeze * total

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `Course(**it)` is an equal course."""
        return asdict(self)


# Names, the smallest and the largest value, and what to say.
LIMITS: tuple[tuple[str, float, float, str], ...] = (
    ("epochs", 1e-9, math.inf, "above 0"),
    ("batch accumulate checkpoint", 1, math.inf, "1 or more"),
    ("steps workers validate seed", 0, math.inf, "0 or more"),
    ("lr temperature", 1e-12, math.inf, "above 0"),
    ("weight_decay host_lr clip labels distil_weight tokens mixup cutmix jitter", 0, math.inf,
     "0 or more"),
    ("warmup freeze shrink layered flip erasing lr_end", 0, 1, "between 0 and 1"),
    ("ema smoothing auxiliary", 0, 1 - 1e-9, "from 0 to below 1"),
    ("layer_decay crop wise", 1e-9, 1, "above 0 and at most 1"),
)  # fmt: skip


_SCRATCH: dict[str, Any] = {
    "epochs": 300.0, "batch": 1024, "lr": 1e-3, "lr_end": 0.01, "warmup": 5 / 300, "clip": 0.0,
    "distil": "none", "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "crop": 0.08,
    "randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.25,
}  # fmt: skip

# What authors train from scratch with, by the name of the host they did it for.
RECIPES: dict[str, dict[str, Any]] = {
    "deit": {**_SCRATCH, "weight_decay": 0.05, "jitter": 0.3},
    "levit": {**_SCRATCH, "weight_decay": 0.025, "jitter": 0.4, "distil": "hard", "clip": 0.02},
}
