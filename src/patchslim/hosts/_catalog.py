"""Hosts by name: the embedded example, timm's registry, and local folders of Hugging Face models.

It fetches nothing unless told to. It knows no methods, and nothing of what `io.py` saves.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.errors import BadFile, PatchslimError, UnknownName
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._registry import adapter_names, load_adapter
from patchslim.versions import check_version

EXAMPLE = "digits"
MODEL_HINT = (
    f"A model is {EXAMPLE!r}, a name of timm's (`patchslim models` lists them), the folder of a "
    "Hugging Face model, or a folder saved by patchslim."
)


def find_host(
    name: str,
    *,
    pretrained: bool = False,
    weights: Path | None = None,
    image_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model called `name`, in evaluation mode.

    Args:
        name: `digits`, a name of timm's registry, or the folder of a Hugging Face model.
        pretrained: whether timm may fetch its pretrained weights.
        weights: a file of weights for a timm model.
        image_size: the side of the images, for a timm model.
        settings: what else `timm.create_model` is told, such as global_pool="avg".
    """
    told = dict(settings or {})
    if image_size is not None:
        told["img_size"] = image_size
    folder = Path(name).expanduser()
    named = name != EXAMPLE and not folder.is_dir()
    if not named and (pretrained or weights is not None or told):
        raise PatchslimError(
            f"{name} comes with its own weights and image size; --pretrained, --weights, "
            "--image-size and --model-kwargs are for names of timm's."
        )
    if name == EXAMPLE:
        from patchslim.example.digits import host as example

        trained: nn.Module = example()
        return trained
    if not named:
        return _load_transformers(folder)
    state = None if weights is None else read_weights(weights)
    host = _build_timm(name, pretrained=pretrained, told=told, state=state)
    if state is not None:
        load_weights(host, state, weights)
    return host.eval()


def has_random_weights(name: str, *, pretrained: bool, weights: Path | None) -> bool:
    """Whether `find_host` gives a model whose weights nobody trained."""
    is_local = name == EXAMPLE or Path(name).expanduser().is_dir()
    return not (is_local or pretrained or weights is not None)


def build_without_weights(name: str, image_size: int | None = None) -> nn.Module:
    """The model called `name` without any weights, for counting: even a giant takes no memory."""
    if name == EXAMPLE or Path(name).expanduser().is_dir():
        return find_host(name, image_size=image_size)
    with torch.device("meta"):
        told = {} if image_size is None else {"img_size": image_size}
        return _build_timm(name, pretrained=False, told=told, state=None)


def timm_names(family: str, containing: str = "") -> list[str]:
    """The names in timm's registry whose module works with a class that `family` serves."""
    timm = _import_timm()
    adapter = load_adapter(family)
    modules = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    served = {module for module in modules if _has_served_class(module, adapter)}
    return [
        name
        for name in timm.list_models()
        if containing in name and timm.model_entrypoint(name).__module__ in served
    ]


def family_labels() -> dict[str, str]:
    """The name of each family that ships with the package, and what it is called."""
    return {name: load_adapter(name).family for name in adapter_names()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, or in a torch file, of which nothing but data is read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise BadFile(f"There is no file {path}. Give the weights as a .safetensors or .pth file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise BadFile(
            f"{path} holds something else than plain weights, and code in a file is never run. "
            "Save the model's state_dict() alone."
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise BadFile(
            f"{path} is truncated or not a file of weights: {_first_line(error)}."
        ) from error
    for wrapper in ("model", "state_dict"):
        loaded = loaded.get(wrapper, loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise BadFile(f"{path} is not a state_dict: it does not map names to tensors.")
    return loaded


def _build_timm(
    name: str, *, pretrained: bool, told: Mapping[str, Any], state: Mapping[str, Tensor] | None
) -> nn.Module:
    """A model of timm's registry, with as many classes as the weights have."""
    check_version("timm")
    timm = _import_timm()
    if not timm.is_model(name):
        if any(mark in name for mark in "/\\"):
            raise BadFile(f"There is no folder {name}. {MODEL_HINT}")
        raise UnknownName.of("model", name, [EXAMPLE, *timm.list_models()], MODEL_HINT)
    settings: dict[str, Any] = {}
    for classifier in ("head.weight", "head.linear.weight"):
        if state is not None and classifier in state:
            settings["num_classes"] = len(state[classifier])
    settings |= told
    try:
        host: nn.Module = timm.create_model(name, pretrained=pretrained, **settings)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
        if "tag" in str(error):
            tags = timm.list_pretrained(f"{name.partition('.')[0]}*")
            raise UnknownName.of("pretrained tag", name, tags) from error
        cure = " Without a network, give --weights FILE." if pretrained else ""
        raise PatchslimError(f"timm could not make {name}: {_first_line(error)}.{cure}") from error
    return host


def _import_timm() -> Any:
    """timm, whose registry knows our own models too."""
    import timm

    import patchslim.architectures.evo_levit  # noqa: F401 (registers them)

    return timm


def _load_transformers(folder: Path) -> nn.Module:
    """The image classifier in a local folder of a Hugging Face model."""
    if not (folder / "config.json").is_file():
        raise BadFile(
            f"{folder} holds no model: neither recipe.json (saved by patchslim) nor config.json "
            f"(a Hugging Face model). {MODEL_HINT}"
        )
    check_version("transformers")
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        host, told = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadFile(f"{folder} is not a whole image classifier: {_first_line(error)}") from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    missing = sorted(told["missing_keys"])
    if missing:
        raise BadFile(
            f"{folder} is not an image classifier: it has no weights for {missing[0]}"
            + (f" and {len(missing) - 1} more." if len(missing) > 1 else ".")
        )
    found: nn.Module = host.eval()
    return found


def load_weights(host: nn.Module, state: Mapping[str, Tensor], path: Path | None) -> None:
    """Loads the weights that were in the file `path`, every one of them."""
    own = host.state_dict()
    for verb, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            first = min(names)
            raise BadFile(
                f"{path} does not fit {type(host).__name__}: it {verb} {first}"
                + (f" and {len(names) - 1} more." if len(names) > 1 else ".")
                + " Is it of this very model?"
            )
    unlike = sorted(name for name, t in own.items() if t.shape != state[name].shape)
    if unlike:
        name = unlike[0]
        raise BadFile(
            f"{path} does not fit: {name} has shape {tuple(state[name].shape)} there and "
            f"{tuple(own[name].shape)} in the model. Is it of this very model and image size?"
        )
    host.load_state_dict(state)


def _has_served_class(module: str, adapter: Adapter) -> bool:
    """Whether a module of timm's has a class that the adapter serves."""
    classes = [found for found in vars(sys.modules[module]).values() if isinstance(found, type)]
    models = [cls for cls in classes if issubclass(cls, nn.Module)]
    # An adapter tells its family by the class alone, so an object that was never built will do.
    return any(adapter.serves(nn.Module.__new__(cls)) for cls in models)


def _first_line(error: Exception) -> str:
    """The first line of a message."""
    return str(error).strip().partition("\n")[0].rstrip(".")
