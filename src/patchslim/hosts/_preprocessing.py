"""`Preprocessing`: how images are resized, cropped and normalised before a host sees them.

The host's library says it (`Library.read_preprocessing`). Files of images are read elsewhere, in
the room `data`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchslim.errors import BadFile
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._library import first_line
from patchslim.hosts._registry import find_host_library

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
MOST_SIDE = 8192  # pixels of a side, also before the crop
KEPT = "saved_preprocessing"  # the attribute of a host that was loaded
SMALLEST_STD, LARGEST_VALUE = 1e-6, 1e6  # of mean and std


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images are prepared for evaluation, in timm's words.

    Attributes:
        image_size: height and width that the host sees.
        mean, std: one number a channel, for pixels between 0 and 1.
        crop_pct: the share of the resized image that the crop keeps.
        interpolation: bicubic, bilinear, nearest, lanczos, box or hamming.
        crop_mode: "center" resizes the shorter side, "squash" both, "border" the longer one.
        stated: whether the host's library says this; if not, ImageNet's values are assumed.
    """

    image_size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    stated: bool = True

    def __post_init__(self) -> None:
        """Refuses settings by which no image can be prepared."""
        problem = self._find_nonsense()
        if problem is not None:
            raise BadFile(
                f"Images cannot be prepared with {problem}. Take the settings that the model was "
                "trained with."
            )

    def _find_nonsense(self) -> str | None:
        """The first setting that makes no sense and what is needed, or None."""
        size, share, mean, std = self.image_size, self.crop_pct, self.mean, self.std
        if not _are_whole(size, MOST_SIDE) or len(size) != 2:
            return f"image_size={size!r:.100}: height and width are from 1 to {MOST_SIDE} pixels"
        if not (_are_numbers(mean) and _are_numbers(std, SMALLEST_STD) and len(mean) == len(std)):
            return f"mean={mean!r:.100}, std={std!r:.100}: one for each channel, std above 0"
        if not _are_numbers((share,), max(size) / MOST_SIDE) or share > 1:
            return f"crop_pct={share!r:.100}: it is the share that the crop keeps, at most 1"
        choices = {
            "interpolation": INTERPOLATIONS,
            "crop_mode": CROP_MODES,
            "stated": (True, False),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                return f"{name}={getattr(self, name)!r:.100}: one of {', '.join(map(str, known))}"
        return None

    @property
    def is_grey(self) -> bool:
        """Whether the host sees one channel."""
        return len(self.mean) == 1

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """How wide and high `transform` makes an image of this size before it crops it."""
        high, wide = (math.floor(side / self.crop_pct) for side in self.image_size)
        if self.crop_mode == "squash":
            return wide, high
        across, down = width / wide, height / high
        ratio = max(across, down) if self.crop_mode == "border" else min(across, down)
        return round(width / ratio), round(height / ratio)

    def transform(self) -> Callable[[Any], Tensor]:
        """Builds a function from a decoded picture to the pixels (C, H, W) that the host sees."""
        from timm.data import create_transform

        made: Callable[[Any], Tensor] = create_transform(
            input_size=(len(self.mean), *self.image_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return made

    def to_json(self) -> dict[str, Any]:
        """Makes a plain dictionary from which `from_json` makes an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Reads what `to_json` wrote."""
        if not isinstance(data, Mapping):
            raise BadFile(f"This is not how images are prepared: {data!r:.100}.")
        fields: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in data.items()
        }
        try:
            return cls(**fields)
        except TypeError as error:
            raise BadFile(f"This is not how images are prepared: {dict(data)!r:.300}.") from error


def keep_preprocessing(host: nn.Module, prepared: Preprocessing, folder: Path) -> None:
    """Keeps with a host, loaded from a saved folder, how the recipe says to prepare its images.

    Its library may read that from a file beside the weights, which no checksum guards here.
    """
    setattr(host, KEPT, prepared)
    library = find_host_library(host)
    if library is not None:
        library.tell_origin(host, folder)


def find_preprocessing(host: nn.Module, adapter: Adapter) -> Preprocessing:
    """Finds how images of `host` are prepared, if its library keeps that with the weights."""
    facts = adapter.describe(host)
    height, width = facts.image_size
    channels = facts.image_shape[-3] if len(facts.image_shape) > 2 else 1
    library = find_host_library(host)
    kept: Preprocessing | None = getattr(host, KEPT, None)
    try:
        if kept is not None and kept.stated:
            said = kept.to_json()
            del said["image_size"], said["stated"]
        else:
            said = {} if library is None else library.read_preprocessing(host, (height, width))
        stated = bool(said)
        said |= {name: tuple(said[name]) for name in ("mean", "std") if name in said}
        if channels == 1:
            for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
                values = said.get(name, usual)
                said[name] = (sum(values) / len(values),)
        return Preprocessing(image_size=(height, width), stated=stated, **said)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise BadFile(
            f"How the images of this model are prepared makes no sense: {first_line(error)}. Mend "
            "what stands beside its weights (preprocessor_config.json, pretrained_cfg)."
        ) from error


def _are_whole(values: object, most: int) -> bool:
    """Whether these are whole numbers from 1 to `most`."""
    return isinstance(values, tuple) and all(
        isinstance(each, int) and not isinstance(each, bool) and 1 <= each <= most
        for each in values
    )


def _are_numbers(values: object, least: float = -LARGEST_VALUE) -> bool:
    """Whether these are one or more finite numbers of a usual size, from `least` on."""
    return (
        isinstance(values, tuple)
        and len(values) > 0
        and all(
            isinstance(each, int | float)
            and not isinstance(each, bool)
            and math.isfinite(each)
            and least <= each <= LARGEST_VALUE
            for each in values
        )
    )
