"""`Preprocessing`: how images are resized, cropped and normalised before a host sees them.

The host's library says it (`Library.read_preprocessing`). Files of images are read elsewhere, in
the room `data`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from patchslim.errors import BadFile
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._registry import find_host_library

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images are prepared for evaluation, in timm's words.

    Attributes:
        image_size: height and width that the host sees.
        mean, std: one number a channel, for pixels between 0 and 1.
        crop_pct: the share of the resized image that the crop keeps.
        interpolation: bicubic, bilinear, nearest or lanczos.
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

    @property
    def is_grey(self) -> bool:
        """Whether the host sees one channel."""
        return len(self.mean) == 1

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
        fields: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in data.items()
        }
        try:
            return cls(**fields)
        except TypeError as error:
            raise BadFile(f"This is not how images are prepared: {dict(data)}.") from error


def find_preprocessing(host: nn.Module, adapter: Adapter) -> Preprocessing:
    """Finds how images of `host` are prepared, if its library keeps that with the weights."""
    channels, height, width = adapter.describe(host).image_shape
    library = find_host_library(host)
    said = {} if library is None else library.read_preprocessing(host, (height, width))
    stated = bool(said)
    said |= {name: tuple(said[name]) for name in ("mean", "std") if name in said}
    if channels == 1:
        for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            values = said.get(name, usual)
            said[name] = (sum(values) / len(values),)
    return Preprocessing(image_size=(height, width), stated=stated, **said)
