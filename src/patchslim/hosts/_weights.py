"""Files of weights: safetensors, and files of torch, of which nothing but data is read.

What is read is plain tensors on the CPU. Whether they fit a model is checked before anything of the
model is changed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.errors import BadFile, UnsupportedModel
from patchslim.files import parse_json
from patchslim.hosts._library import first_line

# Weights of these types are rounded to the type of the model. No other type is converted: numbers
# of eight bits or whole ones mean nothing without a scale that is kept elsewhere.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WEIGHTS_FILE = "model.safetensors"  # in a folder, as Hugging Face and this package call it
CODE = "code in a file is never run. Save the model's state_dict() alone."


def read_weights(path: Path) -> dict[str, Tensor]:
    """Reads the tensors in a safetensors file, or in a file that torch.save wrote.

    Raises:
        BadFile: it is truncated, holds something else than tensors by name, or would run code.
    """
    if not path.is_file():
        raise BadFile(f"There is no file {path}. Give the weights as a .safetensors or .pth file.")
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise BadFile(f"{path} is not a state_dict: it does not map names to tensors.")
    for name, t in state.items():
        if not isinstance(name, str):
            raise BadFile(f"{path} is not a state_dict: {name!r:.100} is not a name.")
        if t.layout is not torch.strided or t.device.type != "cpu" or t.is_quantized:
            raise BadFile(
                f"{path}: {name} is no plain tensor ({t.layout}, {t.device}). Save the model's "
                "state_dict() of dense tensors."
            )
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file, no name of which may be there twice."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # What is wrong with the length, safetensors says below.
        header = file.read(length) if length < path.stat().st_size else b"{}"
    try:
        parse_json(header.rstrip(), f"The header of {path}")
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, BadFile, OSError, RuntimeError, ValueError, KeyError) as error:
        raise BadFile(
            f"{path} is truncated or not a safetensors file: {first_line(error)}."
        ) from error
    return tensors


def read_torch_file(path: Path) -> Any:
    """Reads what torch.save wrote, if it is tensors, numbers and text in plain containers."""
    try:
        check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise BadFile(f"{path} holds something else than plain weights, and {CODE}") from error
    except BadFile:
        raise
    except Exception as error:  # unpickling a foreign file can raise anything
        raise BadFile(
            f"{path} is truncated or not a file of weights: {first_line(error)}."
        ) from error


def check_fit(
    path: Path | None, own: Mapping[str, Tensor], state: Mapping[str, Tensor], model: str
) -> None:
    """Refuses weights that are not those of a model: other names, shapes, or kinds of numbers.

    Args:
        path: the file of the weights, for the message.
        own: the tensors of the model by name. Parameters have to be finite.
        state: the weights.
        model: what the model is called in the message.
    """
    for verb, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            raise BadFile(
                f"{path} does not fit {model}: it {verb} {_list_names(names)}. Is it of this very "
                "model?"
            )
    unlike = {name for name, t in own.items() if t.shape != state[name].shape}
    if unlike:
        name = min(unlike)
        raise BadFile(
            f"{path} does not fit {model}: other shapes for {_list_names(unlike)}; {name} has "
            f"shape {tuple(state[name].shape)} there and {tuple(own[name].shape)} in the model. Is "
            "it of this very model and image size?"
        )
    for name, t in own.items():
        given = state[name].dtype
        if given not in FLOATS if t.dtype in FLOATS else given != t.dtype:
            raise BadFile(
                f"{path} does not fit {model}: {name} is {_name(given)} there, and the model needs "
                f"{_name(t.dtype)}. Weights are converted between float64, float32, float16 and "
                "bfloat16 alone. Give the weights before they were quantised."
            )


def check_finite(
    path: Path | None, own: Mapping[str, Tensor], state: Mapping[str, Tensor], *, keep: bool
) -> None:
    """Refuses parameters that are not numbers.

    Args:
        path: the file of the weights, for the message.
        own: the tensors of the model by name, as parameters where they are.
        state: the weights.
        keep: whether they keep their type; if not, they are judged as rounded to the model's.
    """
    for name, t in own.items():
        values = state[name] if keep else state[name].to(t.dtype)
        if isinstance(t, nn.Parameter) and not bool(values.isfinite().all()):
            raise BadFile(
                f"{path}: {name} holds NaN or infinity{'' if keep else f' as {_name(t.dtype)}'}. "
                "The model could give no answer. Take weights from before that happened."
            )


def advise_on_bare_weights(folder: Path) -> str:
    """Says what to call if a folder holds the weights of a slimmed model and no recipe; else ""."""
    if not (folder / WEIGHTS_FILE).is_file():
        return ""
    return (
        f" {WEIGHTS_FILE} is weights alone, which is how transformers.Trainer saves a slimmed "
        "model. Call slimmed.save(path) after training, and give that folder."
    )


def check_plain(model: nn.Module, verb: str) -> None:
    """Refuses layers that hold quantised weights, which are more than tensors of numbers.

    PyTorch's own layers pack them; other libraries have tensors of their own classes.
    """
    for name, module in model.named_modules():
        kinds = [type(module), *map(type, module.parameters(recurse=False))]
        foreign = next((kind for kind in kinds if _is_quantised(kind)), None)
        if foreign is not None:
            raise UnsupportedModel(
                f"{name} is quantised ({foreign.__module__.partition('.')[0]} {foreign.__name__}), "
                f"and cannot be {verb}. Quantise the slimmed model as the last step, after it was "
                "trained and saved; or export it in int8: patchslim.export(slimmed, path, "
                "precision='int8', images=...)."
            )


def _is_quantised(kind: type) -> bool:
    """Tells whether this is a class of quantised layers, or of tensors by another library."""
    package, _, rest = kind.__module__.partition(".")
    if issubclass(kind, Tensor):
        return package != "torch"
    return package == "torch" and rest.startswith("ao.nn.") and "quantized" in rest


def check_not_compressed(path: Path) -> None:
    """Refuses an archive whose members take more memory than the file: torch writes none."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise BadFile(
            f"{path} is a compressed archive, which torch.save does not write. Unpack it, and save "
            "the model's state_dict()."
        )


def _list_names(names: set[str]) -> str:
    """The first names of a set, and how many more there are."""
    first = sorted(names)[:3]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix("host.")[:200] for name in first) + more


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
