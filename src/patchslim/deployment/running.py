"""Images through a runtime: what goes in, what comes out, and one clear error in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchslim.deployment.target import Runner
from patchslim.errors import BadFile


def run_images(path: Path, run: Runner, images: Tensor, names: Sequence[str]) -> list[Tensor]:
    """The outputs of an artefact for images (B, C, H, W), one tensor for each of `names`.

    Runtimes differ in what they make of a batch of no images, so they are not asked.

    Raises:
        BadFile: the runtime cannot run it, or returns other tensors than its card says.
    """
    given = images.detach().to("cpu", torch.float32).contiguous()
    some = given if len(given) else torch.zeros(1, *given.shape[1:])
    try:
        values = [torch.from_numpy(each) for each in run(some.numpy())]
    except Exception as error:  # a runtime raises whatever it meets
        said = " ".join(str(error).split())[:300]
        raise BadFile(
            f"{path} cannot be run: {type(error).__name__}: {said}. Give fewer images at once if "
            "memory is short; if not, copy or export it again."
        ) from error
    shapes = [tuple(each.shape) for each in values]
    if len(values) != len(names) or any(shape[:1] != (len(some),) for shape in shapes):
        raise BadFile(
            f"{path} returns tensors of shape {shapes} for {len(some)} images, and its card says "
            f"that it returns {', '.join(names)}. Export it again."
        )
    return [each[: len(given)] for each in values]


def check_regular(path: Path, files: Sequence[str]) -> None:
    """Refuses a pipe or a device in the place of a file, which would be waited for.

    Args:
        path: a file, or a folder of files.
        files: the names in the folder; empty for a file.
    """
    for file in [path / name for name in files] or [path]:
        if file.exists() and not file.is_file():
            raise BadFile(f"{file} is not a file. Copy {path} again, or export it again.")
