"""`Dataset`: batches of prepared images from a Hugging Face dataset that lies on this machine.

It reads what `Dataset.save_to_disk` wrote, or a dataset that is open already; it fetches nothing.
It knows nothing of models beyond the `Preparation` it is given.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from patchslim.data.source import Source, class_count, pick_evenly, resolve_preprocessing
from patchslim.errors import BadData, MissingExtra, WrongInput
from patchslim.hosts._preprocessing import Preprocessing


@dataclass(kw_only=True)
class Dataset(Source):
    """An iterable of batches: images (B, C, H, W) and labels (B,), or None where there are none.

    Attributes:
        source: a `datasets.Dataset`, or the folder that its `save_to_disk` wrote.
        prepared: how every image is resized, cropped and normalised.
        image, label: the columns; label=None leaves labels out.
        split: which one, where `source` holds several.
        limit: how many rows to take, spread evenly.
        batch: how many images a batch has.
        dataset: the rows that will be read, with the encoded image of each.
        unreadable: the rows of the latest pass that could not be read, and were left out.
    """

    source: Any = field(kw_only=False)
    prepared: Preprocessing
    image: str = "image"
    label: str | None = "label"
    split: str | None = None
    limit: int | None = None
    batch: int = 32
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
        self._places = pick_evenly(len(rows), self.limit)
        chosen = rows.select(self._places)
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
    ) -> Dataset:
        """The dataset prepared as `host` (or a SlimModel of it) is used to, or as `prepared` says.

        The columns are `image` and `label`, or else the only ones of images and of classes. Labels
        that cannot be the host's (another number of classes) are left out with a warning.
        """
        rows = open_dataset(source, split)
        label = _label_column(rows)
        names = getattr(rows.features[label], "names", None) if label else None
        known = class_count(host)
        if names and known is not None and len(names) != known:
            warnings.warn(
                f"{_display_name(source)} has {len(names)} classes and the model {known}, "
                "so labels are "
                "left out and no accuracy is measured.",
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
        )

    @property
    def has_labels(self) -> bool:
        """Whether batches come with labels."""
        return bool(self._labels)

    @property
    def count(self) -> int:
        """How many rows there are, readable or not."""
        return len(self._places)

    def name_of(self, place: int) -> str:
        """The number of the row in the whole dataset."""
        return f"row {self._places[place]}"

    def label_of(self, place: int) -> int | None:
        """The label of a row; None where there are none."""
        return self._labels[place] if self._labels else None

    def read_file(self, place: int) -> bytes:
        """The encoded image of a row; one of UNREADABLE where that cannot be read."""
        return _image_bytes(self.dataset[place][self.image])

    def location(self) -> str:
        """The column of images."""
        return f"column {self.image!r}"


def is_dataset(path: str | Path) -> bool:
    """Whether `save_to_disk` of the datasets library wrote this folder; asked without it."""
    folder = Path(path).expanduser()
    one = all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))
    return one or (folder / "dataset_dict.json").is_file()


def open_dataset(source: Any, split: str | None) -> Any:
    """The `datasets.Dataset` of one split, as plain rows."""
    library = _import_datasets()
    if isinstance(source, str | Path):
        source = _load_from_disk(Path(source).expanduser())
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
    """The datasets library."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets is not installed: pip install 'patchslim[hf]'") from error
    return datasets


def _load_from_disk(folder: Path) -> Any:
    """What `save_to_disk` wrote into a local folder."""
    library = _import_datasets()
    if not is_dataset(folder):
        raise BadData(
            f"{folder} is not a dataset on this machine: it has no state.json and "
            "dataset_info.json, nor dataset_dict.json. Save one with save_to_disk; nothing is "
            "fetched."
        )
    shows_bars = library.are_progress_bars_disabled() is False
    library.disable_progress_bars()
    try:
        return library.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadData(f"{folder} is a damaged or truncated dataset: {error}") from error
    finally:
        if shows_bars:
            library.enable_progress_bars()


def _disable_decoding(rows: Any, column: str) -> Any:
    """The rows with their images left as they are in the file, so that one can be unreadable."""
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


def _image_bytes(cell: Any) -> bytes:
    """The encoded image, which lies in the row or in a local file that the row names."""
    if isinstance(cell, bytes):
        return cell
    held = cell or {}
    if held.get("bytes") is not None:
        return bytes(held["bytes"])
    if held.get("path"):
        return Path(held["path"]).read_bytes()
    raise ValueError("there is no image in it")


def _read_labels(rows: Any, column: str) -> list[int]:
    """The label of each row; none where all are negative, as in test splits without labels."""
    labels = list(rows.select_columns([column]).with_format(None)[column])
    if not all(isinstance(label, int) for label in labels):
        raise BadData(
            f"Column {column!r} holds {rows.features[column]}, and a label is a whole number in "
            f"every row. Make it one: dataset.class_encode_column({column!r}), or leave labels out "
            "(label=None)."
        )
    return [] if max(labels) < 0 else [int(label) for label in labels]


def _image_column(rows: Any) -> str:
    """The column `image`, or the only one that holds images."""
    kind = _import_datasets().Image
    found = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    return found[0] if len(found) == 1 and "image" not in rows.features else "image"


def _label_column(rows: Any) -> str | None:
    """The column `label`, or the only one that holds classes; None where there is none."""
    if "label" in rows.features:
        return "label"
    kind = _import_datasets().ClassLabel
    found = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    return found[0] if len(found) == 1 else None


def _display_name(source: Any) -> str:
    """What to call the dataset in a message."""
    return str(source) if isinstance(source, str | Path) else "The dataset"
