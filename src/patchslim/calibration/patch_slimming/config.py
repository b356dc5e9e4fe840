"""`PatchSlimmingConfig`: the settings of the search in Patch Slimming, checked when it is made.

This file imports no torch: `patchslim calibrate --help` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from patchslim.errors import BadSetting, UnknownName
from patchslim.settings import BATCH, SEED, Range, check_choice, check_settings, setting

Mode = Literal["paper", "fast", "free"]
Norm = Literal["relative", "absolute"]

DEFAULTS: dict[str, Any] = {"step": 1, "cover": 4.0, "error": "relative", "slack": 8.0, "epochs": 3}
MODE_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": DEFAULTS | {"step": 10, "cover": 0.0, "error": "absolute", "slack": 1.0},
    "fast": DEFAULTS,
    "free": DEFAULTS | {"epochs": 0},
}


def _by_mode(group: str, name: str, about: str, within: Range | None = None) -> Any:
    """Makes a setting whose default depends on the mode; the default of mode fast is listed."""
    return setting(group, None, about, within, usual=DEFAULTS[name])


@dataclass(frozen=True)
class PatchSlimmingConfig:
    """How to search for the patches that matter. What the paper leaves open is a setting here."""

    mode: Mode = setting("search", "fast", "tune blocks: paper at each step, fast once, free never")  # noqa: RUF009
    images: int = setting(
        "search",
        512,
        "images to choose positions on, evenly spread over those given",
        Range(1, 1e9),
    )
    probe: int = setting(
        "search", 64, "how many of them are used to find the tolerance for a budget", Range(1, 1e9)
    )
    cover: float = _by_mode(
        "search",
        "cover",
        "weight of even coverage, beside the log score; in mode paper 0",
        Range(0, 1e6),
    )
    step: int = _by_mode(
        "search", "step", "patches between two candidates; in mode paper 10", Range(1, 1e6)
    )
    error: Norm = _by_mode("search", "error", "relative to the features, or absolute (mode paper)")  # noqa: RUF009
    slack: float = _by_mode(
        "search",
        "slack",
        "factor on the tolerance at the last block's output; in mode paper 1",
        Range(0, 1e6, above=True),
    )
    epochs: int = _by_mode(
        "tuning",
        "epochs",
        "passes over the images to tune one block; in mode free 0",
        Range(0, 1e6),
    )
    lr: float = setting(
        "tuning",
        1e-5,
        "learning rate (AdamW without weight decay, gradients clipped at 1)",
        Range(0, 1e6, above=True),
    )
    batch: int = setting("tuning", 32, "images per batch, in the search too", BATCH)
    outputs: float = setting(
        "search",
        0.0,
        "share of patches kept for a head that reads all of them",
        Range(0, 1, below=True),
    )
    seed: int = setting("tuning", 0, "seed of the order of images", SEED)

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        for name, usual in MODE_DEFAULTS[self.mode].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)  # frozen, but still being made
        check_settings(self)
        if (self.mode == "free") != (self.epochs == 0):
            raise BadSetting(
                f"mode={self.mode!r} with epochs={self.epochs}: 'free' tunes nothing (epochs=0), "
                "and the others tune (epochs from 1)."
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PatchSlimmingConfig:
        """Makes the config with these settings; a name it does not know is an error."""
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownName.of("setting of the search", name, known)
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Returns all settings as a dictionary; `PatchSlimmingConfig(**it)` equals this one."""
        return asdict(self)
