"""Checks an artefact against the model that it was made of: answers, and what becomes of patches.

Which patches each deciding block keeps, and which it merges into which, is compared block by block.
Where it differs, the model is run again, in float64 too, on images with a little noise and with
random rounding. If that moves the same patches, the decision was a near tie, which the rounding of
another runtime may decide otherwise, too. If not, the graph is wrong. Other near ties no block
tells: in a written file, which rounds otherwise than the graph that tells them, or within a method.
There, noise and rounding have to move the model's own answer as far.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from patchslim.deployment.drift import Drift
from patchslim.deployment.graph import Graph, Outputs, Witness, kept_cells
from patchslim.deployment.rounding import RandomRounding
from patchslim.deployment.target import Runner
from patchslim.errors import UnsupportedModel, WrongExport

TOLERANCE = 1e-4  # how far an answer may be off, as a share of the largest (at least of 1)
NOISE = 1e-5  # of the noise that finds near ties, as a share of the largest pixel
# Of a dozen patches that show the same, each has to come up in a draw of that noise. Images for
# which all have are left out of the next turn. Few may go on after enough draws, lest a wrong
# graph take minutes.
TURNS, DRAWS, ENOUGH_DRAWS, FEW_IMAGES = 8, 16, 64, 4
AS_FAR = 2.0  # times what noise moves an answer at most, one that is off is near a tie


@dataclass(frozen=True)
class Check:
    """What a check of an artefact has found.

    Attributes:
        images: how many images were run.
        compared: on how many of them answers were compared: all but those of which the answer is
            off and a near tie is the reason.
        largest_difference: between its answers and the model's, over the images compared.
        near_ties: for each block with a near tie that went the other way, on how many images.
        hidden_ties: on how many other images an answer is off, and noise moves the model's as far.
        drift: what the precision of the artefact changes, if it is lower than float32. The figures
            above then are of the same graph in float32.
    """

    images: int
    compared: int
    largest_difference: float
    near_ties: dict[int, int] = field(default_factory=dict)
    hidden_ties: int = 0
    drift: Drift | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, as it stands in the card."""
        ties = {str(block): count for block, count in self.near_ties.items()}
        facts: dict[str, Any] = {
            "images": self.images,
            "compared": self.compared,
            "largest_difference": self.largest_difference,
            "near_ties": ties,
            "hidden_ties": self.hidden_ties,
        }
        return facts if self.drift is None else {**facts, "drift": self.drift.to_json()}

    def __str__(self) -> str:
        """One sentence."""
        ties = sum(self.near_ties.values()) + self.hidden_ties
        told = f"; near ties went the other way on {ties} of {self.images}" if ties else ""
        told += "" if self.drift is None else f" (in float32); {self.drift}"
        return (
            f"answers equal to {self.largest_difference:.1e} on {self.compared} images, with the "
            f"same tokens in every block{told}"
        )


def check_graph(run: Runner, graph: Graph, batches: Sequence[Tensor]) -> Check:
    """Compares a converted graph that tells what stands for each cell with the model, on images.

    Raises:
        WrongExport: with the first block that decides otherwise, or how far answers are off.
    """
    model, names = graph.model, graph.outputs.names
    blocks = model.plan.decision_blocks
    witness = Witness(model, graph.outputs).eval()
    differences: list[float] = []
    count, ties, hidden = 0, dict.fromkeys(blocks, 0), 0
    for images in batches:
        got = [torch.from_numpy(each) for each in run(images.numpy())]
        with torch.no_grad():
            want = witness(images)
        if any(len(each) != len(images) for each in want):
            raise UnsupportedModel(
                f"{type(graph.model.host).__name__} lays the rows of all images in one, and the "
                "answers of a graph are compared by image. Export another encoder, or call this "
                "one in PyTorch."
            )
        same = torch.ones(len(images), dtype=torch.bool)
        told = zip(blocks, got[len(names) :], want[len(names) :], strict=True)
        for block, theirs, ours in told:
            differs = same & (theirs != ours).any(dim=1)
            if differs.any():
                _check_near_ties(graph, block, images[differs], theirs[differs], ours[differs])
            ties[block] += int(differs.sum())
            same &= ~differs
        answers = want[: len(names)]
        off = measure_differences(got[: len(names)], answers)
        tied = same & _near_hidden_ties(graph, images, answers, off)
        hidden += int(tied.sum())
        # Where patches are alike, a tie may go either way and the answer be the same.
        differences += off[(same & ~tied) | (off <= TOLERANCE)].tolist()
        count += len(images)
    near_ties = {block: number for block, number in ties.items() if number}
    worst = max(differences, default=0.0)
    found = Check(count, len(differences), worst, near_ties, hidden)
    _check_answers(found)
    return found


def check_answers(
    run: Runner, graph: Graph, batches: Sequence[Tensor], outputs: Outputs, found: Check
) -> Check:
    """Compares what a written artefact answers with what a call of the model returns.

    Where decisions differ cannot be told here, so as many of the worst images as there were of
    those are left out, and those near hidden ties.
    """
    each, hidden = [], 0
    for images in batches:
        got = [torch.from_numpy(value) for value in run(images.numpy())]
        with torch.no_grad():
            want = outputs.flatten(graph.model(images))
        off = measure_differences(got, want)
        tied = _near_hidden_ties(graph, images, want, off)
        hidden += int(tied.sum())
        each += off[~tied].tolist()
    known = found.images - found.compared
    kept = sorted(each)[: len(each) - max(0, known - hidden)]
    checked = replace(
        found,
        compared=found.compared - max(0, hidden - known),
        largest_difference=max([found.largest_difference, *kept]),
        hidden_ties=found.hidden_ties + max(0, hidden - known),
    )
    _check_answers(checked)
    return checked


def measure_differences(got: Sequence[Tensor], want: Sequence[Tensor]) -> Tensor:
    """How far the answers for each image are off (B,), as a share of the largest (at least of 1).

    It is infinite for answers that are not numbers, or that have another shape.
    """
    off = torch.zeros(len(want[0]), dtype=torch.float64)
    for theirs, ours in zip(got, want, strict=True):
        if theirs.shape != ours.shape:
            return torch.full_like(off, torch.inf)
        if ours.numel():
            scale = ours.double().abs().flatten(1).amax(dim=1).clamp(min=1)
            difference = (theirs.double() - ours.double()).abs().flatten(1).amax(dim=1) / scale
            off = off.maximum(difference.nan_to_num(torch.inf, posinf=torch.inf))
    return off


def _check_answers(found: Check) -> None:
    """Refuses answers that are off, and a check that could compare none."""
    if not found.compared:
        raise WrongExport(
            f"All {found.images} images meet near ties{_name_blocks(found)}, which this "
            "runtime decides otherwise, so that no answer could be compared. Random weights, and a "
            "method before its training or calibration, decide by lot: load weights, train it, or "
            "give images= of your own (--data)."
        )
    if not found.largest_difference <= TOLERANCE:
        raise WrongExport(
            f"The converted model keeps the same tokens as yours and answers otherwise, by "
            f"{found.largest_difference:.1e} ({TOLERANCE:g} is allowed). Nothing was written. "
            "Another version of the runtime may convert it right; please report this one."
        )


def _name_blocks(found: Check) -> str:
    """Names the blocks with near ties, if they are known."""
    return f" in blocks {[*found.near_ties]}" if found.near_ties else ""


def _check_near_ties(
    graph: Graph, block: int, images: Tensor, theirs: Tensor, ours: Tensor
) -> None:
    """Refuses what stands for other cells than in the model, unless noise moves the same ones."""
    sure = theirs != ours
    for turn in range(TURNS):
        unexplained = sure.any(dim=1)
        if turn * DRAWS >= ENOUGH_DRAWS and unexplained.sum() > FEW_IMAGES:
            break  # a wrong graph
        for (stands,) in _run_with_noise(graph, images[unexplained], seed=turn, last=block):
            sure[unexplained] &= stands == ours[unexplained]
        if not sure.any():
            return
    does = "keeps" if (sure & (kept_cells(theirs) != kept_cells(ours))).any() else "merges"
    raise WrongExport(
        f"Block {block} of the converted model is the first that {does} other patches than yours: "
        f"{int(sure.sum(dim=1).max())} of them on {int(sure.any(dim=1).sum())} images, and neither "
        "noise nor rounding moves them. Nothing was written. Another version of the runtime may "
        "convert it right; please report this one."
    )


def _near_hidden_ties(
    graph: Graph, images: Tensor, answers: Sequence[Tensor], off: Tensor
) -> Tensor:
    """For which images an answer is off, and noise moves the model's own as far (B,)."""
    wrong = off > TOLERANCE
    if not wrong.any():
        return wrong
    own, moved = [each[wrong] for each in answers], torch.zeros_like(off[wrong])
    for returned in _run_with_noise(graph, images[wrong]):
        moved = moved.maximum(measure_differences(returned[: len(own)], own))
        if (off[wrong] <= AS_FAR * moved).all():
            break
    return wrong.masked_scatter(wrong, off[wrong] <= AS_FAR * moved)


def _run_with_noise(
    graph: Graph, images: Tensor, seed: int = 0, last: int | None = None
) -> Iterator[Sequence[Tensor]]:
    """Yields what the model does to images with noise, rounding at random in both precisions.

    Up to the `last` block only, if one is given.
    """
    # In float32, too: there, differences below its resolution are ties that float64 does not have.
    models = (copy.deepcopy(graph.model).double(), graph.model)
    witnesses = [Witness(each, graph.outputs, last=last).eval() for each in models]
    noise = torch.Generator().manual_seed(seed)
    images = images.double()
    size = NOISE * float(images.abs().max())
    for _ in range(DRAWS):
        drawn = images + size * torch.randn(images.shape, generator=noise, dtype=torch.float64)
        for witness, dtype in zip(witnesses, (torch.float64, torch.float32), strict=True):
            with torch.no_grad(), RandomRounding(noise):
                returned = witness(drawn.to(dtype))
            yield returned
