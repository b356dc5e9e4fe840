"""`Feed`: the images of a whole course of training, step by step, from any step on.

Which images a step sees, and how each is changed, follows from the course's seed and the step
alone: not from workers, processes or where training was taken up again. It knows no models.
"""

from __future__ import annotations

import bisect
import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from patchslim.data.archives import READ_ERRORS
from patchslim.data.source import Batch, Source, describe_unreadable
from patchslim.errors import BadData, BadSetting, TrainingStopped, WrongInput
from patchslim.training.augment import Augment, augmentation, check_even, temporary_seed
from patchslim.training.config import TrainConfig

MAX_TRIES = 100  # unreadable images in a row before the set is given up
ORDER_SEED, AUGMENT_SEED = 0, 1  # what is drawn, so that no two draws share their numbers

SampleIndex = tuple[int, int]  # the epoch, and which image


@dataclass(frozen=True)
class MicroBatch:
    """Some images of one step (B, C, H, W), their labels (B,) or None, and their names."""

    images: Tensor
    labels: Tensor | None
    names: tuple[str, ...]


class TrainingLoader:
    """What one of `world` processes that train together sees, as lists of parts of a step.

    The images of all epochs, each in an order of its own, make one long row, and step s takes
    those from s * course.batch on. A step is cut in world * course.accumulate equal parts, and
    process `rank` has the `rank`-th run of course.accumulate of them.

    Args:
        images: `Images`, a `Dataset` or `Shards`; or prepared batches in memory, a list of pairs
            of images (B, C, H, W) and labels (B,) or None.
        course: how to train.
        rank: which process this is.
        world: how many there are.

    Attributes:
        count: how many images there are, readable or not.
        total: how many steps the whole course has.
        unreadable: the images that could not be read so far, each once and with the reason.
    """

    def __init__(
        self,
        images: Source | Sequence[Batch],
        course: TrainConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._dataset = _make_dataset(images, course)
        self.count = len(self._dataset)
        self.total_steps = course.total_steps(self.count)
        self._course = course
        self._part_size = _part_size(course, world)
        self._offset = rank * course.accumulate * self._part_size
        self.unreadable: list[str] = []

    def name(self, place: int) -> str:
        """What an image is called."""
        return self._dataset.name(place)

    def steps(self, start: int = 0) -> Iterator[list[MicroBatch]]:
        """This process's parts of every step from `start` to the end."""
        # Rows in memory are there already: handing them from process to process only takes time.
        workers = self._course.workers if isinstance(self._dataset, SourceDataset) else 0
        loader: DataLoader[Sample] = DataLoader(
            self._dataset,  # type: ignore[arg-type]  # anything with __getitem__ will do
            batch_sampler=self._batch_indices(start),
            num_workers=workers,
            collate_fn=_collate,
            # Its own, for a loader draws a number from the global one when it begins.
            generator=torch.Generator(),
        )
        with _keep_sigchld_handler():
            parts = iter(loader)
        for _ in range(start, self.total_steps):
            yield [
                self._unwrap_batch(_next_batch(parts, workers))
                for _ in range(self._course.accumulate)
            ]

    def _batch_indices(self, start: int) -> Iterator[list[SampleIndex]]:
        """The places of each part, in the order in which they are needed."""
        known, order = -1, np.empty(0, np.int64)
        for step in range(start, self.total_steps):
            for part in range(self._course.accumulate):
                at = step * self._course.batch + self._offset + part * self._part_size
                places = []
                for position in range(at, at + self._part_size):
                    epoch, turn = divmod(position, self.count)
                    if epoch != known:
                        known, order = epoch, _epoch_order(self._course.seed, epoch, self.count)
                    places.append((epoch, int(order[turn])))
                yield places

    def _unwrap_batch(self, part: LoadedBatch) -> MicroBatch:
        """The part, once what could not be read is written down."""
        for line in part.unreadable:
            if line not in self.unreadable:
                self.unreadable.append(line)
        if part.micro_batch is None:
            raise BadData(
                f"{len(part.unreadable)} images one after the other cannot be read; the first is "
                f"{part.unreadable[0]}."
            )
        return part.micro_batch


class Sample(NamedTuple):
    """One image as it is learned; None where neither it nor those after it can be read."""

    image: Tensor | None
    label: int | None
    name: str
    unreadable: tuple[str, ...] = ()


class LoadedBatch(NamedTuple):
    """Images that are learned together, and a line for each that could not be read."""

    micro_batch: MicroBatch | None
    unreadable: tuple[str, ...]


class SourceDataset:
    """The pictures of a source, each changed by what its seed, epoch and place say."""

    def __init__(self, source: Source, seed: int, augment: Augment) -> None:
        self._source, self._seed, self._augment = source, seed, augment

    def __len__(self) -> int:
        return self._source.count

    def name(self, place: int) -> str:
        """What the source calls an image."""
        return self._source.name_of(place)

    def __getitem__(self, at: SampleIndex) -> Sample:
        """The image of a place as an epoch sees it, or the next one that can be read."""
        epoch, asked = at
        unreadable: list[str] = []
        for further in range(min(len(self), MAX_TRIES)):
            place = (asked + further) % len(self)
            name = self.name(place)
            try:
                picture = self._source.load_image(place)
            except READ_ERRORS as error:
                unreadable.append(describe_unreadable(name, error))
                continue
            with temporary_seed(self._seed, AUGMENT_SEED, epoch, asked):
                image = self._augment(picture)
            return Sample(image, self._source.label_of(place), name, tuple(unreadable))
        return Sample(None, None, "", tuple(unreadable))


class InMemoryDataset:
    """The rows of batches that are in memory."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._ends: list[int] = []
        for number, batch in enumerate(batches):
            _check_batch(batch, batches[0], number)
            self._ends.append(len(self) + len(batch[0]))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, place: int) -> str:
        """Its number, for it has no other name."""
        return f"image {place}"

    def __getitem__(self, at: SampleIndex) -> Sample:
        """The image of a place, the same in every epoch."""
        place = at[1]
        number = bisect.bisect_right(self._ends, place)
        images, labels = self._batches[number]
        row = place - self._ends[number]  # counted from the end
        label = None if labels is None else int(labels[row])
        return Sample(images[row], label, self.name(place))


def _make_dataset(images: object, course: TrainConfig) -> SourceDataset | InMemoryDataset:
    """The images by epoch and place; refused where they cannot be had in any order."""
    rows: SourceDataset | InMemoryDataset
    if isinstance(images, Source):
        if not images.has_random_access:
            raise BadData(
                f"{images.location()} is a compressed tar, of which no image can be read without "
                "those before it, and training reads in random order. Unpack it once: give the "
                ".tar, a .zip or the folder."
            )
        rows = SourceDataset(images, course.seed, augmentation(images.prepared, course))
    elif isinstance(images, Sequence) and not isinstance(images, str):
        for name in ("randaugment", "jitter", "erasing"):
            if getattr(course, name):
                raise BadSetting(
                    f"{name}={getattr(course, name)!r} changes pictures, and these images are "
                    "prepared already. Leave it out, or give the pictures: Images.for_host(...)."
                )
        rows = InMemoryDataset(images)
    else:
        raise WrongInput(
            f"Got a {type(images).__name__}; training reads images several times and in random "
            "order. Give Images, a Dataset, Shards, or a list of batches: list(it)."
        )
    if not len(rows):
        raise BadData("There are no images to train on: the list of batches is empty.")
    return rows


def _check_batch(batch: object, first: Batch, number: int) -> None:
    """Refuses what is no pair of images and labels, and what differs from the first batch."""
    images, labels = batch if isinstance(batch, Sequence) and len(batch) == 2 else (batch, None)
    if not isinstance(images, Tensor) or images.ndim != 4 or images is batch:
        raise WrongInput(
            f"Batch {number} is a {type(batch).__name__}; each batch is a pair: images as a tensor "
            "(B, C, H, W), and labels (B,) or None."
        )
    if images.shape[1:] != first[0].shape[1:]:
        raise WrongInput(
            f"Batch {number} has images of shape {tuple(images.shape[1:])}, the first has "
            f"{tuple(first[0].shape[1:])}. One course is of one image size: resize them."
        )
    if (labels is None) != (first[1] is None):
        raise WrongInput(f"Batch {number}: give labels with all batches, or with none.")
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.shape != (len(images),) or labels.is_floating_point():
            raise WrongInput(
                f"Batch {number} has labels of shape {tuple(labels.shape)} and type "
                f"{labels.dtype}; give {len(images)} whole numbers, one an image."
            )


def _part_size(course: TrainConfig, world: int) -> int:
    """How many images a part of a step has."""
    parts = world * course.accumulate
    if course.batch % parts:
        nearest = -(-course.batch // parts) * parts
        raise BadSetting(
            f"batch={course.batch} cannot be shared by {world} processes of {course.accumulate} "
            f"parts each (accumulate): {parts} does not divide it. Nearest: batch={nearest}."
        )
    check_even(course, course.batch // parts)
    return course.batch // parts


def _epoch_order(seed: int, epoch: int, count: int) -> Any:
    """The places in the order of one epoch."""
    return np.random.default_rng((seed, ORDER_SEED, epoch)).permutation(count)


def _collate(seen: list[Sample]) -> LoadedBatch:
    """Single images as one part."""
    unreadable = tuple(line for each in seen for line in each.unreadable)
    images = [each.image for each in seen if each.image is not None]
    if len(images) < len(seen):
        return LoadedBatch(None, next(each.unreadable for each in seen if each.image is None))
    labels = [each.label for each in seen if each.label is not None]
    names = tuple(each.name for each in seen)
    fed = MicroBatch(torch.stack(images), torch.tensor(labels) if labels else None, names)
    return LoadedBatch(fed, unreadable)


@contextlib.contextmanager
def _keep_sigchld_handler() -> Iterator[None]:
    """Keeps the loader that is begun within it from raising in the midst of the caller's code.

    PyTorch raises where the main thread happens to be when a worker dies, which may be in the
    middle of a checkpoint. Asking for the next images finds the death too, some seconds later.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _next_batch(parts: Iterator[LoadedBatch], workers: int) -> LoadedBatch:
    """The next part; one error where a worker that reads images has died."""
    try:
        return next(parts)
    except (RuntimeError, OSError, EOFError) as error:
        # What a worker raised comes back as "Caught ... in DataLoader worker", and is a bug.
        if not workers or str(error).startswith("Caught"):
            raise
        raise TrainingStopped(
            f"A process that reads images has died ({error}). Often memory is short, or shared "
            "memory (/dev/shm in a container): use fewer workers (workers=, now "
            f"{workers}), or workers=0 to read in the training process."
        ) from error
