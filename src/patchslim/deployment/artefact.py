"""`Artefact`: an exported model, which is called as the slimmed model is."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from patchslim.deployment.card import read_card
from patchslim.deployment.checking import Check
from patchslim.deployment.registry import target_of_artefact
from patchslim.deployment.running import check_regular, run_images
from patchslim.deployment.target import Runner
from patchslim.errors import BadFile, OldArtefact, PatchslimError, WrongInput, warn_caller
from patchslim.hosts._preprocessing import Preprocessing
from patchslim.model.images import check_readable
from patchslim.saving.hub import Upload, upload
from patchslim.versions import installed_version, is_older


class Named(dict[str, Tensor]):
    """Tensors by name, which are attributes too: `answer.logits` is `answer["logits"]`."""

    def __getattr__(self, name: str) -> Tensor:
        """The tensor of this name."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"There is no {name!r}, but: {', '.join(self)}.") from None


class Artefact:
    """An exported model in its runtime: images in, and what the slimmed model returns out.

    Attributes:
        path: the file or folder.
        card: what the model is made of and what was checked, as plain data.
        preprocessing: how images are prepared; `preprocessing.transform()` does it.
        labels: names of the classes, or None.
        runtime: the versions of what runs it, by distribution.
        check: what the check against the slimmed model found; None where it was loaded.
    """

    def __init__(
        self, path: Path, card: dict[str, Any], run: Runner, needs: Iterable[str] = ()
    ) -> None:
        self.path, self.card, self._run = path, card, run
        self.preprocessing = Preprocessing.from_json(card["images"])
        self.labels: list[str] | None = card["labels"]
        self.check: Check | None = None
        self.runtime = {name: installed_version(name) or "unknown" for name in needs}

    def __call__(self, images: Tensor) -> Any:
        """What the slimmed model returns for images (B, C, H, W)."""
        outputs, values = self.card["outputs"], self.run(images)
        if outputs["kind"] == "tensor":
            return values[0]
        if outputs["kind"] == "mapping":
            return Named(zip(outputs["names"], values, strict=True))
        return tuple(values)

    def run(self, images: Tensor) -> list[Tensor]:
        """The tensors in the order of their names, as the runtime returns them."""
        self._check_images(images)
        return run_images(self.path, self._run, images, self.card["outputs"]["names"])

    def logits(self, images: Tensor) -> Tensor:
        """The class scores (B, C): the answer, or what is called so in it, or its first tensor."""
        answer = self(images)
        if isinstance(answer, tuple):
            answer = answer[0]
        elif isinstance(answer, dict):
            answer = answer.get("logits", next(iter(answer.values())))
        found: Tensor = answer
        return found

    @functools.cached_property
    def num_classes(self) -> int:
        """How many classes it tells apart: it is asked about a black image."""
        black = torch.zeros(self.card["batch"] or 1, *self.card["input"])
        return int(self.logits(black).shape[-1])

    def push_to_hub(self, repository: str, **how: Unpack[Upload]) -> str:
        """Uploads the file or folder, with the card in it, and returns the address."""
        return upload(self.path, repository, **how)

    @property
    def size(self) -> int:
        """How many bytes its file or folder takes."""
        files = [self.path] if self.path.is_file() else self.path.iterdir()
        return sum(each.stat().st_size for each in files)

    def __repr__(self) -> str:
        """The target, the path and the method."""
        return f"Artefact({self.card['target']}, {str(self.path)!r}, {self.card['method']})"

    def _check_images(self, images: Any) -> None:
        """Refuses images that the graph was not made for."""
        batch, shape = self.card["batch"], tuple(self.card["input"])
        made_for = f"({batch or 'batch'}, {', '.join(map(str, shape))})"
        if not isinstance(images, Tensor):
            raise WrongInput(
                f"Got {type(images).__name__} instead of images: {self.path} takes a float tensor "
                f"of shape {made_for}."
            )
        check_readable(images, f"{self.path} takes images of shape {made_for}")
        other = tuple(images.shape[1:]) != shape
        if other or not images.is_floating_point() or (batch and len(images) != batch):
            cure = "Resize them, or export the model for theirs."
            if not other and images.is_floating_point():
                cure = f"Give {batch} in each call, or export with batch={len(images)}."
            raise WrongInput(
                f"Got images of shape {tuple(images.shape)} and type {images.dtype}: {self.path} "
                f"takes float images of shape {made_for}. {cure}"
            )


def open_artefact(
    path: Path, *, threads: int | None = None, is_own: bool = False
) -> Artefact | None:
    """The artefact at `path`; None if it looks like nothing that a target writes.

    Args:
        path: a file or folder.
        threads: how many it runs on; by default as many as its runtime chooses.
        is_own: whether this very call wrote it, so that it holds no code of anybody else.

    Raises:
        BadFile: for one that is truncated, edited, foreign, or of a newer version.
    """
    target = target_of_artefact(path)
    if target is None:
        return None
    if target.runs_code and not is_own:
        raise BadFile(
            f"{path} is not opened: PyTorch runs code in such a file while it reads it. If you "
            f"trust who made it, open it with {target.reader}; or export to onnx or openvino."
        )
    target.check_installed()
    check_regular(path, target.files)
    try:
        text, run = target.open(path) if threads is None else target.open(path, threads)
    except PatchslimError:
        raise
    except Exception as error:  # a reader raises whatever it meets in a broken file
        said = " ".join(str(error).split())[:200]
        raise BadFile(
            f"{path} cannot be read as {target.name}: {type(error).__name__}: {said}. Copy it "
            "again, or export it again."
        ) from error
    card = read_card(text, path)
    if card["target"] != target.name:
        raise BadFile(f"{path} says that it is for {card['target']}, and it looks like "
                      f"{target.name}. Give it the name that it was exported with.")  # fmt: skip
    written_by = card.get("package")
    if is_older(written_by, target.mended):
        warn_caller(
            f"{path} was written by patchslim {written_by:.20}, whose files have a fault: "
            f"{target.fault}. Export it again.",
            OldArtefact,
        )
    return Artefact(path, card, run, target.needs)
