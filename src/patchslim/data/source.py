"""`Source`: the base of everything that images are read from.

A source knows how many images it has, reads any one of them, makes batches of all of them, and
notes which could not be read. This file does not know where the images are stored, nor what is
trained or measured on them.
"""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.data.decoding import Decoded, decode_image
from patchslim.data.files import READ_ERRORS
from patchslim.data.limits import USUAL_LIMITS, Limits
from patchslim.errors import BadData
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._preprocessing import Preprocessing, find_preprocessing
from patchslim.hosts._registry import find_adapter
from patchslim.model.model import SlimModel

MOST_LABEL = 2**31 - 1  # beyond any number of classes

Batch = tuple[Tensor, Tensor | None]
Batches = Iterator[Batch]


class Source(ABC):
    """Images with their labels: iterate over it for batches, or read any image by its index.

    Several processes may read at once, forked or with a pickled copy each; no open file is shared.

    Attributes:
        prepared: how every image is resized, cropped and normalised for evaluation.
        batch: how many images a batch has.
        limits: how large an image may be.
        unreadable: the images that could not be read in the latest pass, and were left out.
        remarks: images in the latest pass of which something is not followed or not read, such as
            an EXIF orientation, by what it is.
        has_random_access: whether an image can be read without reading those before it.
    """

    prepared: Preprocessing
    batch: int
    limits: Limits = USUAL_LIMITS
    unreadable: list[str]
    remarks: dict[str, list[str]]
    has_random_access: bool = True

    @property
    @abstractmethod
    def count(self) -> int:
        """How many images there are, readable or not."""

    @property
    @abstractmethod
    def has_labels(self) -> bool:
        """Whether the images come with labels."""

    @abstractmethod
    def name_of(self, index: int) -> str:
        """Names an image for a message."""

    @abstractmethod
    def label_of(self, index: int) -> int | None:
        """Returns the label of an image; None if the images have no labels."""

    @abstractmethod
    def read_file(self, index: int) -> bytes:
        """Reads the encoded file of an image; raises one of READ_ERRORS if it cannot."""

    @abstractmethod
    def location(self) -> str:
        """Says for a message where all the images are."""

    def load_image(self, index: int) -> Any:
        """Decodes an image, grey or RGB like the host; raises one of READ_ERRORS if it cannot."""
        return self._decode(index).picture

    def _decode(self, index: int) -> Decoded:
        """Decodes an image within the limits, before and after resizing."""
        return decode_image(
            self.read_file(index),
            grey=self.prepared.is_grey,
            limits=self.limits,
            resized_size=self.prepared.resized_size,
        )

    def __len__(self) -> int:
        """Counts the batches, provided that every image can be read."""
        return -(-self.count // self.batch)

    def __iter__(self) -> Batches:
        """Yields batches of all images that can be read."""
        return self.sample_batches(self.count)

    def sample_batches(self, count: int) -> Batches:
        """Yields batches of at most `count` images, spread evenly; unreadable ones are left out."""
        self.unreadable, self.remarks = [], {}
        indices = pick_evenly(self.count, count)
        yield from stack_batches(self._load_images(indices), self.batch)
        self._tell_remarks()
        if len(self.unreadable) == len(indices):
            raise BadData(
                f"None of the {len(indices)} images in {self.location()} can be read; the first is "
                f"{self.unreadable[0]}."
            )

    def _load_images(self, indices: Iterable[int]) -> Iterator[tuple[Tensor, int | None]]:
        """Yields the images that can be read, resized, cropped and normalised, with labels."""
        transform = self.prepared.transform()
        for index in indices:
            try:
                decoded = self._decode(index)
            except READ_ERRORS as error:
                self.unreadable.append(describe_unreadable(self.name_of(index), error))
                continue
            for remark in decoded.remarks:
                self.remarks.setdefault(remark, []).append(self.name_of(index))
            yield transform(decoded.picture), self.label_of(index)

    def _tell_remarks(self) -> None:
        """Warns of each remark once, however many passes there are."""
        told: set[str] = self.__dict__.setdefault("_told", set())
        for remark, names in self.remarks.items():
            if remark not in told:
                warnings.warn(f"{len(names)} images {remark}, such as {names[0]}.", stacklevel=1)
        told.update(self.remarks)


def describe_unreadable(name: str, error: BaseException) -> str:
    """Writes a line that names an unreadable image and says why it is unreadable."""
    return f"{name}: {str(error) or type(error).__name__}"


def resolve_preprocessing(host: nn.Module, prepared: Preprocessing | None = None) -> Preprocessing:
    """Returns `prepared`, or else how the images of `host` were prepared in its training.

    It warns if the host does not say, so that ImageNet's values are assumed.
    """
    adapter: Adapter
    said = getattr(host, "preprocessing", None)
    if isinstance(said, Preprocessing):  # an exported model, which brings it along
        return prepared or said
    if isinstance(host, SlimModel):
        adapter, host = host.plan.adapter, host.host
    else:
        adapter = find_adapter(host)
    prepared = prepared or find_preprocessing(host, adapter)
    if not prepared.stated:
        warnings.warn(
            f"This {type(host).__name__} does not say how its images are prepared; ImageNet's "
            f"mean and std are assumed: {prepared}.",
            stacklevel=3,
        )
    return prepared


def class_count(host: nn.Module) -> int | None:
    """Returns how many classes a host (or a SlimModel's host) has; None if it does not say."""
    model: Any = host.host if isinstance(host, SlimModel) else host
    count = getattr(model, "num_classes", None)
    if count is None:
        count = getattr(getattr(model, "config", None), "num_labels", None)
    return int(count) if count else None


def stack_batches(pairs: Iterable[tuple[Tensor, int | None]], batch: int) -> Batches:
    """Yields batches of `batch` images with their labels; the last one may be smaller."""
    remaining = iter(pairs)
    while chunk := list(itertools.islice(remaining, batch)):
        labels = [label for _, label in chunk if label is not None]
        yield torch.stack([image for image, _ in chunk]), torch.tensor(labels) if labels else None


def pick_evenly(count: int, limit: int | None) -> list[int]:
    """Picks at most `limit` of `count` indices, evenly spread.

    Images are sorted by class, so the classes stay balanced.
    """
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise BadData(f"limit={limit}: give the number of images to take, 1 or more.")
    return [index * count // limit for index in range(limit)]
