"""The model and the images of --shared that several benchmarks of exports use."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import timm
from torch import Tensor, nn

from patchslim.data.images import Images

DEIT_TINY = "deit_tiny_patch16_224"


def load_deit_tiny(shared: Path) -> nn.Module:
    """DeiT-Ti with its real weights; ends the script if they are not there."""
    weights = shared / "data" / f"{DEIT_TINY}.safetensors"
    if not weights.is_file():
        sys.exit(f"{weights} is not there: nothing to export. Give --shared FOLDER.")
    host: nn.Module = timm.create_model(DEIT_TINY).eval()
    timm.models.load_checkpoint(host, str(weights))
    return host


def read_images(host: nn.Module, shared: Path, limit: int) -> Tensor:
    """Real images as the host takes them, evenly spread over the sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = shared / "data" / "imagenet-sample-500.zip"
        return next(iter(Images.for_host(host, sample, limit=limit, batch=limit)))[0]
