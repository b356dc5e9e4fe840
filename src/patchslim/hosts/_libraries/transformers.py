"""transformers: image classifiers in local folders of Hugging Face models."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from patchslim.errors import BadFile
from patchslim.files import read_json
from patchslim.hosts._building import LARGEST, limit_building
from patchslim.hosts._library import WHOM_TO_ASK, Library, crop_share, first_line

if TYPE_CHECKING:
    from torch import nn

CONFIG_FILE = "config.json"
PREPROCESSING_FILE = "preprocessor_config.json"
# A processor of images and text keeps that of the images in a file of its own, under this key.
PROCESSOR_FILE, IMAGES_KEY = "processor_config.json", "image_processor"
# Entries of a configuration by which transformers would fetch and run kernels, or read weights in
# a form that is not theirs.
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
PLAIN_KERNELS = (None, "eager", "sdpa")
NOT_SERVED = ("quantization_config", "use_kernels", "kernel_config", "device_map")
NOT_KEPT = ("auto_map", "_name_or_path", "name_or_path")  # of a processor, in a saved folder
SLACK = 1 << 24  # numbers that are not in a file: tables, and weights that are missing
# What the numbers of `resample` mean, which are Pillow's.
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# Why models of these modules are not slimmed, in the words that follow "SamModel is not slimmed:".
WINDOWS = (
    "its encoder attends in windows, each of which needs all of its cells. Take a model whose "
    "tokens attend to all of the image: a ViT, DINOv2, DINOv3, CLIP or SigLIP."
)
WINDOWS_AND_NECK = (
    "its encoder attends in windows, each of which needs all of its cells, and convolutions read "
    "what comes out of it. Take an encoder whose tokens attend to all of the image, such as "
    "DINOv2 or DINOv3; `slimmed.forward_intermediates` gives maps of its features."
)
POOLED_KEYS = (
    "its attention pools keys and values over the grid, which needs every cell. Take a model whose "
    "tokens attend to all others: a ViT or DINOv2."
)
NEIGHBOURS = (
    "between its attentions, convolutions read each token's neighbours, so that every cell has to "
    "be there. Take a model without them: a ViT or DINOv2."
)
DETECTORS = (
    "its tokens are the cells of a convolutional network's maps, and its decoder reads them by "
    "their places. Take YOLOS, which detects with a plain ViT."
)
WITH_TEXT = (
    "its sequence holds text beside patches, and a slimmed model takes images alone. Take a model "
    "with an image tower of its own, such as CLIP, BLIP or LLaVA."
)
IN_TIMM = (
    "of this architecture the model of timm is served and this one is not. Take timm's: "
    "`patchslim models` lists the names."
)
PACKED = (
    "its encoder takes the patches of images of several sizes in one row (grid_thw), and a slimmed "
    "model takes a batch of images of one size. Take a model whose encoder does: InternVL, LLaVA, "
    "SmolVLM, Gemma 3, or timm's qwen3_vit_*_enc."
)
NO_TOKENS = (
    "it has no attention over tokens, so there are none to remove. Take a vision transformer: a "
    "ViT, DINOv2, CLIP or SigLIP."
)
REASONS = {
    module: reason
    for reason, modules in {
        WINDOWS: "swin swinv2 donut swin2sr",
        WINDOWS_AND_NECK: "sam sam_hq sam2 sam2_video sam3 sam3_video got_ocr2",
        POOLED_KEYS: "pvt pvt_v2 segformer glpn",
        NEIGHBOURS: "cvt mobilevit mobilevitv2 swiftformer",
        DETECTORS: """conditional_detr d_fine dab_detr deformable_detr detr rt_detr rt_detr_v2
            table_transformer""",
        WITH_TEXT: "layoutlmv3 udop vilt",
        IN_TIMM: "hiera levit",
    }.items()
    for module in modules.split()
}


class Transformers(Library):
    """Hugging Face's transformers. A folder is opened; nothing is fetched, and no code is run."""

    name: ClassVar[str] = "transformers"
    distribution: ClassVar[str] = "transformers"
    oldest: ClassVar[tuple[int, ...]] = (5, 18)
    extra: ClassVar[str | None] = "hf"
    hint: ClassVar[str] = "the folder of a Hugging Face model"
    opens_folders: ClassVar[bool] = True
    folder_sign: ClassVar[str] = f"{CONFIG_FILE} (a Hugging Face model)"

    def refusal_reason(self, host: nn.Module) -> str | None:
        """Says what stands between the tokens of a host and a shorter sequence."""
        package, _, place = type(host).__module__.partition(".models.")
        if package != self.name:
            return None
        parts = {type(part) for part in host.modules()}
        if any("grid_thw" in inspect.signature(part.forward).parameters for part in parts):
            return PACKED
        attends = any("attention" in part.__name__.lower() for part in parts)
        return REASONS.get(place.partition(".")[0]) if attends else NO_TOKENS

    def is_folder(self, folder: Path) -> bool:
        """Tells whether the folder has a configuration."""
        return (folder / CONFIG_FILE).is_file()

    def open_folder(self, folder: Path, *, weights: bool = True) -> nn.Module:
        """Opens the image classifier in the folder; raises if any of its weights is missing."""
        self.check_version()
        from transformers import AutoConfig, AutoModelForImageClassification

        check_config(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
        # Loading registers a weight twice. A folder with less than its model needs is refused.
        most = 4 * _weight_bytes(folder) + SLACK if weights else sys.maxsize
        try:
            with _without_progress_bars(), limit_building(most):
                if not weights:
                    config = AutoConfig.from_pretrained(
                        folder, local_files_only=True, trust_remote_code=False
                    )
                    empty: nn.Module = AutoModelForImageClassification.from_config(
                        config, trust_remote_code=False
                    )
                    return empty
                host, loading = AutoModelForImageClassification.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, trust_remote_code=False
                )
        except BadFile:
            raise
        except Exception as error:  # a library may raise anything at a folder from somewhere
            raise BadFile(
                f"{folder} is not a whole image classifier: {first_line(error)}"
            ) from error
        missing = sorted(loading["missing_keys"])
        if missing:
            more = f" and {len(missing) - 1} more." if len(missing) > 1 else "."
            raise BadFile(
                f"{folder} is not an image classifier: it has no weights for {missing[0]}{more}"
            )
        loaded: nn.Module = host
        return loaded

    def read_preprocessing(self, host: Any, image_size: tuple[int, int]) -> dict[str, Any]:
        """Reads what the host's processor has where the host came from: a folder, or the cache."""
        config = _read_processor(host)
        if not config:
            return {}
        size = config.get("size") or {}
        resized = _side_length(size)
        crops = config.get("do_center_crop", "crop_size" in config) and resized
        crop = _side_length(config.get("crop_size") or image_size[1])
        settings = {
            "crop_pct": crop_share(crop, resized) if crops else 1.0,
            "interpolation": RESAMPLING.get(config.get("resample", 3), "bicubic"),
            "crop_mode": "squash" if isinstance(size, dict) and "height" in size else "center",
        }
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if config.get(theirs):
                settings[ours] = config[theirs]
        return settings

    def tell_origin(self, host: Any, folder: Path) -> None:
        """Says to the host's configuration where its processor is, as `from_pretrained` does."""
        host.config.name_or_path = str(folder)

    def describe_saved(
        self, host: nn.Module, images: Mapping[str, Any] | None
    ) -> dict[str, dict[str, Any]]:
        """Says whom to ask in place of a model type; gives a processor, the host's or CLIP's."""
        files: dict[str, dict[str, Any]] = {CONFIG_FILE: {"model_type": WHOM_TO_ASK}}
        own: dict[str, Any] = {}
        with contextlib.suppress(BadFile):  # a loaded host's recipe says the same
            own = _read_processor(host)
        processor = _without_code(own) if own else _make_processor(images)
        return {**files, PREPROCESSING_FILE: processor} if processor else files


def check_config(config: Any, source: str) -> None:
    """Refuses a configuration that needs code from elsewhere, or is out of all proportion.

    Args:
        config: what `config.json` or a recipe holds.
        source: where it stands, for the message.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not isinstance(config, dict):
        raise BadFile(f"{source} holds a {type(config).__name__}, not the settings of a model.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise BadFile(
            f"{source}: transformers has no model_type {str(kind)[:100]!r}. Python that a folder "
            "brings along (auto_map) is never run."
        )
    if any(config.get(name) not in PLAIN_KERNELS for name in KERNELS):
        raise BadFile(f"{source} asks for kernels that would be fetched and run. Remove the entry.")
    asked = [name for name in NOT_SERVED if config.get(name)]
    if asked:
        raise BadFile(
            f"{source} has {', '.join(asked)}: weights that are quantised, or for kernels of their "
            "own. Give the model in float32, float16 or bfloat16."
        )
    for name, value in config.items():
        if isinstance(value, int) and abs(value) > LARGEST:
            raise BadFile(f"{source}: {str(name)[:100]}={value:.3g} is out of all proportion.")


def _read_processor(host: Any) -> dict[str, Any]:
    """Reads the settings of the processor beside a host's weights; nothing if none is there."""
    origin = getattr(getattr(host, "config", None), "name_or_path", None)
    if not isinstance(origin, str) or not origin:
        return {}
    files = (_find_beside(host, origin, name) for name in (PREPROCESSING_FILE, PROCESSOR_FILE))
    file = next((each for each in files if each is not None), None)
    if file is None:
        return {}
    config = read_json(file)
    if file.name == PROCESSOR_FILE and isinstance(config, dict):
        config = config.get(IMAGES_KEY, {})
    if not isinstance(config, dict):
        raise BadFile(f"{file} holds a {type(config).__name__}, not settings of images.")
    return config


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what names code to fetch, and where the processor once came from."""
    return {name: value for name, value in config.items() if name not in NOT_KEPT}


def _make_processor(images: Mapping[str, Any] | None) -> dict[str, Any]:
    """Makes the settings of a processor that prepares images so; nothing where none of them does.

    It is that of CLIP, which resizes, crops and normalises by any numbers, and makes pictures RGB.
    """
    if images is None or len(images["mean"]) != 3:
        return {}
    height, width = images["image_size"]
    high, wide = (math.floor(side / images["crop_pct"]) for side in (height, width))
    if images["crop_mode"] == "squash":
        size = {"height": high, "width": wide}
    elif images["crop_mode"] == "center" and height == width:
        size = {"shortest_edge": high}
    else:
        return {}
    numbers = {name: number for number, name in RESAMPLING.items()}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": size,
        "crop_size": {"height": height, "width": width},
        "resample": numbers[images["interpolation"]],
        "image_mean": list(images["mean"]),
        "image_std": list(images["std"]),
    }


def _find_beside(host: Any, origin: str, name: str) -> Path | None:
    """Finds a file beside a host's weights: in its folder, or in the cache of the Hub's client.

    Nothing is fetched.
    """
    if (Path(origin) / name).is_file():
        return Path(origin) / name
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        commit = getattr(host.config, "_commit_hash", None)
        found = try_to_load_from_cache(origin, name, revision=commit)
    except HFValidationError:  # the path of a folder
        return None
    return Path(found) if isinstance(found, str) else None


def _weight_bytes(folder: Path) -> int:
    """The bytes of all files of weights in a folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return sum(file.stat().st_size for file in files if file.is_file())


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing a bar, and restores its setting."""
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def _side_length(size: Any) -> int:
    """Reads the side of {"height": 224, "width": 224}, {"shortest_edge": 224} or 224; else 0."""
    if isinstance(size, Mapping):
        return int(size.get("shortest_edge") or size.get("height") or 0)
    return int(size)
