"""`Shards`: batches of prepared images from WebDataset shards on this machine.

The headers of every tar are read once. After that any image is read by its offset, so shuffling
needs no buffer and a stopped training can resume at any step. All that this file knows of the
model is its `Preprocessing`.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from patchslim.data.files import READ_ERRORS, resolve_path, shorten
from patchslim.data.limits import USUAL_LIMITS, Limits
from patchslim.data.shard_patterns import REMOTE_PATTERN, SHARD_SUFFIXES, find_shards
from patchslim.data.source import (
    MOST_LABEL,
    Source,
    class_count,
    pick_evenly,
    resolve_preprocessing,
)
from patchslim.data.tars import (
    Member,
    is_compressed,
    iterate_members,
    list_members,
    read_slice,
)
from patchslim.errors import BadData, PatchslimError
from patchslim.hosts._preprocessing import Preprocessing

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
# Key and extension, as WebDataset has them: the key ends at the first dot of the file's name.
NAME_PATTERN = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
LABEL_PATTERN = re.compile(rb"\s*[0-9]{1,10}\s*")
MOST_LABEL_BYTES = 1 << 20  # of a file that holds a label
NO_IMAGE = -1  # the offset of an image that is missing beside its label, or cannot be read
MISSING = "there is no image beside the label"


class ShardSample(NamedTuple):
    """A sample: where its image is in the shard, and its label.

    If the image is missing or cannot be read, its offset is NO_IMAGE, and `problem` says why.
    """

    name: str
    offset: int
    size: int
    label: int | None
    problem: str = ""


@dataclass(kw_only=True)
class Shards(Source):
    """An iterable of batches: images (B, C, H, W) and labels (B,), or None without labels.

    A sample is `key.jpg`, `.jpeg`, `.png` or `.webp`. Its label is in the same shard: a whole
    number in `key.cls`, or "label" in `key.json`.

    Attributes:
        path: a folder of .tar files, or a pattern: `train-{000000..000009}.tar`, `train-*.tar`.
        prepared: how every image is resized, cropped and normalised.
        limit: how many samples to read, spread evenly over the shards.
        batch: how many images a batch has.
        limits: how large an image may be, and how many shards and files in one there may be.
        names: the samples that are read, each with its shard.
        unreadable: the samples that could not be read in the latest pass, and were left out.
    """

    path: str | Path = field(kw_only=False)
    prepared: Preprocessing
    limit: int | None = None
    batch: int = 32
    limits: Limits = USUAL_LIMITS
    names: list[str] = field(init=False)
    unreadable: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._shards = find_shards(str(self.path), self.limits)
        samples: list[ShardSample] = []
        locations: list[tuple[int, int, int]] = []
        for number, shard in enumerate(self._shards):
            in_shard, notices = _read_samples(shard, self.limits)
            for notice in notices:
                warnings.warn(f"{notice}.", stacklevel=3)
            samples += in_shard
            locations += [(number, sample.offset, sample.size) for sample in in_shard]
        if not samples:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            raise BadData(
                f"No samples in the {len(self._shards)} shards of {self.path}: looked for "
                f"key.ext with ext one of {kinds}."
            )
        chosen = pick_evenly(len(samples), self.limit)
        self.names = [samples[index].name for index in chosen]
        self._problems = {
            place: samples[index].problem
            for place, index in enumerate(chosen)
            if samples[index].problem
        }
        # An array takes less memory than tuples. There may be millions, in every worker.
        self._locations = np.array([locations[index] for index in chosen], np.int64)
        labels = _collect_labels(samples, self.path)
        self._labels = labels[chosen] if len(labels) else labels

    @classmethod
    def for_host(
        cls,
        host: nn.Module,
        path: str | Path,
        *,
        prepared: Preprocessing | None = None,
        limit: int | None = None,
        batch: int = 32,
        limits: Limits = USUAL_LIMITS,
    ) -> Shards:
        """Opens shards for `host` (or a SlimModel), with the host's own preprocessing.

        `prepared` replaces that preprocessing. If a label is higher than the host has classes,
        labels are left out with a warning.
        """
        settings = resolve_preprocessing(host, prepared)
        shards = cls(path, prepared=settings, limit=limit, batch=batch, limits=limits)
        classes = class_count(host)
        highest = int(shards._labels.max()) if shards.has_labels else -1
        if classes is not None and highest >= classes:
            shards._labels = shards._labels[:0]
            warnings.warn(
                f"{path} has labels up to {highest} and the model {classes} classes, so labels are "
                "left out and no accuracy is measured.",
                stacklevel=2,
            )
        return shards

    @property
    def has_labels(self) -> bool:
        """Whether batches come with labels."""
        return len(self._labels) > 0

    @property
    def dataset(self) -> list[str]:
        """Samples that are read, under the name that a torch DataLoader gives them."""
        return self.names

    @property
    def count(self) -> int:
        """How many samples there are, readable or not."""
        return len(self.names)

    def name_of(self, index: int) -> str:
        """Names the shard and the file in it."""
        return self.names[index]

    def label_of(self, index: int) -> int | None:
        """Returns the label of a sample; None without labels."""
        return int(self._labels[index]) if self.has_labels else None

    def read_file(self, index: int) -> bytes:
        """Reads the encoded file of an image; raises one of READ_ERRORS if it cannot."""
        shard, offset, size = self._locations[index].tolist()
        if offset == NO_IMAGE:
            raise ValueError(self._problems[index])
        self.limits.check_file(size)
        return read_slice(self._shards[shard], offset, size)

    def location(self) -> str:
        """Names the folder or pattern."""
        return str(self.path)


def is_shards(path: str | Path) -> bool:
    """Tells whether `path` is a pattern of shards, or a folder that holds nothing but shards.

    The first sample needs a label: a folder with one tar of images for each class is no folder of
    shards. An address on another machine counts as a pattern; `Shards` then refuses it by name.
    """
    if REMOTE_PATTERN.match(str(path)):
        return True
    folder = resolve_path(path)
    if not folder.exists():
        return any(mark in str(path) for mark in "*?{") and ".t" in str(path)
    if not folder.is_dir():
        return False
    shards: list[Path] = []
    for file in folder.iterdir():
        if file.name.startswith("."):
            continue
        if not file.name.lower().endswith(SHARD_SUFFIXES):
            return False
        shards.append(file)
    return bool(shards) and _starts_with_label(min(shards))


def _starts_with_label(shard: Path) -> bool:
    """Tells whether the first sample of a tar has an image and a label."""
    first_key, extensions = None, set()
    if not shard.is_file():
        return False
    try:
        for member in iterate_members(shard, USUAL_LIMITS):
            match = NAME_PATTERN.fullmatch(member.name)
            if match is None:
                continue
            key, extension = match.groups()
            first_key = first_key or key
            if key != first_key:
                break
            extensions.add(extension.lower())
    except (*READ_ERRORS, PatchslimError):
        return False
    return bool(extensions & set(IMAGE_EXTENSIONS) and extensions & set(LABEL_EXTENSIONS))


def _read_samples(shard: Path, limits: Limits) -> tuple[list[ShardSample], list[str]]:
    """Reads the headers of one shard and lists its samples in their order, and notices."""
    if is_compressed(shard):
        raise BadData(
            f"{shard} is compressed, so no image in it can be read without those before. Unpack "
            "it once (gunzip, unzstd, ...) and give the .tar; images hardly shrink anyway."
        )
    try:
        members, notices = list_members(shard, limits)
        groups = _group_by_key(shard, members)
        samples = [_make_sample(shard, key, group) for key, group in groups.items()]
    except READ_ERRORS as error:
        raise BadData(
            f"{shard} is a damaged or truncated shard: {shorten(error)}. Copy it again or leave it "
            "out."
        ) from error
    return [sample for sample in samples if sample is not None], notices


def _group_by_key(shard: Path, files: list[Member]) -> dict[str, dict[str, Member]]:
    """Groups the files of a shard by key, and each group by extension."""
    groups: dict[str, dict[str, Member]] = {}
    for file in files:
        match = NAME_PATTERN.fullmatch(file.name)
        if match is None:
            continue
        key, extension = match[1], match[2].lower()
        group = groups.setdefault(key, {})
        has_image = bool(group.keys() & set(IMAGE_EXTENSIONS))
        if extension in group or (extension in IMAGE_EXTENSIONS and has_image):
            raise BadData(
                f"{shard} has two files {key}.{extension}, or two images of that key: the second "
                f"is {file.name}. A key names one sample; write the shard again."
            )
        group[extension] = file
    return groups


def _make_sample(shard: Path, key: str, group: dict[str, Member]) -> ShardSample | None:
    """Makes a sample from the files of a key; None if neither an image nor a label is there."""
    label = _read_label(shard, group)
    for extension in IMAGE_EXTENSIONS:
        if extension in group:
            member = group[extension]
            offset = NO_IMAGE if member.problem else member.offset
            name = f"{shard.name}/{member.name}"
            return ShardSample(name, offset, member.size, label, member.problem)
    if label is None:
        return None
    return ShardSample(f"{shard.name}/{key}", NO_IMAGE, 0, label, MISSING)


def _read_label(shard: Path, group: dict[str, Member]) -> int | None:
    """Reads the label from `key.cls`, or else from `key.json`; None if there is no label."""
    for extension in LABEL_EXTENSIONS:
        if extension not in group:
            continue
        member = group[extension]
        name = member.name
        if member.problem or member.size > MOST_LABEL_BYTES:
            raise BadData(
                f"{name} in {shard} holds no label: "
                f"{member.problem or f'it has {member.size:,} bytes'}."
            )
        text = read_slice(shard, member.offset, member.size)
        try:
            if extension == "cls":
                # int() itself takes more for a number, such as 1_0 for 10.
                label = int(text) if LABEL_PATTERN.fullmatch(text) else None
            elif "label" in (entries := json.loads(text)):
                label = entries["label"]
            else:
                continue
        except (ValueError, TypeError, RecursionError) as error:
            raise _label_error(shard, name, text) from error
        if type(label) is not int or not 0 <= label <= MOST_LABEL:
            raise _label_error(shard, name, text)
        return label
    return None


def _label_error(shard: Path, name: str, text: bytes) -> BadData:
    """Makes the error for a file that holds no valid label."""
    return BadData(
        f"{name} in {shard} holds {text[:40]!r}; a label is a whole number from 0: as text in "
        'key.cls, or as "label" in key.json.'
    )


def _collect_labels(samples: list[ShardSample], path: str | Path) -> npt.NDArray[np.int64]:
    """Returns the labels of all samples, or an empty array; refuses labels on some of them only."""
    unlabelled = [sample.name for sample in samples if sample.label is None]
    if unlabelled and len(unlabelled) < len(samples):
        raise BadData(
            f"{len(unlabelled)} of {len(samples)} samples in {path} have no label, such as "
            f"{unlabelled[0]}. Give all of them one (key.cls), or none."
        )
    labels = [sample.label for sample in samples if sample.label is not None]
    return np.array(labels, np.int64)
