"""Small exported models to attack: made once, in a process of their own, and then copied.

Runtimes have threads, which no forked attack would have, so none is opened in this process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime  # noqa: F401 - once, and not in each attack
import openvino  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import torch.export  # noqa: F401

import patchslim
from attacks import _saved_models as models
from attacks.attack import SilentlyWrong
from patchslim.deployment.onnx_file import CARD_KEY, SEAL_KEY, seal_file
from patchslim.deployment.targets.openvino import DIGESTS_FILE, MODEL_FILE, WEIGHTS_FILE

NAMES = {"onnx": "model.onnx", "openvino": "openvino", "pt2": "model.pt2"}
BATCH = 2  # of the artefact that takes a fixed number of images
TOLERANCE = 1e-4


@functools.cache
def exported() -> Path:
    """A folder with an artefact of each target, and one for ONNX with a fixed batch."""
    folder = models.workshop() / "exported"
    folder.mkdir()
    model = models.SLIMMED["tome"]()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            warnings.simplefilter("ignore")
            for name in NAMES.values():
                target = "openvino" if name == "openvino" else None
                patchslim.export(model, folder / name, target, labels=["a", "b", "c"])
            patchslim.export(model, folder / "batch.onnx", batch=BATCH)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the artefacts to attack could not be exported")
    return folder


@functools.cache
def pictures() -> torch.Tensor:
    return torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(3))


@functools.cache
def wanted() -> torch.Tensor:
    """What the slimmed model answers on the pictures."""
    with torch.no_grad():
        answer: torch.Tensor = models.SLIMMED["tome"]()(pictures())
    return answer


def require_right(path: Path, *, is_forged: bool = False) -> None:
    """What is loaded has to answer as the model that was exported.

    A card that somebody forged may lay the answer out otherwise.
    """
    artefact = patchslim.load(path)
    answer = artefact(pictures())
    if is_forged and not isinstance(answer, torch.Tensor):
        (answer,) = answer.values() if isinstance(answer, dict) else answer
    if answer.shape != wanted().shape or not torch.allclose(answer, wanted(), atol=TOLERANCE):
        raise SilentlyWrong("it is loaded, and the answers are others")
    repr(artefact)
    artefact.preprocessing.transform()


# --- ONNX files


@functools.cache
def onnx_bytes() -> bytes:
    return (exported() / NAMES["onnx"]).read_bytes()


def onnx_model() -> Any:
    """The file as a protocol buffer, without its seal."""
    model = onnx.ModelProto.FromString(onnx_bytes())
    kept = [each for each in model.metadata_props if each.key != SEAL_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    return model


def onnx_card() -> Any:
    (text,) = (each.value for each in onnx_model().metadata_props if each.key == CARD_KEY)
    return json.loads(text)


def write_onnx(folder: Path, change: Callable[[Any], object], *, seal: bool = True) -> Path:
    """A file that somebody changed on purpose, with a seal that fits."""
    model = onnx_model()
    change(model)
    path = folder / NAMES["onnx"]
    path.write_bytes(model.SerializeToString())
    if seal:
        seal_file(path)
    return path


def set_card(model: Any, text: str) -> None:
    for each in model.metadata_props:
        if each.key == CARD_KEY:
            each.value = text


# --- folders for OpenVINO


def copy_openvino(folder: Path) -> Path:
    return models.copied(exported() / NAMES["openvino"], folder)


def reseal_openvino(path: Path) -> None:
    """Writes digests that fit whatever is there."""
    digests = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in (MODEL_FILE, WEIGHTS_FILE)
    }
    (path / DIGESTS_FILE).write_text(json.dumps(digests))


@functools.cache
def openvino_xml() -> str:
    return (exported() / NAMES["openvino"] / MODEL_FILE).read_text()
