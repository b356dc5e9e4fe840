"""`Images`: batches of prepared images from a folder, a zip, a tar or a single file.

All it knows of the model is its `Preprocessing`. Images come in the order of their names, so that
two runs see the same images in the same order.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from torch import nn

from patchslim.data.archives import CompressedTar, open_files
from patchslim.data.files import READ_ERRORS, Files, read_regular, resolve_path, shorten
from patchslim.data.limits import USUAL_LIMITS, Limits
from patchslim.data.source import Source, class_count, pick_evenly, resolve_preprocessing
from patchslim.errors import BadData
from patchslim.hosts._preprocessing import Preprocessing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(kw_only=True)
class Images(Source):
    """An iterable of batches: images (B, C, H, W) and labels (B,), or None without labels.

    The label of an image is the number of its class folder, counted from 0 in sorted order or in
    that of the file `classes`.

    Attributes:
        path: a folder, with or without class folders; a .zip or .tar of one; or one image.
        image_size, mean, std, crop_pct, interpolation, crop_mode, stated: see `Preprocessing`.
        prepared: all of these in one value.
        classes: a file with the name of one class folder on each line, in the order of the labels.
        limit: how many images to read, spread evenly over the sorted names.
        batch: how many images a batch has.
        limits: how large an image, the folder and an archive may be.
        names: the images that are read.
        folders: the class folders in sorted order; empty if there are none.
        unreadable: the images that could not be read in the latest pass, and were left out.
    """

    path: Path = field(kw_only=False)
    image_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    crop_mode: str = "center"
    stated: bool = True
    classes: str | Path | None = None
    limit: int | None = None
    batch: int = 32
    limits: Limits = USUAL_LIMITS
    prepared: Preprocessing = field(init=False, repr=False, compare=False)
    names: list[str] = field(init=False)
    folders: list[str] = field(init=False)
    unreadable: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.path = resolve_path(self.path)
        self.prepared = Preprocessing(
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            crop_mode=self.crop_mode,
            stated=self.stated,
        )
        self._files, names = _find_images(self.path, self.limits)
        for notice in self._files.notices:
            warnings.warn(f"{notice}.", stacklevel=3)
        self.has_random_access = not isinstance(self._files, CompressedTar)
        self._depth = _class_depth(names)
        has_folders = self._depth is not None
        self.folders = sorted({self._class_folder(n) for n in names}) if has_folders else []
        self._labels = _read_labels(self.path, self.folders, self.classes, self.limits)
        self.names = [names[index] for index in pick_evenly(len(names), self.limit)]

    @classmethod
    def for_host(
        cls,
        host: nn.Module,
        path: str | Path,
        *,
        prepared: Preprocessing | None = None,
        classes: str | Path | None = None,
        limit: int | None = None,
        batch: int = 32,
        limits: Limits = USUAL_LIMITS,
    ) -> Images:
        """Opens images for `host` (or a SlimModel), with the host's own preprocessing.

        `prepared` replaces that preprocessing. If there are more or fewer class folders than the
        host has classes, labels are left out with a warning, unless `classes` orders the folders.
        """
        settings = resolve_preprocessing(host, prepared).to_json()
        images = cls(
            Path(path), **settings, classes=classes, limit=limit, batch=batch, limits=limits
        )
        images._check_labels(class_count(host))
        return images

    @property
    def has_labels(self) -> bool:
        """Whether batches come with labels."""
        return bool(self._labels)

    @property
    def dataset(self) -> list[str]:
        """Images that are read, under the name that a torch DataLoader gives them."""
        return self.names

    @property
    def count(self) -> int:
        """How many images there are, readable or not."""
        return len(self.names)

    def name_of(self, index: int) -> str:
        """Names an image by its path inside the folder or archive."""
        return self.names[index]

    def label_of(self, index: int) -> int | None:
        """Returns the label of an image's class folder; None without labels."""
        return self._labels[self._class_folder(self.names[index])] if self._labels else None

    def read_file(self, index: int) -> bytes:
        """Reads the encoded file of an image; raises one of READ_ERRORS if it cannot."""
        return self._files.read(self.names[index])

    def location(self) -> str:
        """Names the folder, archive or file."""
        return str(self.path)

    def _class_folder(self, name: str) -> str:
        """Returns the class folder of an image."""
        return PurePosixPath(name).parts[self._depth or 0]

    def _check_labels(self, known: int | None) -> None:
        """Leaves labels out, with a warning, if they cannot be those of a host of `known` classes.

        Labels from a file `classes` are an error then, since somebody gave that file on purpose.
        """
        if not self._labels or known is None:
            return
        if self.classes is not None:
            highest = max(self._labels.values())
            if highest >= known:
                raise BadData(
                    f"{self.classes} gives labels up to {highest}, and the model has {known} "
                    "classes. Give the list that the model was trained with."
                )
            return
        count = len(self._labels)
        if count == known:
            return
        self._labels = {}
        warnings.warn(
            f"{self.path} has {count} class folders and the model {known} classes, so labels are "
            "left out and no accuracy is measured. A file with one folder name a line, in the "
            "order of the labels, gives them (classes=, --classes).",
            stacklevel=3,
        )


def _find_images(path: Path, limits: Limits) -> tuple[Files, list[str]]:
    """Opens the files, and returns them with the sorted names of the images among them."""
    if not path.exists():
        raise BadData(
            f"There is no {path}. Give a folder of images, a .zip or .tar of one, or an image."
        )
    try:
        files = open_files(path, limits)
        names = files.names()
    except READ_ERRORS as error:
        raise BadData(f"{path} is a damaged or truncated archive: {shorten(error)}") from error
    images = sorted(name for name in names if _is_image(name))
    if not images:
        others = f"{len(names)} other files" if names else "nothing"
        raise BadData(
            f"No images in {path}: looked for {', '.join(IMAGE_SUFFIXES)} at any depth, "
            f"found {others}."
        )
    return files, images


def _is_image(name: str) -> bool:
    """Tells whether a name is an image's, not hidden and not metadata that macOS adds to a zip."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in parts)
    return name.lower().endswith(IMAGE_SUFFIXES) and not hidden


def _class_depth(names: list[str]) -> int | None:
    """Returns how deep in each path the class folder is: 0 for the first folder of the path.

    Folders that all images share are no class folders. If some image is in no folder, there are
    no classes, and the depth is None.
    """
    paths = [PurePosixPath(name).parts[:-1] for name in names]
    depth, deepest = 0, min(map(len, paths))
    if not deepest:
        return None
    while depth + 1 < deepest and len({parts[depth] for parts in paths}) == 1:
        depth += 1
    return depth


def _read_labels(
    path: Path, folders: list[str], classes: str | Path | None, limits: Limits
) -> dict[str, int]:
    """Returns the label of each class folder: its number in sorted order or in `classes`."""
    if classes is None:
        return {folder: label for label, folder in enumerate(folders)}
    if not folders:
        raise BadData(f"{classes} names class folders, and {path} has none.")
    try:
        # utf-8-sig: some editors put a mark in front of the first name.
        text = read_regular(resolve_path(classes), limits).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadData(
            f"{classes} is not a list of class folders, one name a line: {shorten(error)}"
        ) from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    labels = {line: label for label, line in enumerate(lines)}
    several = [folder for folder in folders if lines.count(folder) > 1]
    if several:
        raise BadData(
            f"{classes} names {several[0]!r} more than once, so its label is not known. Name each "
            "class folder once."
        )
    unknown = [folder for folder in folders if folder not in labels]
    if unknown:
        near = difflib.get_close_matches(unknown[0], labels, n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(near)}." if near else f" It begins with {lines[:3]}."
        raise BadData(
            f"{len(unknown)} of {len(folders)} class folders in {path} are not in {classes}, such "
            f"as {unknown[0]!r}.{hint}"
        )
    return {folder: labels[folder] for folder in folders}
