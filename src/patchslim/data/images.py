"""`Images`: batches of prepared images from a folder, a zip, a tar or a single file.

It knows nothing of models beyond the `Preparation` it is given. Order is that of sorted names, so
that two runs see the same images.
"""

from __future__ import annotations

import difflib
import tarfile
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from torch import nn

from patchslim.data.archives import (
    READ_ERRORS,
    ProcessLocal,
    is_compressed,
    list_members,
    read_slice,
)
from patchslim.data.source import Source, class_count, pick_evenly, resolve_preprocessing
from patchslim.errors import BadData
from patchslim.hosts._preprocessing import Preprocessing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ZIPS = (".zip",)
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(kw_only=True)
class Images(Source):
    """An iterable of batches: images (B, C, H, W) and labels (B,), or None where there are none.

    Labels are the places of the class folders in sorted order, or in the file `classes`.

    Attributes:
        path: a folder, with class folders or flat, a .zip or .tar of one, or one image.
        image_size, mean, std, crop_pct, interpolation, crop_mode, stated: see `Preparation`.
        prepared: all of these in one.
        classes: a file with the name of one class folder a line, in the order of the labels.
        limit: how many images to take, spread evenly over the sorted names.
        batch: how many images a batch has.
        names: the images that will be read.
        folders: the class folders in sorted order; empty where there are none.
        unreadable: the images of the latest pass that could not be read, and were left out.
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
    prepared: Preprocessing = field(init=False, repr=False, compare=False)
    names: list[str] = field(init=False)
    folders: list[str] = field(init=False)
    unreadable: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.path = Path(self.path).expanduser()
        self.prepared = Preprocessing(
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            crop_mode=self.crop_mode,
            stated=self.stated,
        )
        self._files, names = _find_images(self.path)
        self.has_random_access = not isinstance(self._files, CompressedTar)
        self._depth = _class_depth(names)
        self.folders = [] if self._depth is None else sorted({self._class_folder(n) for n in names})
        self._labels = _read_labels(self.path, self.folders, self.classes)
        self.names = [names[place] for place in pick_evenly(len(names), self.limit)]

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
    ) -> Images:
        """Images prepared as `host` (or a SlimModel of it) is used to, or as `prepared` says.

        Labels that cannot be the host's (another number of classes) are left out with a warning.
        """
        settings = resolve_preprocessing(host, prepared).to_json()
        images = cls(Path(path), **settings, classes=classes, limit=limit, batch=batch)
        images._check_labels(class_count(host))
        return images

    @property
    def has_labels(self) -> bool:
        """Whether batches come with labels."""
        return bool(self._labels)

    @property
    def dataset(self) -> list[str]:
        """The images that will be read, by the name that loaders of batches give them."""
        return self.names

    @property
    def count(self) -> int:
        """How many images there are, readable or not."""
        return len(self.names)

    def name_of(self, place: int) -> str:
        """The path of an image inside the folder or archive."""
        return self.names[place]

    def label_of(self, place: int) -> int | None:
        """The label of an image's class folder; None where there are none."""
        return self._labels[self._class_folder(self.names[place])] if self._labels else None

    def read_file(self, place: int) -> bytes:
        """The file of an image; one of UNREADABLE where that cannot be read."""
        return self._files.read(self.names[place])

    def location(self) -> str:
        """The folder, archive or file."""
        return str(self.path)

    def _class_folder(self, name: str) -> str:
        """The class folder of an image."""
        return PurePosixPath(name).parts[self._depth or 0]

    def _check_labels(self, known: int | None) -> None:
        """Drops labels that cannot be those of a host with `known` classes, and says so."""
        count = (
            max(self._labels.values()) + 1 if self.classes and self._labels else len(self._labels)
        )
        if not count or known is None or count == known:
            return
        if self.classes is not None:
            if count > known:
                raise BadData(
                    f"{self.classes} gives labels up to {count - 1}, and the model has {known} "
                    "classes. Give the list that the model was trained with."
                )
            return
        self._labels = {}
        warnings.warn(
            f"{self.path} has {count} class folders and the model {known} classes, so labels are "
            "left out and no accuracy is measured. A file with one folder name a line, in the "
            "order of the labels, gives them (classes=, --classes).",
            stacklevel=3,
        )


class Files(Protocol):
    """Where files lie."""

    def names(self) -> list[str]:
        """All of them."""

    def read(self, name: str) -> bytes:
        """The content of one."""


class Folder:
    """The files below a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """All of them."""
        files = (file for file in self._path.rglob("*") if file.is_file())
        return [file.relative_to(self._path).as_posix() for file in files]

    def read(self, name: str) -> bytes:
        """The content of one."""
        return (self._path / name).read_bytes()


class SingleFile(Folder):
    """One file by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent)
        self._name = path.name

    def names(self) -> list[str]:
        """The one."""
        return [self._name]


class Zip:
    """The files in a zip."""

    def __init__(self, path: Path) -> None:
        self._open = ProcessLocal(path, zipfile.ZipFile)

    def names(self) -> list[str]:
        """All of them."""
        return [name for name in self._open().namelist() if not name.endswith("/")]

    def read(self, name: str) -> bytes:
        """The content of one."""
        return self._open().read(name)


class Tar:
    """The files in an uncompressed tar."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members = {each.name: each for each in list_members(path)}

    def names(self) -> list[str]:
        """All of them."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """The content of one."""
        _, offset, size = self._members[name]
        return read_slice(self._path, offset, size)


class OpenTar:
    """A compressed tar that is open, and its files by name."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path)  # noqa: SIM115 (closed below, or by its owner)
        try:
            self.members = {each.name: each for each in self._tar.getmembers() if each.isfile()}
        except READ_ERRORS:
            self._tar.close()
            raise

    def read(self, name: str) -> bytes:
        """The content of one file."""
        file = self._tar.extractfile(self.members[name])
        return b"" if file is None else file.read()

    def close(self) -> None:
        """Gives the file back."""
        self._tar.close()


class CompressedTar:
    """The files in a compressed tar, of which one is read by unpacking all that lies before it."""

    def __init__(self, path: Path) -> None:
        self._open = ProcessLocal(path, OpenTar)

    def names(self) -> list[str]:
        """All of them."""
        return list(self._open().members)

    def read(self, name: str) -> bytes:
        """The content of one."""
        return self._open().read(name)


def _find_images(path: Path) -> tuple[Files, list[str]]:
    """Where the files lie, and the sorted names of the images among them."""
    if not path.exists():
        raise BadData(
            f"There is no {path}. Give a folder of images, a .zip or .tar of one, or an image."
        )
    try:
        files = _open_files(path)
        names = files.names()
    except READ_ERRORS as error:
        raise BadData(f"{path} is a damaged or truncated archive: {error}") from error
    images = sorted(name for name in names if _is_image(name))
    if not images:
        others = f"{len(names)} other files" if names else "nothing"
        raise BadData(
            f"No images in {path}: looked for {', '.join(IMAGE_SUFFIXES)} at any depth, "
            f"found {others}."
        )
    return files, images


def _open_files(path: Path) -> Files:
    """The files in a folder or an archive, or the one file."""
    name = path.name.lower()
    if path.is_dir():
        return Folder(path)
    if name.endswith(ZIPS):
        return Zip(path)
    if name.endswith(TARS):
        return CompressedTar(path) if is_compressed(path) else Tar(path)
    return SingleFile(path)


def _is_image(name: str) -> bool:
    """Whether the name is an image's, and neither hidden nor a Macintosh archive's shadow."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return name.lower().endswith(IMAGE_SUFFIXES) and not hidden


def _class_depth(names: list[str]) -> int | None:
    """Which part of each path is the class folder, below folders that all images share.

    None where some image lies in no folder: then there are no classes.
    """
    paths = [PurePosixPath(name).parts[:-1] for name in names]
    depth, deepest = 0, min(map(len, paths))
    if not deepest:
        return None
    while depth + 1 < deepest and len({parts[depth] for parts in paths}) == 1:
        depth += 1
    return depth


def _read_labels(path: Path, folders: list[str], classes: str | Path | None) -> dict[str, int]:
    """The label of each class folder; none where there are no folders."""
    if classes is None:
        return {folder: label for label, folder in enumerate(folders)}
    if not folders:
        raise BadData(f"{classes} names class folders, and {path} has none.")
    try:
        lines = Path(classes).expanduser().read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(
            f"{classes} is not a list of class folders, one name a line: {error}"
        ) from error
    places = {line.strip(): label for label, line in enumerate(lines)}
    strange = [folder for folder in folders if folder not in places]
    if strange:
        near = difflib.get_close_matches(strange[0], places, n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(near)}." if near else f" It begins with {lines[:3]}."
        raise BadData(
            f"{len(strange)} of {len(folders)} class folders in {path} are not in {classes}, such "
            f"as {strange[0]!r}.{hint}"
        )
    return {folder: places[folder] for folder in folders}
