"""The door for images: what a slimmed model takes, and one clear error for anything else.

Only shapes, types and devices are compared, since every forward pass comes here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.errors import PatchslimError, WrongInput
from patchslim.hosts._adapter import HostFacts
from patchslim.settings import Range, check_value, show_value

PIXELS = Range(1, 2**20)  # of a side of an image


def check_images(images: Any, facts: HostFacts) -> None:
    """Refuses what is no batch of float images of the host's channels (and frames)."""
    own = facts.image_shape
    made_for = f"this host takes float images of shape (batch, {', '.join(map(str, own))})"
    if not isinstance(images, Tensor):
        raise WrongInput(f"Got {type(images).__name__} instead of images: {made_for}.")
    if images.is_nested or images.layout is not torch.strided:
        raise WrongInput(f"{show_images(images)}: {made_for}, dense (images.to_dense()).")
    shape = images.shape
    fits = images.ndim == 1 + len(own) and shape[1:-2] == own[:-2]
    if not fits or not images.is_floating_point():
        raise WrongInput(f"{show_images(images)}: {made_for}.")
    if 0 in shape[1:]:
        raise WrongInput(f"{show_images(images)}, which has no pixels: {made_for}.")


def check_readable(images: Tensor, what: str) -> None:
    """Refuses a tensor whose numbers cannot be looked at one by one, such as a sparse one."""
    plain = not images.is_nested and images.layout is torch.strided and not images.is_quantized
    if not plain or images.device.type == "meta" or images.is_complex():
        raise WrongInput(
            f"{what}: {show_images(images)}, on {images.device}. Give an ordinary tensor of real "
            "numbers (images.to_dense(), images.dequantize())."
        )


def check_no_path(name: str, images: Any, error: type[PatchslimError] = WrongInput) -> None:
    """Refuses the path of images where images are wanted, and says how to open it."""
    if isinstance(images, str | Path):
        raise error(
            f"{name} is one {type(images).__name__}. Open it first: "
            f"patchslim.Images.for_host(model, {str(images)[:200]!r})."
        )


def explain_failure(images: Tensor, host: nn.Module) -> WrongInput | None:
    """The error for images that the host's first layer cannot take; None if that is not why.

    Asked after a failure: hosts of some libraries convert what they get, and are not to be stopped.
    """
    weights = {(weight.device, weight.dtype) for weight in host.parameters()}
    devices, types = {device for device, _ in weights}, {dtype for _, dtype in weights}
    if devices and images.device not in devices:
        where = " and ".join(sorted(map(str, devices)))
        return WrongInput(
            f"{show_images(images)}, on {images.device}: the model is on {where}. Move the images "
            "there."
        )
    if types and images.dtype not in types:
        of = " and ".join(sorted(map(str, types)))
        return WrongInput(
            f"{show_images(images)}: the weights of the model are {of}. Convert the images or the "
            "model, or run under torch.autocast."
        )
    return None


def show_images(images: Tensor) -> str:
    """The shape and the type of images, as errors begin."""
    if images.is_nested:
        return f"Got nested images of type {images.dtype}"
    if images.layout is not torch.strided:
        return f"Got images of layout {images.layout}"
    return f"Got images of shape {tuple(images.shape)} and type {images.dtype}"


def check_image_size(size: Any) -> tuple[int, int]:
    """The height and the width that somebody asks about, as plain numbers."""
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise WrongInput(
            f"image_size={show_value(size)}: give height and width in pixels, such as (224, 224)."
        )
    height, width = (check_value("image_size", side, int, PIXELS, WrongInput) for side in size)
    return height, width
