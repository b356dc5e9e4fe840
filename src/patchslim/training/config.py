"""`TrainConfig`: how to train a slimmed model. Plain values, checked when the config is made.

This file knows no models, no data and no devices, and imports no torch: `patchslim train --help`
reads it. A field has one name everywhere: the keyword in Python, the option on the command line,
and the key in a saved run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from patchslim.errors import BadSetting, UnknownName
from patchslim.settings import SEED, Range, check_settings, setting

Distil = Literal["soft", "hard", "token", "none"]
Precision = Literal["float32", "bfloat16", "float16"]

SHARE = Range(0, 1)
PART = Range(0, 1, above=True)  # a share that is not nothing
NOT_ALL = Range(0, 1, below=True)
WEIGHT = Range(0, 1e6)
COUNT = Range(0, 1e9)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: length, optimiser, removal, loss, augmentation, evaluation, machine."""

    epochs: float = setting("optimiser", 1.0, "passes over the images", Range(0, 1e6, above=True))
    steps: int = setting(
        "optimiser", 0, "optimiser steps, instead of epochs; 0 to count in epochs", COUNT
    )
    batch: int = setting("optimiser", 64, "images per step, over all processes", Range(1, 2**24))
    lr: float = setting("optimiser", 5e-5, "peak learning rate", Range(0, 1e6, above=True))
    lr_end: float = setting(
        "optimiser", 0.01, "learning rate at the end, as a share of the peak", SHARE
    )
    warmup: float = setting(
        "optimiser", 0.05, "share of the steps during which the learning rate rises", SHARE
    )
    weight_decay: float = setting(
        "optimiser", 0.05, "AdamW's weight decay, on matrices only", Range(0, 100)
    )
    layer_decay: float = setting(
        "optimiser", 1.0, "factor on the learning rate from each block to the one below it", PART
    )
    host_lr: float = setting(
        "optimiser",
        1.0,
        "factor on the learning rate of the host, not of a method's own layers",
        Range(0, 1e4),
    )
    freeze: float = setting(
        "optimiser", 0.0, "share of the steps in which only a method's own layers learn", SHARE
    )
    clip: float = setting("optimiser", 1.0, "largest gradient norm; 0 for no limit", Range(0, 1e9))
    ema: float = setting(
        "optimiser",
        0.0,
        "decay of the moving average of the weights, such as 0.999; 0 for none",
        NOT_ALL,
    )
    wise: float = setting(
        "optimiser",
        1.0,
        "how far the host goes from its old to its new weights (WiSE-FT); 1 is all the way",
        PART,
    )
    seed: int = setting("optimiser", 0, "seed of everything random", SEED)

    shrink: float = setting(
        "schedule of removal",
        0.0,
        "share of the steps in which the keep rate falls to the scheduled one (EViT)",
        SHARE,
    )
    layered: float = setting(
        "schedule of removal",
        0.0,
        "share of the steps in which every block from the first of --at selects again (Evo-ViT)",
        SHARE,
    )

    labels: float = setting("loss", 1.0, "weight of the task loss; 0 to ignore labels", WEIGHT)
    distil: Distil = setting("loss", "soft", "what to learn from the teacher's answers")  # noqa: RUF009
    distil_weight: float = setting("loss", 1.0, "weight of the teacher's answers", WEIGHT)
    temperature: float = setting(
        "loss", 1.0, "temperature of soft answers", Range(0, 1e4, above=True)
    )
    tokens: float = setting(
        "loss", 0.0, "weight of the teacher's final tokens, at the patches that are left", WEIGHT
    )
    smoothing: float = setting("loss", 0.0, "label smoothing", NOT_ALL)
    auxiliary: float = setting(
        "loss",
        0.0,
        "share of the loss that a second head on the class token gets (not saved)",
        NOT_ALL,
    )

    mixup: float = setting("augmentation", 0.0, "alpha of mixup; 0 for none", Range(0, 1e4))
    cutmix: float = setting("augmentation", 0.0, "alpha of cutmix; 0 for none", Range(0, 1e4))
    crop: float = setting(
        "augmentation",
        0.5,
        "smallest share of the image that a random crop keeps; 1 for no crop",
        PART,
    )
    flip: float = setting("augmentation", 0.5, "probability of a horizontal flip", SHARE)
    jitter: float = setting("augmentation", 0.0, "strength of random colour changes", Range(0, 10))
    randaugment: str = setting(
        "augmentation", "", "timm's policy, such as rand-m9-mstd0.5-inc1; empty for none"
    )
    erasing: float = setting(
        "augmentation", 0.0, "probability of erasing a random rectangle", SHARE
    )

    validate: int = setting(
        "evaluation and checkpoints", 0, "steps between validations; 0 for four in all", COUNT
    )
    checkpoint: int = setting(
        "evaluation and checkpoints", 200, "steps between checkpoints", Range(1, 1e9)
    )

    precision: Precision = setting("machine", "float32", "of the arithmetic, not of the weights")  # noqa: RUF009
    accumulate: int = setting(
        "machine",
        1,
        "parts that each process splits its batch into, to save memory",
        Range(1, 2**16),
    )
    recompute: bool = setting(
        "machine", False, "compute activations again in the backward pass, to save memory"
    )
    compile: bool = setting("machine", False, "compile the training step with torch.compile")
    shard: bool = setting(
        "machine", False, "shard the weights and the optimiser state over processes (FSDP2)"
    )
    workers: int = setting(
        "machine",
        2,
        "processes that read images, for each training process; 0 for none",
        Range(0, 1024),
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.distil_weight == 0 and self.distil != "none":
            raise BadSetting("distil_weight=0: to learn nothing of the answers say distil='none'.")
        if self.freeze == 1:
            raise BadSetting("freeze=1: the host would never learn; use host_lr=0 if you mean it.")

    @classmethod
    def of(cls, usual: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
        """Makes a config from a method's `usual` settings, overridden by the `given` ones."""
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownName.of("setting of training", name, known)
        return cls(**{**usual, **given})

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the loss compares with a teacher."""
        return self.distil != "none" or self.tokens > 0

    def total_steps(self, images: int) -> int:
        """Counts the optimiser steps that the training takes on this many images."""
        return self.steps or max(1, math.ceil(self.epochs * images / self.batch - 1e-9))

    def lr_factor(self, step: int, total: int) -> float:
        """Returns the factor on the learning rate at a step: linear warmup, then cosine decay."""
        rising = math.ceil(self.warmup * total)
        if step < rising:
            return (step + 1) / rising
        done = (step - rising) / max(1, total - rising)
        return self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * done)) / 2

    def removal_share(self, step: int, total: int) -> float:
        """Returns how much of the scheduled removal is done at a step, from 0 to 1 (EViT)."""
        shrinking = self.shrink * total
        if step >= shrinking:
            return 1.0
        return (1 - math.cos(math.pi * step / shrinking)) / 2

    def is_layered(self, step: int, total: int) -> bool:
        """Tells whether every block selects again at a step (Evo-ViT's layer-to-stage training)."""
        return step < self.layered * total

    def is_host_frozen(self, step: int, total: int) -> bool:
        """Tells whether the host's weights stay fixed at a step."""
        return step < self.freeze * total

    def to_json(self) -> dict[str, Any]:
        """Returns all settings as a dictionary; `TrainConfig(**it)` equals this one."""
        return asdict(self)


_SCRATCH: dict[str, Any] = {
    "epochs": 300.0, "batch": 1024, "lr": 1e-3, "lr_end": 0.01, "warmup": 5 / 300, "clip": 0.0,
    "distil": "none", "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "crop": 0.08,
    "randaugment": "rand-m9-mstd0.5-inc1", "erasing": 0.25,
}  # fmt: skip

# Settings that authors publish for training from scratch, by the host they trained.
RECIPES: dict[str, dict[str, Any]] = {
    "deit": {**_SCRATCH, "weight_decay": 0.05, "jitter": 0.3},
    "levit": {**_SCRATCH, "weight_decay": 0.025, "jitter": 0.4, "distil": "hard", "clip": 0.02},
}
