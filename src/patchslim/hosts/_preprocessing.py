"""`Preparation`: how images are resized, cropped and normalised before a host sees them.

It is read from what the host's library keeps beside the weights. It knows nothing of files of
images; `images.py` reads those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchslim.errors import BadFile
from patchslim.hosts._adapter import Adapter

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The evaluation recipe of a host, in timm's words.

    Attributes:
        image_size: height and width that the host sees.
        mean, std: one number a channel, for pixels between 0 and 1.
        crop_pct: the share of the resized image that the crop keeps.
        interpolation: bicubic, bilinear, nearest or lanczos.
        crop_mode: "center" resizes the shorter side, "squash" both, "border" the longer one.
        stated: whether the host's own files say all this; if not, ImageNet's values are assumed.
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
        """What turns a decoded picture into the pixels (C, H, W) that the host sees."""
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
        """A plain dictionary that `from_json` turns back into an equal preparation."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        """The preparation that `to_json` wrote."""
        fields: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in data.items()
        }
        try:
            return cls(**fields)
        except TypeError as error:
            raise BadFile(f"This is not how images are prepared: {dict(data)}.") from error


def find_preprocessing(host: nn.Module, adapter: Adapter) -> Preprocessing:
    """How the images of `host` are to be prepared, as far as its library's files say."""
    libraries = {cls.__module__.partition(".")[0] for cls in type(host).__mro__}
    channels, height, width = adapter.image_shape(host)
    if "timm" in libraries:
        said = _read_timm_config(host)
    elif "transformers" in libraries:
        said = _read_transformers_config(host, width)
    else:
        said = {}
    stated = bool(said)
    said |= {name: tuple(said[name]) for name in ("mean", "std") if name in said}
    if channels == 1:
        for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            values = said.get(name, usual)
            said[name] = (sum(values) / len(values),)
    return Preprocessing(image_size=(height, width), stated=stated, **said)


def _read_timm_config(host: Any) -> dict[str, Any]:
    """The values of the pretrained configuration, or nothing where it does not normalise."""
    from timm.data import resolve_model_data_config

    if not (getattr(host, "pretrained_cfg", None) or {}).get("mean"):
        return {}
    config = resolve_model_data_config(host)
    return {
        name: config[name] for name in ("mean", "std", "crop_pct", "interpolation", "crop_mode")
    }


def _read_transformers_config(host: Any, width: int) -> dict[str, Any]:
    """The values of the `preprocessor_config.json` beside the weights, where that is a folder."""
    file = Path(host.config.name_or_path or "") / "preprocessor_config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    size = config.get("size") or {}
    resized = _side_length(size)
    crops = config.get("do_center_crop", "crop_size" in config) and resized
    return {
        "mean": config.get("image_mean", IMAGENET_MEAN),
        "std": config.get("image_std", IMAGENET_STD),
        "crop_pct": _side_length(config.get("crop_size") or width) / resized if crops else 1.0,
        "interpolation": RESAMPLING.get(config.get("resample", 3), "bicubic"),
        "crop_mode": "squash" if isinstance(size, dict) and "height" in size else "center",
    }


def _side_length(size: Any) -> int:
    """The side of {"height": 224, "width": 224}, {"shortest_edge": 224} or 224; 0 where absent."""
    if isinstance(size, Mapping):
        return int(size.get("shortest_edge") or size.get("height") or 0)
    return int(size)
