"""How far a graph of a lower precision is from the slimmed model in float32, on images.

Rounding to eight bits changes every answer a little, so that there is no equality to check. What is
told instead is on how many images the same tokens are kept, and how far answers are off.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchslim.deployment.graph import Graph, Witness, kept_cells
from patchslim.deployment.target import Runner
from patchslim.errors import UnsupportedModel, WrongExport
from patchslim.measurement.score import kl_divergence

# How far from float32 a file may be: so many times the KL of its graph, and this much more.
FARTHER, UNCHANGED = 3, 1e-3


@dataclass(frozen=True)
class Drift:
    """What a lower precision has changed.

    Attributes:
        precision: the lower precision.
        images: on how many images both were compared.
        same_tokens: share of the images on which every block keeps the same tokens.
        kl: mean KL divergence of its answers from those in float32, in nats.
        agreement: share of the images with the same first answer.
        kept: patches that both keep, as a share of those that either keeps, over all blocks.
        recipe: how it was made, where there were several ways.
    """

    precision: str
    images: int
    same_tokens: float
    kl: float
    agreement: float
    kept: float
    recipe: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, as it stands in the card."""
        return asdict(self)

    def __str__(self) -> str:
        """One clause."""
        return (
            f"in {self.precision}{f' ({self.recipe})' if self.recipe else ''} on {self.images} "
            f"images: KL to float32 {self.kl:.4f}, the same first answer on {self.agreement:.1%}, "
            f"{self.kept:.1%} of the same patches, all of them on {self.same_tokens:.1%}"
        )


@dataclass(frozen=True)
class Limits:
    """How much a lower precision may change; None for any amount.

    Attributes:
        kl: the mean KL divergence from float32.
        drop: the share of images whose first answer changes.
    """

    kl: float | None = None
    drop: float | None = None

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self != Limits()

    def excess(self, drift: Drift) -> str:
        """What is too large, in words; empty if nothing is."""
        said = []
        # Written so that NaN is too large.
        if self.kl is not None and not drift.kl <= self.kl:
            said.append(f"its KL to float32 is {drift.kl:.4f}, and max_kl={self.kl:g}")
        if self.drop is not None and not 1 - drift.agreement <= self.drop:
            said.append(
                f"it changes the first answer on {1 - drift.agreement:.1%} of the images, and "
                f"max_drop={self.drop:g}"
            )
        return " and ".join(said)


class Reference:
    """Images, and what the slimmed model keeps and answers on them in float32."""

    def __init__(self, graph: Graph, batches: Sequence[Tensor]) -> None:
        self.graph, self.batches = graph, batches
        witness = Witness(graph.model, graph.outputs).eval()
        with torch.no_grad():
            self.answers = [witness(images) for images in batches]

    def part(self, images: int) -> Reference:
        """The first batches, until there are as many images."""
        made = copy.copy(self)
        counts = [sum(map(len, self.batches[:end])) for end in range(len(self.batches))]
        batches = sum(count < images for count in counts)
        made.batches, made.answers = self.batches[:batches], self.answers[:batches]
        return made

    def measure(self, run: Runner, precision: str, recipe: str = "") -> Drift:
        """Compares a graph that tells its decisions with the model."""
        figures: list[Tensor] = []
        names = len(self.graph.outputs.names)
        for images, want in zip(self.batches, self.answers, strict=True):
            got = [torch.from_numpy(each) for each in run(images.numpy())]
            kept = self._kept_alike(got[names:], want[names:], len(images))
            theirs, ours = self._logits(got), self._logits(want)
            agree = ours.argmax(dim=1) == theirs.argmax(dim=1)
            each = [kl_divergence(ours, theirs), agree, kept, kept == 1]
            figures.append(torch.stack([figure.double() for figure in each]))
        whole = torch.cat(figures, dim=1)
        kl, agreement, shared, same = whole.mean(dim=1).tolist()
        return Drift(precision, whole.shape[1], same, kl, agreement, shared, recipe)

    def _kept_alike(self, got: Sequence[Tensor], want: Sequence[Tensor], images: int) -> Tensor:
        """For each image, the patches that both keep, as a share of those that either keeps."""
        if not want:
            return torch.ones(images)
        theirs, ours = (
            torch.cat([kept_cells(each) for each in blocks], dim=1) for blocks in (got, want)
        )
        every = (theirs | ours).sum(dim=1).clamp(min=1)
        return (theirs & ours).sum(dim=1) / every

    def judge(self, run: Runner, drift: Drift) -> Drift:
        """The same, with the answers of a graph that does not tell its decisions.

        That is the graph that is written. A runtime fuses other nodes in it, and rounds otherwise.
        """
        off, agree = [], []
        for images, want in zip(self.batches, self.answers, strict=True):
            theirs = self._logits([torch.from_numpy(each) for each in run(images.numpy())])
            ours = self._logits(want)
            off.append(kl_divergence(ours, theirs))
            agree.append((ours.argmax(dim=1) == theirs.argmax(dim=1)).double())
        kl, agreement = float(torch.cat(off).mean()), float(torch.cat(agree).mean())
        return replace(drift, kl=kl, agreement=agreement)

    def check_file(self, run: Runner, drift: Drift, limits: Limits) -> None:
        """Refuses a file that is much farther from float32 than its graph, or beyond the limits."""
        file = self.judge(run, drift)
        if not file.kl <= FARTHER * drift.kl + UNCHANGED:
            raise WrongExport(
                f"The file answers otherwise than the graph that it was written from: its KL to "
                f"float32 is {file.kl:.4f}, and the graph's is {drift.kl:.4f}. Nothing was "
                "written. Another version of the runtime may write it right; please report this "
                "one."
            )
        excess = limits.excess(file)
        if excess:
            raise WrongExport(
                f"Once it is a file in {drift.precision}, {excess}. Nothing was written. Allow "
                "more, or export in a higher precision."
            )

    def _logits(self, values: Sequence[Tensor]) -> Tensor:
        """The class scores (B, C) among the outputs."""
        named = dict(zip(self.graph.outputs.names, values, strict=False))
        scores = named.get("logits", values[0])
        if scores.ndim != 2:
            raise UnsupportedModel(
                f"This model answers with shape {tuple(scores.shape)}, not with class scores (B, "
                "C), so there is no telling what a lower precision changes. Export it in float32."
            )
        return scores
