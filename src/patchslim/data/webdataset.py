"""`Shards`: batches of prepared images from WebDataset shards that lie on this machine.

The headers of every tar are read once; then any image is read from its place, so that shuffling
needs no buffer and training can go on where it stopped. It knows nothing of models beyond the
`Preparation` it is given.
"""

from __future__ import annotations

import json
import re
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import nn

from patchslim.data.archives import READ_ERRORS, Member, is_compressed, list_members, read_slice
from patchslim.data.source import Source, class_count, pick_evenly, resolve_preprocessing
from patchslim.errors import BadData
from patchslim.hosts._preprocessing import Preprocessing

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSIONS = ("cls", "json")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
NAME_PATTERN = re.compile(
    r"((?:.*/)?[^./]+)\.([^/]+)"
)  # WebDataset's: the key ends at the first dot
REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
RANGE_PATTERN = re.compile(r"\{(\d+)\.\.(\d+)\}")
NO_IMAGE = -1


class ShardSample(NamedTuple):
    """One sample of a shard; an image that is not there has the offset MISSING."""

    name: str
    offset: int
    size: int
    label: int | None


@dataclass(kw_only=True)
class Shards(Source):
    """An iterable of batches: images (B, C, H, W) and labels (B,), or None where there are none.

    A sample is `key.jpg`, `.jpeg`, `.png` or `.webp`, with `key.cls` (a whole number) or a "label"
    in `key.json` beside it, in the same shard.

    Attributes:
        path: a folder of .tar files, or a pattern: `train-{000000..000009}.tar`, `train-*.tar`.
        prepared: how every image is resized, cropped and normalised.
        limit: how many samples to take, spread evenly over the shards.
        batch: how many images a batch has.
        names: the samples that will be read, each with its shard.
        unreadable: the samples of the latest pass that could not be read, and were left out.
    """

    path: str | Path = field(kw_only=False)
    prepared: Preprocessing
    limit: int | None = None
    batch: int = 32
    names: list[str] = field(init=False)
    unreadable: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._shards = _find_shards(str(self.path))
        found: list[ShardSample] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(self._shards):
            samples = _read_samples(shard)
            found += samples
            places += [(number, each.offset, each.size) for each in samples]
        if not found:
            kinds = ", ".join(IMAGE_EXTENSIONS)
            raise BadData(
                f"No samples in the {len(self._shards)} shards of {self.path}: looked for "
                f"key.ext with ext one of {kinds}."
            )
        chosen = pick_evenly(len(found), self.limit)
        self.names = [found[place].name for place in chosen]
        # Arrays and not lists of tuples: there may be millions, and every worker has them too.
        self._places = np.array([places[place] for place in chosen], np.int64)
        labels = _collect_labels(found, self.path)
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
    ) -> Shards:
        """Shards prepared as `host` (or a SlimModel of it) is used to, or as `prepared` says.

        Labels that cannot be the host's (more classes than it has) are left out with a warning.
        """
        settings = resolve_preprocessing(host, prepared)
        shards = cls(path, prepared=settings, limit=limit, batch=batch)
        known = class_count(host)
        highest = int(shards._labels.max()) if shards.has_labels else -1
        if known is not None and highest >= known:
            shards._labels = shards._labels[:0]
            warnings.warn(
                f"{path} has labels up to {highest} and the model {known} classes, so labels are "
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
        """The samples that will be read, by the name that loaders of batches give them."""
        return self.names

    @property
    def count(self) -> int:
        """How many samples there are, readable or not."""
        return len(self.names)

    def name_of(self, place: int) -> str:
        """The shard and the file in it."""
        return self.names[place]

    def label_of(self, place: int) -> int | None:
        """The label of a sample; None where there are none."""
        return int(self._labels[place]) if self.has_labels else None

    def read_file(self, place: int) -> bytes:
        """The file of an image; one of UNREADABLE where that cannot be read."""
        shard, offset, size = (int(each) for each in self._places[place])
        if offset == NO_IMAGE:
            raise ValueError("there is no image beside the label")
        return read_slice(self._shards[shard], offset, size)

    def location(self) -> str:
        """The folder or pattern."""
        return str(self.path)


def is_shards(path: str | Path) -> bool:
    """Whether this is a pattern of shards, or a folder of nothing but shards with labels.

    A folder of tars of which each holds the images of one class has no labels beside the images.
    An address on another machine counts as a pattern, for `Shards` to say that it reads none.
    """
    if REMOTE.match(str(path)):
        return True
    folder = Path(path).expanduser()
    if not folder.exists():
        return any(mark in str(path) for mark in "*?{") and ".t" in str(path)
    if not folder.is_dir():
        return False
    files: list[Path] = []
    for file in folder.iterdir():
        if file.name.startswith("."):
            continue
        if not file.name.lower().endswith(TARS):
            return False
        files.append(file)
    return bool(files) and _starts_with_label(min(files))


def _starts_with_label(shard: Path) -> bool:
    """Whether the first files of a tar are an image and its label."""
    first, kinds = None, set()
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                parts = NAME_PATTERN.fullmatch(member.name)
                if not member.isfile() or parts is None:
                    continue
                first = first or parts[1]
                if parts[1] != first:
                    break
                kinds.add(parts[2].lower())
    except READ_ERRORS:
        return False
    return bool(kinds & set(IMAGE_EXTENSIONS) and kinds & set(LABEL_EXTENSIONS))


def _find_shards(path: str) -> list[Path]:
    """The shards of a folder or a pattern, in order."""
    if REMOTE.match(path):
        raise BadData(
            f"{path} is not on this machine, and nothing is fetched. Copy the shards to a folder "
            "and give that, or a pattern such as folder/train-{000000..000009}.tar."
        )
    whole = Path(path).expanduser()
    if whole.is_dir():
        files = [file for file in sorted(whole.iterdir()) if not file.name.startswith(".")]
        shards = [file for file in files if file.name.lower().endswith(TARS)]
    elif whole.exists():
        shards = [whole]
    else:
        shards = [file for each in _expand_ranges(str(whole)) for file in _expand_stars(Path(each))]
    if not shards:
        raise BadData(f"No shards at {path}: give a folder of .tar files or a pattern of them.")
    for shard in shards:
        if not shard.is_file():
            raise BadData(f"There is no shard {shard}, which {path} names.")
    return shards


def _expand_ranges(pattern: str) -> Iterator[str]:
    """The pattern with each number of its ranges, in order, as long as the first is written."""
    match = RANGE_PATTERN.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        written = str(number).zfill(len(first))
        yield from _expand_ranges(pattern[: match.start()] + written + pattern[match.end() :])


def _expand_stars(pattern: Path) -> list[Path]:
    """The files that a pattern with stars fits, sorted; a name without stars as it is."""
    if not any(mark in str(pattern) for mark in "*?["):
        return [pattern]
    root = Path(pattern.anchor)
    return sorted(root.glob(str(pattern.relative_to(root))))


def _read_samples(shard: Path) -> list[ShardSample]:
    """The samples of one shard, in its order."""
    if is_compressed(shard):
        raise BadData(
            f"{shard} is compressed, so no image in it can be read without those before. Unpack "
            "it once (gunzip, unzstd, ...) and give the .tar; images hardly shrink anyway."
        )
    try:
        groups = _group_by_key(shard, list_members(shard))
        samples = [_make_sample(shard, key, group) for key, group in groups.items()]
    except READ_ERRORS as error:
        raise BadData(
            f"{shard} is a damaged or truncated shard: {error}. Copy it again or leave it out."
        ) from error
    return [sample for sample in samples if sample is not None]


def _group_by_key(shard: Path, files: list[Member]) -> dict[str, dict[str, Member]]:
    """The files of a shard by key and extension."""
    groups: dict[str, dict[str, Member]] = {}
    for file in files:
        parts = NAME_PATTERN.fullmatch(file.name)
        if parts is None:
            continue
        key, extension = parts[1], parts[2].lower()
        group = groups.setdefault(key, {})
        doubled = extension in group or (
            extension in IMAGE_EXTENSIONS and group.keys() & set(IMAGE_EXTENSIONS)
        )
        if doubled:
            raise BadData(
                f"{shard} has two files {key}.{extension}, or two images of that key: the second "
                f"is {file.name}. A key names one sample; write the shard again."
            )
        group[extension] = file
    return groups


def _make_sample(shard: Path, key: str, group: dict[str, Member]) -> ShardSample | None:
    """The image and the label of a key; None where it has neither."""
    label = _read_label(shard, group)
    for extension in IMAGE_EXTENSIONS:
        if extension in group:
            name, offset, size = group[extension]
            return ShardSample(f"{shard.name}/{name}", offset, size, label)
    return None if label is None else ShardSample(f"{shard.name}/{key}", NO_IMAGE, 0, label)


def _read_label(shard: Path, group: dict[str, Member]) -> int | None:
    """The label in `key.cls`, or else the one in `key.json`; None where there is none."""
    for extension in LABEL_EXTENSIONS:
        if extension not in group:
            continue
        name, offset, size = group[extension]
        text = read_slice(shard, offset, size)
        try:
            if extension == "cls":
                label = int(text)
            elif "label" in (held := json.loads(text)):
                label = held["label"]
            else:
                continue
        except (ValueError, TypeError) as error:
            raise _label_error(shard, name, text) from error
        if type(label) is not int or label < 0:
            raise _label_error(shard, name, text)
        return label
    return None


def _label_error(shard: Path, name: str, text: bytes) -> BadData:
    """The error for what is no label."""
    return BadData(
        f"{name} in {shard} holds {text[:40]!r}; a label is a whole number from 0: as text in "
        'key.cls, or as "label" in key.json.'
    )


def _collect_labels(found: list[ShardSample], path: str | Path) -> npt.NDArray[np.int64]:
    """The label of each sample, or none at all."""
    bare = [each.name for each in found if each.label is None]
    if bare and len(bare) < len(found):
        raise BadData(
            f"{len(bare)} of {len(found)} samples in {path} have no label, such as {bare[0]}. Give "
            "all of them one (key.cls), or none."
        )
    labels = [each.label for each in found if each.label is not None]
    return np.array(labels, np.int64)
