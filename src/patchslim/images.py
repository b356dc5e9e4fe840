"""`Images`: batches of prepared images from a folder, a zip, a tar or a single file.

It knows nothing of models beyond the `Preparation` it is given. Order is that of sorted names, so
that two runs see the same images.
"""

from __future__ import annotations

import contextlib
import difflib
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from torch import Tensor, nn

from patchslim.errors import BadData
from patchslim.preparation import Preparation
from patchslim.reading import (
    UNREADABLE,
    Batches,
    class_count,
    decoded,
    preparation_of,
    spread,
    stacked,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ZIPS = (".zip",)
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

Read = Callable[[str], bytes]


@dataclass(kw_only=True)
class Images:
    """An iterable of batches: images (B, C, H, W) and labels (B,), or None where there are none.

    Labels are the places of the class folders in sorted order, or in the file `classes`.

    Attributes:
        path: a folder, with class folders or flat, a .zip or .tar of one, or one image.
        image_size, mean, std, crop_pct, interpolation, crop_mode, stated: see `Preparation`.
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
    names: list[str] = field(init=False)
    folders: list[str] = field(init=False)
    unreadable: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.path = Path(self.path).expanduser()
        with _opened(self.path) as (found, _):
            names = sorted(found)
        self._depth = _class_depth(names)
        self.folders = [] if self._depth is None else sorted({self._folder(n) for n in names})
        self._labels = _labels(self.path, self.folders, self.classes)
        self.names = [names[place] for place in spread(len(names), self.limit)]

    @classmethod
    def for_host(
        cls,
        host: nn.Module,
        path: str | Path,
        *,
        prepared: Preparation | None = None,
        classes: str | Path | None = None,
        limit: int | None = None,
        batch: int = 32,
    ) -> Images:
        """Images prepared as `host` (or a SlimModel of it) is used to, or as `prepared` says.

        Labels that cannot be the host's (another number of classes) are left out with a warning.
        """
        settings = preparation_of(host, prepared).to_json()
        images = cls(Path(path), **settings, classes=classes, limit=limit, batch=batch)
        images._check_labels(class_count(host))
        return images

    @property
    def prepared(self) -> Preparation:
        """How every image is resized, cropped and normalised."""
        return Preparation(
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            crop_mode=self.crop_mode,
            stated=self.stated,
        )

    @property
    def labelled(self) -> bool:
        """Whether batches come with labels."""
        return bool(self._labels)

    @property
    def dataset(self) -> list[str]:
        """The images that will be read, by the name that loaders of batches give them."""
        return self.names

    def __len__(self) -> int:
        """The number of batches, if every image is readable."""
        return -(-len(self.names) // self.batch)

    def __iter__(self) -> Batches:
        """Batches of the readable images."""
        self.unreadable = []
        yield from stacked(self._prepared(), self.batch)
        if len(self.unreadable) == len(self.names):
            raise BadData(
                f"None of the {len(self.names)} images in {self.path} can be read; the first is "
                f"{self.unreadable[0]}."
            )

    def _prepared(self) -> Iterator[tuple[Tensor, int | None]]:
        """The readable images, each resized, cropped and normalised, with their labels."""
        prepared = self.prepared
        transform = prepared.transform()
        with _opened(self.path) as (_, read):
            for name in self.names:
                try:
                    picture = decoded(read(name), grey=prepared.grey)
                except UNREADABLE as error:
                    self.unreadable.append(f"{name}: {str(error) or type(error).__name__}")
                    continue
                yield (
                    transform(picture),
                    self._labels[self._folder(name)] if self._labels else None,
                )

    def _folder(self, name: str) -> str:
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Read]]:
    """The names of the images in a folder, an archive or a file, and a function that reads one."""
    if not path.exists():
        raise BadData(
            f"There is no {path}. Give a folder of images, a .zip or .tar of one, or an image."
        )
    with contextlib.ExitStack() as stack:
        try:
            names, read = _source(path, stack)
        except UNREADABLE as error:
            raise BadData(f"{path} is a damaged or truncated archive: {error}") from error
        images = [name for name in names if _is_image(name)]
        if not images:
            others = f"{len(names)} other files" if names else "nothing"
            raise BadData(
                f"No images in {path}: looked for {', '.join(SUFFIXES)} at any depth, "
                f"found {others}."
            )
        yield images, read


def _source(path: Path, stack: contextlib.ExitStack) -> tuple[list[str], Read]:
    """All files, and a function that reads one."""
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return files, lambda name: (path / name).read_bytes()
    if path.name.lower().endswith(ZIPS):
        packed = stack.enter_context(zipfile.ZipFile(path))
        return [name for name in packed.namelist() if not name.endswith("/")], packed.read
    if path.name.lower().endswith(TARS):
        taped = stack.enter_context(tarfile.open(path))  # noqa: SIM115 (it is in a context: the stack)
        members = {member.name: member for member in taped.getmembers() if member.isfile()}

        def read(name: str) -> bytes:
            file = taped.extractfile(members[name])
            return b"" if file is None else file.read()

        return list(members), read
    return [path.name], lambda _: path.read_bytes()


def _is_image(name: str) -> bool:
    """Whether the name is an image's, and neither hidden nor a Macintosh archive's shadow."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return name.lower().endswith(SUFFIXES) and not hidden


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


def _labels(path: Path, folders: list[str], classes: str | Path | None) -> dict[str, int]:
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
