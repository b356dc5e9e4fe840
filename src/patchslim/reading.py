"""What every source of images shares: what the host says of them, decoding, a limit, batches.

It does not know where the images lie.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.adapter import Adapter, find_adapter
from patchslim.errors import BadData
from patchslim.model import SlimModel
from patchslim.preparation import Preparation, find_preparation

# All that Pillow and the archive readers raise for a file that is not what it says.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile,
    tarfile.TarError, zlib.error, KeyError, IndexError)  # fmt: skip

Batches = Iterator[tuple[Tensor, Tensor | None]]


def preparation_of(host: nn.Module, prepared: Preparation | None = None) -> Preparation:
    """`prepared`, or how `host` is used to see images; a warning where that is only assumed."""
    adapter: Adapter
    if isinstance(host, SlimModel):
        adapter, host = host.adapter, host.host
    else:
        adapter = find_adapter(host)
    prepared = prepared or find_preparation(host, adapter)
    if not prepared.stated:
        warnings.warn(
            f"This {type(host).__name__} does not say how its images are prepared; ImageNet's "
            f"mean and std are assumed: {prepared}.",
            stacklevel=3,
        )
    return prepared


def class_count(host: nn.Module) -> int | None:
    """How many classes the host (or that of a SlimModel) tells apart, where it says so."""
    whole: Any = host.host if isinstance(host, SlimModel) else host
    found = getattr(whole, "num_classes", None)
    if found is None:
        found = getattr(getattr(whole, "config", None), "num_labels", None)
    return int(found) if found else None


def stacked(pairs: Iterable[tuple[Tensor, int | None]], batch: int) -> Batches:
    """Batches of `batch` images with their labels; the last one may be smaller."""
    left = iter(pairs)
    while taken := list(itertools.islice(left, batch)):
        labels = [label for _, label in taken if label is not None]
        yield torch.stack([image for image, _ in taken]), torch.tensor(labels) if labels else None


def spread(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` places, evenly spread, so that sorted classes stay balanced."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise BadData(f"limit={limit}: give the number of images to take, 1 or more.")
    return [place * count // limit for place in range(limit)]


def decoded(data: bytes, *, grey: bool) -> Any:
    """The decoded image in as many channels as the host has."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as picture:
            # Remarks on metadata or palettes of a file that can be read do not matter here.
            warnings.simplefilter("ignore", UserWarning)
            return picture.convert("L" if grey else "RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
