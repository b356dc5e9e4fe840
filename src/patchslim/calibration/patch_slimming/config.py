"""What a search for patches is asked, and what it finds: plain values.

`walk.py` searches; `calibrate.py` has it done and writes it down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_type_hints

from patchslim.errors import BadSetting, UnknownName
from patchslim.settings import check_kind

Mode = Literal["paper", "fast", "free"]
Norm = Literal["relative", "absolute"]

DEFAULTS: dict[str, Any] = {"step": 1, "cover": 4.0, "error": "relative", "slack": 8.0, "epochs": 3}
MODE_DEFAULTS: dict[str, dict[str, Any]] = {
    "paper": DEFAULTS | {"step": 10, "cover": 0.0, "error": "absolute", "slack": 1.0},
    "fast": DEFAULTS,
    "free": DEFAULTS | {"epochs": 0},
}


def _setting(default: Any, text: str) -> Any:
    """A field with its default and what it is about."""
    return field(default=default, metadata={"about": text, "usual": default})


def _mode_setting(name: str, text: str) -> Any:
    """A field whose default is the mode's."""
    return field(default=None, metadata={"about": text, "usual": DEFAULTS[name]})


@dataclass(frozen=True)
class PatchSlimmingConfig:
    """How positions are searched. What the paper leaves open is a field here, and in the recipe."""

    mode: Mode = _setting("fast", "tune blocks: paper at each candidate, fast once, free never")  # noqa: RUF009
    images: int = _setting(512, "images to choose positions on, evenly spread over those given")
    probe: int = _setting(64, "of these, images on which the tolerance for a budget is searched")
    cover: float = _mode_setting(
        "cover", "weight of even coverage beside the log score; in paper 0"
    )
    step: int = _mode_setting("step", "patches between candidates; in mode paper 10")
    error: Norm = _mode_setting("error", "to the features' own mean square, or absolute (in paper)")  # noqa: RUF009
    slack: float = _mode_setting(
        "slack", "tolerances that the last block's output may be off by; in paper 1"
    )
    epochs: int = _mode_setting(
        "epochs", "passes over the images in tuning one block; in mode free 0"
    )
    lr: float = _setting(
        1e-5, "rate of tuning a block (AdamW without decay, gradients clipped at 1)"
    )
    batch: int = _setting(32, "images at a time")
    outputs: float = _setting(0.0, "share of patches left to a head that reads all of them")
    seed: int = _setting(0, "of the order of images in tuning")

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        check_kind("mode", self.mode, kinds["mode"])
        for name, usual in MODE_DEFAULTS[self.mode].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, usual)  # frozen, and this is where it is made
        for each in fields(self):
            check_kind(each.name, getattr(self, each.name), kinds[each.name])
        for name in ("images", "probe", "step", "batch"):
            if getattr(self, name) < 1:
                raise BadSetting(f"{name}={getattr(self, name)}: at least 1.")
        positive = min(self.lr, self.slack) > 0 and min(self.epochs, self.cover) >= 0
        if not positive or not 0 <= self.outputs < 1:
            raise BadSetting(
                f"epochs={self.epochs}, lr={self.lr}, slack={self.slack}, cover={self.cover}, "
                f"outputs={self.outputs}: epochs and cover from 0, rate and slack above 0, and a "
                "share of patches from 0 to below 1."
            )
        if (self.mode == "free") != (self.epochs == 0):
            raise BadSetting(
                f"mode={self.mode!r} with epochs={self.epochs}: 'free' tunes nothing (epochs=0), "
                "and the others tune (epochs from 1)."
            )

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PatchSlimmingConfig:
        """The search with these settings, by their names."""
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                raise UnknownName.of("setting of the search", name, known)
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)
