"""Scores models: compares their answers with the labels and with the dense model's answers.

A model is any function from images to logits here; what a token is, this file does not know.
Images and answers for which no score would mean anything (NaN, say) are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from patchslim.errors import BadData, UnsupportedModel, WrongInput
from patchslim.model.images import check_no_path, check_readable
from patchslim.report.row import Estimate, WorstClass
from patchslim.runs.progress import Progress
from patchslim.settings import check_type

Batch = tuple[Tensor, Tensor | None]
Forward = Callable[[Tensor], Tensor]
PROGRESS_INTERVAL = 0.5  # seconds between two lines of progress
TOP_K = 5
ECE_BINS = 15  # of the expected calibration error, as in most papers
FEWEST_OF_CLASS = 5  # images of a class that say something about it


@dataclass(frozen=True)
class Score:
    """Scores of one model.

    Those that need labels are None without labels, and those that compare with the dense model are
    None if there was none.
    """

    images: int
    accuracy: Estimate | None
    change: Estimate | None
    top5: Estimate | None
    ece: float | None
    agreement: Estimate | None
    kl: Estimate | None
    lost: Estimate | None = None
    won: Estimate | None = None
    worst: WorstClass | None = None


@dataclass
class Tally:
    """Collects one number per image for each score, batch by batch.

    Tallies of parts of the images, put together in their order, give the same scores to the last
    digit.
    """

    labels: list[Tensor] = field(default_factory=list)
    correct: list[Tensor] = field(default_factory=list)
    in_top5: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0

    def add(self, logits: Tensor, dense: Tensor | None, labels: Tensor | None) -> None:
        """Adds the answers to one batch."""
        answer = logits.argmax(dim=1)
        self.images += len(answer)
        if dense is not None:
            self.agrees.append(answer == dense.argmax(dim=1))
            self.kl.append(kl_divergence(dense, logits))
        if labels is not None:
            self.labels.append(labels)
            self.correct.append(answer == labels)
            self.confidence.append(logits.double().softmax(dim=1).amax(dim=1))
            if logits.shape[1] > TOP_K:
                self.in_top5.append(is_in_top5(logits, labels))

    def score(self, dense: Tally | None) -> Score:
        """Computes the scores over all images; the dense model agrees with itself by definition."""
        is_dense = dense is self
        change = agreement = kl = lost = won = worst = None
        if is_dense:
            agreement, kl = Estimate(1.0, None), Estimate(0.0, None)
        elif dense is not None:
            agreement = Estimate.share(torch.cat(self.agrees))
            kl = Estimate.mean(torch.cat(self.kl))
        if self.correct and dense is not None and not is_dense:
            # Paired by image: most images are easy for both models, or hard for both, and cancel.
            ours, theirs = torch.cat(self.correct), torch.cat(dense.correct)
            change = Estimate.mean(ours.double() - theirs.double())
            lost, won = Estimate.share(theirs & ~ours), Estimate.share(ours & ~theirs)
            worst = find_worst_class(torch.cat(self.labels), theirs, ours)
        return Score(
            images=self.images,
            accuracy=Estimate.share(torch.cat(self.correct)) if self.correct else None,
            change=change,
            top5=Estimate.share(torch.cat(self.in_top5)) if self.in_top5 else None,
            ece=expected_calibration_error(torch.cat(self.confidence), torch.cat(self.correct))
            if self.correct
            else None,
            agreement=agreement,
            kl=kl,
            lost=lost,
            won=won,
            worst=worst,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns one tensor for each kind of number, with one value an image."""
        return {name: torch.cat(getattr(self, name)) for name in _TALLIED if getattr(self, name)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Tally:
        """Makes the tally that `to_tensors` was called of."""
        made = cls(images=len(next(iter(tensors.values()), ())))
        for name, each in tensors.items():
            if name in _TALLIED:
                getattr(made, name).append(each)
        return made


_TALLIED = tuple(each.name for each in fields(Tally) if each.default_factory is list)


def score(
    forwards: Mapping[str, Forward],
    batches: Iterable[Batch],
    *,
    total: int | None,
    progress: Progress,
) -> dict[str, Score]:
    """Scores each of `forwards`, as `tally` collects their answers."""
    tallies = tally(forwards, batches, total=total, progress=progress)
    return {name: each.score(tallies.get("dense")) for name, each in tallies.items()}


def tally(
    forwards: Mapping[str, Forward],
    batches: Iterable[Batch],
    *,
    total: int | None,
    progress: Progress,
) -> dict[str, Tally]:
    """Collects the answers of each of `forwards`; "dense" is what others are compared with.

    Args:
        forwards: functions from images to logits, by name.
        batches: images and labels, read once; all models see a batch before the next is read.
        total: how many images there will be, if that is known.
        progress: is called with one line of text at a time.
    """
    tallies = {name: Tally() for name in forwards}
    seen, shown = 0, 0.0
    before: Batch | None = None
    for number, batch in enumerate(batches):
        images, labels = check_batch(batch, number)
        _check_same_kind(before, (images, labels), number)
        before = (images[:1], labels)
        seen += len(images)
        answers: dict[str, Tensor] = {}
        for name, forward in forwards.items():
            start = time.perf_counter()
            answers[name] = forward(images).cpu()
            tallies[name].seconds += time.perf_counter() - start
            if time.monotonic() - shown > PROGRESS_INTERVAL or seen == total:
                shown = time.monotonic()
                rate = seen / max(tallies[name].seconds, 1e-9)
                of = "" if total is None else f"/{total}"
                progress(f"{name}: {seen}{of} images, {rate:.0f} img/s")
        _check_answers(answers, labels, number)
        for name, logits in answers.items():
            known = None if labels is None else labels.cpu()
            tallies[name].add(logits, answers.get("dense"), known)
    return tallies


def kl_divergence(dense: Tensor, slim: Tensor) -> Tensor:
    """Returns KL(dense || slim) of each image in nats, from logits (B, C)."""
    p, q = (logits.double().log_softmax(dim=1) for logits in (dense, slim))
    return (p.exp() * (p - q)).sum(dim=1).clamp(min=0)


def is_in_top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each label is among the first TOP_K answers; of equal logits the lower class wins."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    return (order[:, :TOP_K] == labels[:, None]).any(dim=1)


def expected_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Returns the expected calibration error (Guo et al. 2017, eq. 3).

    Images are put into ECE_BINS bins of equal width by the probability of their answer,
    `confidence` (N,); a bin includes its upper end. In each bin the share of `correct` (N,)
    answers is compared with the mean confidence. The result is the mean of these gaps over images.
    """
    bins = (confidence * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, correct.double() - confidence)
    return float(gaps.abs().sum() / len(confidence))


def find_worst_class(labels: Tensor, dense: Tensor, correct: Tensor) -> WorstClass | None:
    """Finds the class that loses most accuracy; None if every class has too few images.

    Of classes that lose the same share, the one with the most images is returned.

    Args:
        labels: the class of each image (N,).
        dense: whether the dense model reads it right.
        correct: whether this model does.
    """
    worst: WorstClass | None = None
    for label in labels.unique().tolist():
        mine = labels == label
        count = int(mine.sum())
        if count < FEWEST_OF_CLASS:
            continue
        now = WorstClass(
            int(label),
            count,
            float(dense[mine].double().mean()),
            float(correct[mine].double().mean()),
        )
        order = (now.dense - now.accuracy, now.images)
        if worst is None or order > (worst.dense - worst.accuracy, worst.images):
            worst = now
    return worst


def check_batch(batch: object, number: int) -> Batch:
    """Returns images and labels of a batch; refuses one that is no pair, is empty or has NaN."""
    pair = batch if isinstance(batch, Sequence) and len(batch) == 2 else (batch, None)
    images, labels = pair
    if not isinstance(images, Tensor) or pair is not batch:
        raise WrongInput(
            f"Batch {number} is a {type(batch).__name__}; each batch is a pair: images as a tensor "
            "(B, 3, H, W), and labels (B,) or None."
        )
    check_readable(images, f"Batch {number}")
    if images.ndim == 0 or not len(images):
        raise BadData(f"Batch {number} holds no images.")
    index = _first_nonfinite(images)
    if index is not None:
        raise WrongInput(
            f"Image {index} of batch {number} has NaN or infinite pixels. Look at how it is "
            "decoded and normalised (a standard deviation of zero?)."
        )
    return images, None if labels is None else as_labels(labels, number)


def as_labels(labels: object, number: int) -> Tensor:
    """The labels of a batch as a tensor."""
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise WrongInput(
            f"Batch {number} has labels of type {type(labels).__name__}: give whole numbers, one "
            "an image, or None."
        ) from error


def check_batches(name: str, images: object) -> None:
    """Refuses what gives no batches, one after the other."""
    cure = "Give batches: [(images, labels)], or [(images, None)]; or Images, a Dataset or Shards."
    check_no_path(name, images)
    if isinstance(images, Tensor | Mapping | bytes | set | nn.Module):
        raise WrongInput(f"{name} is one {type(images).__name__}. {cure}")
    check_type(name, images, Iterable, cure, WrongInput)


def _check_same_kind(before: Batch | None, now: Batch, number: int) -> None:
    """Refuses images of another size than before, and labels in some batches only."""
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
    """Refuses answers that are not finite class scores, and labels that do not fit them."""
    first = answers.get("dense", next(iter(answers.values())))
    if first.ndim != 2:
        raise UnsupportedModel(
            f"This host answers with shape {tuple(first.shape)}, not with class scores (B, C), so "
            "there is nothing to score. Measure it without images to get its costs."
        )
    for name, logits in answers.items():
        index = _first_nonfinite(logits)
        if index is not None:
            raise WrongInput(
                f"{name} answers image {index} of batch {number} with NaN or infinite logits. "
                f"Its weights may be broken, or overflow in {logits.dtype}: try float32."
            )
    if labels is None:
        return
    classes = first.shape[1]
    if labels.shape != (len(first),) or labels.is_floating_point():
        raise WrongInput(
            f"Batch {number} has labels of shape {tuple(labels.shape)} and type {labels.dtype}; "
            f"give {len(first)} whole numbers, one an image."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise WrongInput(
            f"Batch {number} has labels from {int(labels.min())} to {int(labels.max())}, and the "
            f"model has classes 0 to {classes - 1}. Map the data set's labels to the model's."
        )


def _first_nonfinite(values: Tensor) -> int | None:
    """Returns the index of the first image with NaN or an infinite value, or None."""
    bad = ~values.isfinite().flatten(1).all(dim=1)
    return int(bad.int().argmax()) if bad.any() else None
