"""`TrainingLoader`: the images of a whole training run, step by step, from any step on.

The seed and the step alone decide which images a step sees and how each is augmented. The number of
workers, the number of processes and resuming change nothing. It knows no models.
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

from patchslim.data.files import READ_ERRORS
from patchslim.data.source import Batch, Source, describe_unreadable
from patchslim.errors import BadData, BadSetting, TrainingStopped, WrongInput
from patchslim.measurement.score import as_labels
from patchslim.model.images import check_readable
from patchslim.training.augment import Augment, augmentation, check_even, temporary_seed
from patchslim.training.config import TrainConfig

MAX_TRIES = 100  # this many unreadable images in a row are an error
ORDER_SEED, AUGMENT_SEED = 0, 1  # different parts of a seed, for independent random numbers

SampleIndex = tuple[int, int]  # the epoch, and the index of the image


@dataclass(frozen=True)
class MicroBatch:
    """Images of one step (B, C, H, W), their labels (B,) or None, and their names."""

    images: Tensor
    labels: Tensor | None
    names: tuple[str, ...]


class TrainingLoader:
    """Loads the images of one process, as a list of micro-batches for each step.

    All epochs in a row, each shuffled again, make one long sequence. Step s takes the next
    `config.batch` of them from s * config.batch on. They are cut into world * config.accumulate
    equal micro-batches, of which process `rank` gets the `rank`-th run of config.accumulate.

    Args:
        images: `Images`, a `Dataset` or `Shards`; or a list of prepared batches in memory, which
            are pairs of images (B, C, H, W) and labels (B,) or None.
        config: how to train.
        rank: the number of this process.
        world: the number of processes that train together.

    Attributes:
        count: how many images there are, readable or not.
        total_steps: how many steps the whole run has.
        unreadable: a line for each image that could not be read so far, with the reason.

    Raises:
        BadData: there are no images, or they cannot be read in random order.
        BadSetting: the batch cannot be divided, or a setting does not suit prepared images.
        WrongInput: `images` or a batch is of the wrong kind.
    """

    def __init__(
        self,
        images: Source | Sequence[Batch],
        config: TrainConfig,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._dataset = _make_dataset(images, config)
        self.count = len(self._dataset)
        self.total_steps = config.total_steps(self.count)
        self._config = config
        self._part_size = _part_size(config, world)
        self._offset = rank * config.accumulate * self._part_size
        self.unreadable: list[str] = []

    def name(self, index: int) -> str:
        """Returns the name of an image."""
        return self._dataset.name(index)

    def steps(self, start: int = 0) -> Iterator[list[MicroBatch]]:
        """Yields this process's micro-batches of every step from `start` to the end."""
        # Images in memory are ready. Workers would only cost the time to copy them.
        workers = self._config.workers if isinstance(self._dataset, SourceDataset) else 0
        loader: DataLoader[Sample] = DataLoader(
            self._dataset,  # type: ignore[arg-type]  # anything with __getitem__ will do
            batch_sampler=self._batch_indices(start),
            num_workers=workers,
            collate_fn=_collate,
            # A DataLoader draws a number when it starts, by default from the global generator.
            generator=torch.Generator(),
        )
        with _keep_sigchld_handler():
            batches = iter(loader)
        for _ in range(start, self.total_steps):
            yield [
                self._unwrap_batch(_next_batch(batches, workers))
                for _ in range(self._config.accumulate)
            ]

    def _batch_indices(self, start: int) -> Iterator[list[SampleIndex]]:
        """Yields the images of each micro-batch, in the order in which they are needed."""
        current, order = -1, np.empty(0, np.int64)
        for step in range(start, self.total_steps):
            for part in range(self._config.accumulate):
                first = step * self._config.batch + self._offset + part * self._part_size
                indices = []
                for position in range(first, first + self._part_size):
                    epoch, place = divmod(position, self.count)
                    if epoch != current:
                        current, order = epoch, _epoch_order(self._config.seed, epoch, self.count)
                    indices.append((epoch, int(order[place])))
                yield indices

    def _unwrap_batch(self, loaded: LoadedBatch) -> MicroBatch:
        """Notes the unreadable images of a loaded batch, and returns its micro-batch."""
        for line in loaded.unreadable:
            if line not in self.unreadable:
                self.unreadable.append(line)
        if loaded.micro_batch is None:
            raise BadData(
                f"{len(loaded.unreadable)} images one after the other cannot be read; the first is "
                f"{loaded.unreadable[0]}."
            )
        return loaded.micro_batch


class Sample(NamedTuple):
    """One augmented image, or None where neither it nor the images after it can be read."""

    image: Tensor | None
    label: int | None
    name: str
    unreadable: tuple[str, ...] = ()


class LoadedBatch(NamedTuple):
    """A micro-batch as a worker returns it, and a line for each image that could not be read."""

    micro_batch: MicroBatch | None
    unreadable: tuple[str, ...]


class SourceDataset:
    """Pictures of a source, each augmented as the seed, the epoch and its index decide."""

    def __init__(self, source: Source, seed: int, augment: Augment) -> None:
        self._source, self._seed, self._augment = source, seed, augment

    def __len__(self) -> int:
        return self._source.count

    def name(self, index: int) -> str:
        """Returns the source's name of an image."""
        return self._source.name_of(index)

    def __getitem__(self, at: SampleIndex) -> Sample:
        """Returns the image as this epoch sees it, or the next one that can be read."""
        epoch, wanted = at
        unreadable: list[str] = []
        for tries in range(min(len(self), MAX_TRIES)):
            index = (wanted + tries) % len(self)
            name = self.name(index)
            try:
                picture = self._source.load_image(index)
            except READ_ERRORS as error:
                unreadable.append(describe_unreadable(name, error))
                continue
            with temporary_seed(self._seed, AUGMENT_SEED, epoch, wanted):
                image = self._augment(picture)
            return Sample(image, self._source.label_of(index), name, tuple(unreadable))
        return Sample(None, None, "", tuple(unreadable))


class InMemoryDataset:
    """Images of batches that are in memory."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._ends: list[int] = []
        for number, batch in enumerate(batches):
            _check_batch(batch, batches[0], number)
            self._ends.append(len(self) + len(batch[0]))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, index: int) -> str:
        """Returns "image 3" for the fourth image: in memory, images have no names of their own."""
        return f"image {index}"

    def __getitem__(self, at: SampleIndex) -> Sample:
        """Returns the image, which is the same in every epoch."""
        index = at[1]
        number = bisect.bisect_right(self._ends, index)
        images, labels = self._batches[number]
        row = index - self._ends[number]  # negative: counted from the end of the batch
        label = None if labels is None else int(labels[row])
        return Sample(images[row], label, self.name(index))


def _make_dataset(images: object, config: TrainConfig) -> SourceDataset | InMemoryDataset:
    """Wraps the images for random access, and refuses those that cannot be read that way."""
    dataset: SourceDataset | InMemoryDataset
    if isinstance(images, Source):
        if not images.has_random_access:
            raise BadData(
                f"{images.location()} is a compressed tar, of which no image can be read without "
                "those before it, and training reads in random order. Unpack it once: give the "
                ".tar, a .zip or the folder."
            )
        dataset = SourceDataset(images, config.seed, augmentation(images.prepared, config))
    elif isinstance(images, Sequence) and not isinstance(images, str):
        for name in ("randaugment", "jitter", "erasing"):
            if getattr(config, name):
                raise BadSetting(
                    f"{name}={getattr(config, name)!r} changes pictures, and these images are "
                    "prepared already. Leave it out, or give the pictures: Images.for_host(...)."
                )
        dataset = InMemoryDataset(images)
    else:
        raise WrongInput(
            f"Got a {type(images).__name__}; training reads images several times and in random "
            "order. Give Images, a Dataset, Shards, or a list of batches: list(it)."
        )
    if not len(dataset):
        raise BadData("There are no images to train on: the list of batches is empty.")
    return dataset


def _check_batch(batch: object, first: Batch, number: int) -> None:
    """Refuses a batch that is not a pair of images and labels, or that differs from the first."""
    images, labels = batch if isinstance(batch, Sequence) and len(batch) == 2 else (batch, None)
    if not isinstance(images, Tensor) or images.ndim != 4 or images is batch:
        raise WrongInput(
            f"Batch {number} is a {type(batch).__name__}; each batch is a pair: images as a tensor "
            "(B, C, H, W), and labels (B,) or None."
        )
    check_readable(images, f"Batch {number}")
    if images.dtype != first[0].dtype:
        raise WrongInput(
            f"Batch {number} has images of type {images.dtype}, the first has {first[0].dtype}. "
            "Convert them to one type."
        )
    if images.shape[1:] != first[0].shape[1:]:
        raise WrongInput(
            f"Batch {number} has images of shape {tuple(images.shape[1:])}, the first has "
            f"{tuple(first[0].shape[1:])}. One run is of one image size: resize them."
        )
    if (labels is None) != (first[1] is None):
        raise WrongInput(f"Batch {number}: give labels with all batches, or with none.")
    if labels is not None:
        labels = as_labels(labels, number)
        if labels.shape != (len(images),) or labels.is_floating_point():
            raise WrongInput(
                f"Batch {number} has labels of shape {tuple(labels.shape)} and type "
                f"{labels.dtype}; give {len(images)} whole numbers, one an image."
            )


def _part_size(config: TrainConfig, world: int) -> int:
    """Returns how many images a micro-batch has."""
    parts = world * config.accumulate
    if config.batch % parts:
        nearest = -(-config.batch // parts) * parts
        raise BadSetting(
            f"batch={config.batch} cannot be shared by {world} processes of {config.accumulate} "
            f"parts each (accumulate): {parts} does not divide it. Nearest: batch={nearest}."
        )
    check_even(config, config.batch // parts)
    return config.batch // parts


def _epoch_order(seed: int, epoch: int, count: int) -> Any:
    """Returns the indices of all images, in the random order of one epoch."""
    return np.random.default_rng((seed, ORDER_SEED, epoch)).permutation(count)


def _collate(samples: list[Sample]) -> LoadedBatch:
    """Stacks single images into one batch."""
    unreadable = tuple(line for each in samples for line in each.unreadable)
    images = [each.image for each in samples if each.image is not None]
    if len(images) < len(samples):
        return LoadedBatch(None, next(each.unreadable for each in samples if each.image is None))
    labels = [each.label for each in samples if each.label is not None]
    names = tuple(each.name for each in samples)
    batch = MicroBatch(torch.stack(images), torch.tensor(labels) if labels else None, names)
    return LoadedBatch(batch, unreadable)


@contextlib.contextmanager
def _keep_sigchld_handler() -> Iterator[None]:
    """Restores the SIGCHLD handler that a DataLoader, started within the block, replaces.

    PyTorch's handler raises in the main thread as soon as a worker dies, perhaps in the middle of
    writing a checkpoint. Without it, asking for the next batch notices the death seconds later.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _next_batch(batches: Iterator[LoadedBatch], workers: int) -> LoadedBatch:
    """Returns the next batch, or raises TrainingStopped where a worker has died."""
    try:
        return next(batches)
    except (RuntimeError, OSError, EOFError) as error:
        # An exception inside a worker starts with "Caught". It is a bug, and not a dead worker.
        if not workers or str(error).startswith("Caught"):
            raise
        raise TrainingStopped(
            f"A process that reads images has died ({error}). Often memory is short, or shared "
            "memory (/dev/shm in a container): use fewer workers (workers=, now "
            f"{workers}), or workers=0 to read in the training process."
        ) from error
