"""`Dataset`: batches of prepared images from a Hugging Face dataset on this machine.

It reads a folder that `datasets.Dataset.save_to_disk` wrote, or a dataset that is already loaded.
It fetches nothing, and all it knows of the model is its `Preprocessing`.
"""

from __future__ import annotations

import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from patchslim.data.files import describe_kind, read_regular, resolve_path, shorten
from patchslim.data.limits import USUAL_LIMITS, Limits
from patchslim.data.source import (
    MOST_LABEL,
    Source,
    class_count,
    pick_evenly,
    resolve_preprocessing,
)
from patchslim.errors import BadData, MissingExtra, WrongInput
from patchslim.hosts._preprocessing import Preprocessing


@dataclass(kw_only=True)
class Dataset(Source):
    """An iterable of batches: images (B, C, H, W) and labels (B,), or None without labels.

    Attributes:
        source: a `datasets.Dataset`, or the folder that its `save_to_disk` wrote.
        prepared: how every image is resized, cropped and normalised.
        image: the column of images.
        label: the column of labels; None leaves labels out.
        split: the split to read, if `source` has several.
        limit: how many rows to read, spread evenly.
        batch: how many images a batch has.
        limits: how large an image may be.
        dataset: the rows that are read, with the encoded image of each.
        unreadable: the rows that could not be read in the latest pass, and were left out.
    """

    source: Any = field(kw_only=False)
    prepared: Preprocessing
    image: str = "image"
    label: str | None = "label"
    split: str | None = None
    limit: int | None = None
    batch: int = 32
    limits: Limits = USUAL_LIMITS
    dataset: Any = field(init=False)
    unreadable: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        rows = open_dataset(self.source, self.split)
        for column in (self.image, self.label):
            if column is not None and column not in rows.column_names:
                raise BadData(
                    f"{_display_name(self.source)} has no column {column!r}; it has "
                    f"{', '.join(rows.column_names)}. Say which hold the images and the labels "
                    "(image=, label=; label=None for no labels)."
                )
        self._row_numbers = pick_evenly(len(rows), self.limit)
        chosen = rows.select(self._row_numbers)
        self._labels = [] if self.label is None else _read_labels(chosen, self.label)
        self.dataset = _disable_decoding(chosen.select_columns([self.image]), self.image)

    @classmethod
    def for_host(
        cls,
        host: nn.Module,
        source: Any,
        *,
        prepared: Preprocessing | None = None,
        split: str | None = None,
        limit: int | None = None,
        batch: int = 32,
        limits: Limits = USUAL_LIMITS,
    ) -> Dataset:
        """Opens a dataset for `host` (or a SlimModel), with the host's own preprocessing.

        `prepared` replaces that preprocessing. The columns are `image` and `label`, or else the
        only column of images and the only column of classes. If the dataset has another number of
        classes than the host, labels are left out with a warning.
        """
        rows = open_dataset(source, split)
        label = _label_column(rows)
        names = getattr(rows.features[label], "names", None) if label else None
        classes = class_count(host)
        if names and classes is not None and len(names) != classes:
            warnings.warn(
                f"{_display_name(source)} has {len(names)} classes and the model {classes}, so "
                "labels are left out and no accuracy is measured.",
                stacklevel=2,
            )
            label = None
        return cls(
            rows,
            prepared=resolve_preprocessing(host, prepared),
            image=_image_column(rows),
            label=label,
            limit=limit,
            batch=batch,
            limits=limits,
        )

    @property
    def has_labels(self) -> bool:
        """Whether batches come with labels."""
        return bool(self._labels)

    @property
    def count(self) -> int:
        """How many rows there are, readable or not."""
        return len(self._row_numbers)

    def name_of(self, index: int) -> str:
        """Names a row by its number in the whole dataset."""
        return f"row {self._row_numbers[index]}"

    def label_of(self, index: int) -> int | None:
        """Returns the label of a row; None without labels."""
        return self._labels[index] if self._labels else None

    def read_file(self, index: int) -> bytes:
        """Reads the encoded image of a row; raises one of READ_ERRORS if it cannot."""
        return _image_bytes(self.dataset[index][self.image], self.limits)

    def location(self) -> str:
        """Names the column of images."""
        return f"column {self.image!r}"


def is_dataset(path: str | Path) -> bool:
    """Tells whether `save_to_disk` wrote this folder, without importing the datasets library."""
    folder = resolve_path(path)
    has_split = all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))
    return has_split or (folder / "dataset_dict.json").is_file()


def open_dataset(source: Any, split: str | None) -> Any:
    """Opens one split as a `datasets.Dataset` of plain Python rows."""
    library = _import_datasets()
    if isinstance(source, str | Path):
        source = _load_from_disk(resolve_path(source))
    if isinstance(source, library.DatasetDict):
        splits = list(source)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise BadData(
                f"The dataset has the splits {', '.join(splits)}, and {split!r} was asked for. "
                f"Give split={splits[-1]!r}, or the folder of one: .../{splits[-1]}."
            )
        source = source[split]
    elif split is not None:
        raise BadData(f"split={split!r}: this dataset is a single split. Leave split out.")
    if not isinstance(source, library.Dataset):
        raise WrongInput(
            f"Got a {type(source).__name__}; give a datasets.Dataset, or the folder that its "
            "save_to_disk wrote."
        )
    if not len(source):
        raise BadData(f"{_display_name(source)} has no rows.")
    return source.with_format(None)


def _import_datasets() -> Any:
    """Imports the datasets library, or says how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets is not installed: pip install 'patchslim[hf]'") from error
    return datasets


def _load_from_disk(folder: Path) -> Any:
    """Loads what `save_to_disk` wrote, without showing progress bars."""
    library = _import_datasets()
    if not is_dataset(folder):
        raise BadData(
            f"{folder} is not a dataset on this machine: it has no state.json and "
            "dataset_info.json, nor dataset_dict.json. Save one with save_to_disk; nothing is "
            "fetched."
        )
    _check_saved(folder)
    shows_bars = library.are_progress_bars_disabled() is False
    library.disable_progress_bars()
    try:
        return library.load_from_disk(str(folder))
    except Exception as error:
        raise BadData(f"{folder} is a damaged or truncated dataset: {shorten(error)}") from error
    finally:
        if shows_bars:
            library.enable_progress_bars()


def _check_saved(folder: Path) -> None:
    """Refuses a saved dataset with anything in it that would wait for ever once it is opened."""
    for file in (*folder.iterdir(), *folder.glob("*/*")):
        try:
            mode = file.stat().st_mode
        except OSError as error:
            raise BadData(f"{file} in this dataset cannot be read: {error.strerror}.") from error
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise BadData(f"{file} in this dataset is {describe_kind(mode)}, not a file.")


def _disable_decoding(rows: Any, column: str) -> Any:
    """Returns the rows with encoded images, so that a damaged one stops only its own reading."""
    library = _import_datasets()
    feature = rows.features[column]
    if isinstance(feature, library.Image):
        return rows.cast_column(column, library.Image(decode=False))
    if getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        raise BadData(
            f"Column {column!r} holds {feature}, not images. Name the column of images, or cast it "
            f"first: dataset.cast_column({column!r}, datasets.Image())."
        )
    return rows


def _image_bytes(cell: Any, limits: Limits) -> bytes:
    """Reads an encoded image from the row itself, or from the local file that the row names."""
    if isinstance(cell, bytes):
        return cell
    entry = cell or {}
    if entry.get("bytes") is not None:
        return bytes(entry["bytes"])
    if entry.get("path"):
        return read_regular(Path(entry["path"]), limits)
    raise ValueError("there is no image in it")


def _read_labels(rows: Any, column: str) -> list[int]:
    """Reads all labels; returns none if all are negative, as in test splits without labels."""
    labels = list(rows.select_columns([column]).with_format(None)[column])
    if not all(isinstance(label, int) for label in labels):
        raise BadData(
            f"Column {column!r} holds {rows.features[column]}, and a label is a whole number in "
            f"every row. Make it one: dataset.class_encode_column({column!r}), or leave labels out "
            "(label=None)."
        )
    if max(labels) > MOST_LABEL:
        raise BadData(f"Column {column!r} holds {max(labels)}, which is no number of a class.")
    return [] if max(labels) < 0 else [int(label) for label in labels]


def _image_column(rows: Any) -> str:
    """Finds the column of images: `image`, or else the only one that holds images."""
    kind = _import_datasets().Image
    columns = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    return columns[0] if len(columns) == 1 and "image" not in rows.features else "image"


def _label_column(rows: Any) -> str | None:
    """Finds the column of labels: `label`, or else the only one that holds classes; or None."""
    if "label" in rows.features:
        return "label"
    kind = _import_datasets().ClassLabel
    columns = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    return columns[0] if len(columns) == 1 else None


def _display_name(source: Any) -> str:
    """Names the dataset for a message."""
    return str(source) if isinstance(source, str | Path) else "The dataset"
