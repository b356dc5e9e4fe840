"""Scores: how the answers of models compare with the labels and with those of the dense model.

It knows models as calls that give logits, and refuses images and answers that no score can mean
anything for. It does not know what a token is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchslim.errors import BadData, UnsupportedModel, WrongInput
from patchslim.report.row import Estimate

Batch = tuple[Tensor, Tensor | None]
Forward = Callable[[Tensor], Tensor]
Progress = Callable[[str], object]
PROGRESS_INTERVAL = 0.5  # seconds between two lines of progress
TOP_K = 5  # answers among which top-5 accuracy looks for the label
ECE_BINS = 15  # of the expected calibration error, as most papers have it


@dataclass(frozen=True)
class Score:
    """What is known of one model's answers; what needs labels is None where there were none."""

    images: int
    accuracy: Estimate | None
    change: Estimate | None
    top5: Estimate | None
    ece: float | None
    agreement: Estimate
    kl: Estimate


@dataclass
class Tally:
    """One number an image for each score, gathered batch by batch."""

    correct: list[Tensor] = field(default_factory=list)
    in_top5: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, logits: Tensor, dense: Tensor, labels: Tensor | None) -> None:
        """Takes the answers to one batch in."""
        answer = logits.argmax(dim=1)
        self.agrees.append(answer == dense.argmax(dim=1))
        self.kl.append(kl_divergence(dense, logits))
        if labels is not None:
            self.correct.append(answer == labels)
            self.confidence.append(logits.double().softmax(dim=1).amax(dim=1))
            if logits.shape[1] > TOP_K:
                self.in_top5.append(is_in_top5(logits, labels))

    def score(self, dense: Tally) -> Score:
        """The means over all images; the dense model agrees with itself by definition."""
        same = torch.cat(self.agrees)
        itself = dense is self
        change = None
        if self.correct and not itself:
            # Paired by image: most images are hard or easy for both models, and tell nothing.
            apart = torch.cat(self.correct).double() - torch.cat(dense.correct).double()
            change = Estimate.mean(apart)
        return Score(
            images=len(same),
            accuracy=Estimate.share(torch.cat(self.correct)) if self.correct else None,
            change=change,
            top5=Estimate.share(torch.cat(self.in_top5)) if self.in_top5 else None,
            ece=expected_calibration_error(torch.cat(self.confidence), torch.cat(self.correct))
            if self.correct
            else None,
            agreement=Estimate(1.0, None) if itself else Estimate.share(same),
            kl=Estimate(0.0, None) if itself else Estimate.mean(torch.cat(self.kl)),
        )


def score(
    runs: Mapping[str, Forward], batches: Iterable[Batch], *, total: int | None, say: Progress
) -> dict[str, Score]:
    """The score of each of `runs`, among which "dense" is what the others are compared with.

    Args:
        runs: calls from images to logits, by name.
        batches: images and labels, read once; every run sees a batch before the next is read.
        total: how many images there will be, where that is known.
        say: is called with one line of progress at a time.
    """
    tallies = {name: Tally() for name in runs}
    seen, said = 0, 0.0
    before: Batch | None = None
    for number, batch in enumerate(batches):
        images, labels = check_batch(batch, number)
        _check_same_kind(before, (images, labels), number)
        before = (images[:1], labels)
        seen += len(images)
        answers: dict[str, Tensor] = {}
        for name, run in runs.items():
            begun = time.perf_counter()
            answers[name] = run(images).cpu()
            tallies[name].seconds += time.perf_counter() - begun
            if time.monotonic() - said > PROGRESS_INTERVAL or seen == total:
                said = time.monotonic()
                rate = seen / max(tallies[name].seconds, 1e-9)
                of = "" if total is None else f"/{total}"
                say(f"{name}: {seen}{of} images, {rate:.0f} img/s")
        _check_answers(answers, labels, number)
        for name, logits in answers.items():
            tallies[name].add(logits, answers["dense"], None if labels is None else labels.cpu())
    return {name: tally.score(tallies["dense"]) for name, tally in tallies.items()}


def kl_divergence(dense: Tensor, slim: Tensor) -> Tensor:
    """KL(dense || slim) in nats of each image, between the softmax of logits (B, C)."""
    p, q = (logits.double().log_softmax(dim=1) for logits in (dense, slim))
    return (p.exp() * (p - q)).sum(dim=1).clamp(min=0)


def is_in_top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is among the FIRST answers; of equal ones, lower classes come first."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    return (order[:, :TOP_K] == labels[:, None]).any(dim=1)


def expected_calibration_error(sure: Tensor, right: Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): how far certainty is from accuracy.

    The images are binned by the probability `sure` (N,) of their answer, in BINS bins of equal
    width, closed at the top. In each bin the share of `right` (N,) answers is compared with the
    mean probability; the result is the mean of these gaps over images.
    """
    place = (sure * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add(0, place, right.double() - sure)
    return float(gaps.abs().sum() / len(sure))


def check_batch(batch: object, number: int) -> Batch:
    """The batch as images and labels; refused where it is no such pair, is empty or holds NaN."""
    pair = batch if isinstance(batch, Sequence) and len(batch) == 2 else (batch, None)
    images, labels = pair
    if not isinstance(images, Tensor) or pair is not batch:
        raise WrongInput(
            f"Batch {number} is a {type(batch).__name__}; each batch is a pair: images as a tensor "
            "(B, 3, H, W), and labels (B,) or None."
        )
    if images.ndim == 0 or not len(images):
        raise BadData(f"Batch {number} holds no images.")
    place = _first_nonfinite(images)
    if place is not None:
        raise WrongInput(
            f"Image {place} of batch {number} has NaN or infinite pixels. Look at how it is "
            "decoded and normalised (a standard deviation of zero?)."
        )
    return images, None if labels is None else torch.as_tensor(labels)


def _check_same_kind(before: Batch | None, now: Batch, number: int) -> None:
    """Refuses images of another size than before, and labels that come and go."""
    if before is None:
        return
    if before[0].shape[1:] != now[0].shape[1:]:
        raise WrongInput(
            f"Batch {number} has images of shape {tuple(now[0].shape[1:])}, the one before has "
            f"{tuple(before[0].shape[1:])}. One measurement is of one image size: resize them."
        )
    if (before[1] is None) != (now[1] is None):
        raise WrongInput(f"Batch {number}: give labels with all batches, or with none.")


def _check_answers(answers: Mapping[str, Tensor], labels: Tensor | None, number: int) -> None:
    """Refuses logits that are no class scores or not finite, and labels that do not fit them."""
    dense = answers["dense"]
    if dense.ndim != 2:
        raise UnsupportedModel(
            f"This host answers with shape {tuple(dense.shape)}, not with class scores (B, C), so "
            "there is nothing to score. Measure it without images to get its costs."
        )
    for name, logits in {"dense": dense, **answers}.items():
        place = _first_nonfinite(logits)
        if place is not None:
            raise WrongInput(
                f"{name} answers image {place} of batch {number} with NaN or infinite logits. "
                f"Its weights may be broken, or overflow in {logits.dtype}: try float32."
            )
    if labels is None:
        return
    classes = dense.shape[1]
    if labels.shape != (len(dense),) or labels.is_floating_point():
        raise WrongInput(
            f"Batch {number} has labels of shape {tuple(labels.shape)} and type {labels.dtype}; "
            f"give {len(dense)} whole numbers, one an image."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise WrongInput(
            f"Batch {number} has labels from {int(labels.min())} to {int(labels.max())}, and the "
            f"model has classes 0 to {classes - 1}. Map the data set's labels to the model's."
        )


def _first_nonfinite(values: Tensor) -> int | None:
    """The first image that has a value that is not finite, or None."""
    bad = ~values.isfinite().flatten(1).all(dim=1)
    return int(bad.int().argmax()) if bad.any() else None
