"""`Source`: what every source of images shares: batches in order, any one image, unreadable ones.

It does not know where the images lie, nor what is trained or measured on them.
"""

from __future__ import annotations

import io
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from patchslim.data.archives import READ_ERRORS
from patchslim.errors import BadData
from patchslim.hosts._adapter import Adapter
from patchslim.hosts._preprocessing import Preprocessing, find_preprocessing
from patchslim.hosts._registry import find_adapter
from patchslim.model.model import SlimModel

Batch = tuple[Tensor, Tensor | None]
Batches = Iterator[Batch]


class Source(ABC):
    """Images with their labels: an iterable of batches in order, and any image by its place.

    Another process may read too, forked or with a pickled copy: no open file is shared.

    Attributes:
        prepared: how every image is resized, cropped and normalised before evaluation.
        batch: how many images a batch has.
        unreadable: the images of the latest pass that could not be read, and were left out.
        any_order: whether one image can be read without reading those before it.
    """

    prepared: Preprocessing
    batch: int
    unreadable: list[str]
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
    def name_of(self, place: int) -> str:
        """What to call an image in a message."""

    @abstractmethod
    def label_of(self, place: int) -> int | None:
        """The label of an image; None where there are none."""

    @abstractmethod
    def read_file(self, place: int) -> bytes:
        """The file of an image; one of UNREADABLE where that cannot be read."""

    @abstractmethod
    def location(self) -> str:
        """What to call the whole in a message."""

    def load_image(self, place: int) -> Any:
        """The decoded image in the host's channels; one of UNREADABLE where that cannot be."""
        return decode_image(self.read_file(place), grey=self.prepared.is_grey)

    def __len__(self) -> int:
        """The number of batches, if every image is readable."""
        return -(-self.count // self.batch)

    def __iter__(self) -> Batches:
        """Batches of the readable images."""
        return self.sample_batches(self.count)

    def sample_batches(self, count: int) -> Batches:
        """Batches of the readable ones of at most `count` images, evenly spread."""
        self.unreadable = []
        places = pick_evenly(self.count, count)
        yield from stack_batches(self._load_images(places), self.batch)
        if len(self.unreadable) == len(places):
            raise BadData(
                f"None of the {len(places)} images in {self.location()} can be read; the first is "
                f"{self.unreadable[0]}."
            )

    def _load_images(self, places: Iterable[int]) -> Iterator[tuple[Tensor, int | None]]:
        """The readable images, each resized, cropped and normalised, with their labels."""
        transform = self.prepared.transform()
        for place in places:
            try:
                picture = self.load_image(place)
            except READ_ERRORS as error:
                self.unreadable.append(describe_unreadable(self.name_of(place), error))
                continue
            yield transform(picture), self.label_of(place)


def describe_unreadable(name: str, error: BaseException) -> str:
    """One line that names an unreadable image and says why."""
    return f"{name}: {str(error) or type(error).__name__}"


def resolve_preprocessing(host: nn.Module, prepared: Preprocessing | None = None) -> Preprocessing:
    """`prepared`, or how `host` is used to see images; a warning where that is only assumed."""
    adapter: Adapter
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
    """How many classes the host (or that of a SlimModel) tells apart, where it says so."""
    whole: Any = host.host if isinstance(host, SlimModel) else host
    found = getattr(whole, "num_classes", None)
    if found is None:
        found = getattr(getattr(whole, "config", None), "num_labels", None)
    return int(found) if found else None


def stack_batches(pairs: Iterable[tuple[Tensor, int | None]], batch: int) -> Batches:
    """Batches of `batch` images with their labels; the last one may be smaller."""
    left = iter(pairs)
    while taken := list(itertools.islice(left, batch)):
        labels = [label for _, label in taken if label is not None]
        yield torch.stack([image for image, _ in taken]), torch.tensor(labels) if labels else None


def pick_evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` places, evenly spread, so that sorted classes stay balanced."""
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise BadData(f"limit={limit}: give the number of images to take, 1 or more.")
    return [place * count // limit for place in range(limit)]


def decode_image(data: bytes, *, grey: bool) -> Any:
    """The decoded image in as many channels as the host has."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as picture:
            # Remarks on metadata or palettes of a file that can be read do not matter here.
            warnings.simplefilter("ignore", UserWarning)
            return picture.convert("L" if grey else "RGB")
    except UnidentifiedImageError as error:
        # Pillow names the object in memory, which is another one each time.
        raise ValueError("this is no image that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
