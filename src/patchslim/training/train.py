"""`train`: a slimmed model learns to do with fewer tokens. The one loop that every method uses.

The model that is given is not changed: it is the teacher, and a copy learns. All that is drawn
follows from the seed and the number of the step, so that a run that was stopped and resumed ends
with the weights of one that was not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchslim.data.source import Source, class_count
from patchslim.errors import BadData, BadFile, BadSetting, UnsupportedModel, WrongInput
from patchslim.hosts._answers import eval_mode
from patchslim.measurement.measure import measure
from patchslim.measurement.score import Batch
from patchslim.model.model import SlimModel
from patchslim.report.report import Report
from patchslim.runs.layout import CHECKPOINT_FILE, REPORT_FILE
from patchslim.training.augment import temporary_seed
from patchslim.training.config import TrainConfig
from patchslim.training.distributed import Processes
from patchslim.training.loader import TrainingLoader
from patchslim.training.losses import Teacher, logits_of
from patchslim.training.trainer import Progress, Trainer

MODEL_FOLDER = "model"  # where in the folder of a run the trained model lies
REPEATS = 5  # rounds of timing: it is the accuracy that has changed


@dataclass(frozen=True)
class TrainingResult:
    """What came of a course.

    Attributes:
        model: the trained model, in evaluation mode, on the CPU.
        step: the step whose weights it has: the best at a validation, else the last.
        report: the trained model beside the dense one and the untrained one; None where nothing
            was there to measure on.
        unreadable: the training images that could not be read, and were replaced by others.
    """

    model: SlimModel
    step: int
    report: Report | None
    unreadable: tuple[str, ...]


def train(  # noqa: PLR0913 (one word for each thing that a training run is made of)
    slimmed: SlimModel,
    images: Source | Sequence[Batch],
    course: TrainConfig | None = None,
    *,
    out: str | Path,
    validation: Iterable[Batch] | None = None,
    teacher: nn.Module | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> TrainingResult:
    """A copy of `slimmed` that has learned on `images`; written, with logs, into the folder `out`.

    Args:
        slimmed: the model, which stays as it is.
        images: `Images`, `Dataset` or `Shards`, or a list of batches that are prepared already.
        course: how to train; by default as usual for the method.
        out: takes model/, checkpoint.pt, log.csv and report.json.
        validation: batches to validate and to report on, other than `images`.
        teacher: whose answers are learned; by default the untouched host.
        resume: goes on with the run in `out`, where it was stopped.
        tensorboard: writes event files too.
        progress: is called with one line of text at a time.

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    if not isinstance(slimmed, SlimModel):
        kind = type(slimmed).__name__
        raise UnsupportedModel(f"train() takes a slimmed model, not {kind}: patchslim.slim(...).")
    course = course or TrainConfig.of(slimmed.method.training_defaults, {})
    out, say = Path(out).expanduser().resolve(), progress or (lambda _: None)
    validation = None if validation is None else _check_reusable(validation)
    check_new_folder(out, resume=resume)
    check_layers(slimmed, course)
    with Processes.connect() as crew:
        feed = TrainingLoader(images, course, rank=crew.rank, world=crew.world)
        crew.check_same_settings({**course.to_json(), "resume": resume, "images": feed.count})
        check_labels(slimmed, images, course)
        taught_by = None
        if course.needs_teacher:
            taught_by = Teacher(choose_teacher(slimmed, teacher, course), course)
        run = Trainer(slimmed, taught_by, feed, course, crew, out)
        # What the caller draws afterwards does not depend on what was drawn here.
        with distillation_mode(run.student.host, course), temporary_seed(course.seed):
            # The weights, whole, are in the first process alone until now.
            best = crew.broadcast(
                run.fit(validation, resume=resume, tensorboard=tensorboard, say=say)
            )
        model = run.build_model(best.state)
        model.trained = run.training_record(best.step)
        report = None
        if crew.is_first:
            model.save(out / MODEL_FOLDER)
            report = _write_report(slimmed, model, validation, out, say)
        crew.barrier()
    return TrainingResult(model, best.step, report, tuple(feed.unreadable))


def check_labels(slimmed: SlimModel, images: Source | Sequence[Batch], course: TrainConfig) -> None:
    """Refuses labels that are missing, all alike, or none of the host's."""
    if not course.labels:
        if not course.needs_teacher:
            raise BadSetting("labels=0 and distil='none': there is nothing left to learn from.")
        return
    found = _collect_labels(images)
    if not found:
        raise BadData(
            "The images have no labels that are the model's. Learn from the teacher alone "
            "(labels=0, --labels 0), or give labels (class folders; classes=, --classes)."
        )
    if len(found) == 1:
        raise BadData(
            f"All images have the label {min(found)}; of one class nothing can be learned. Give "
            "images of several classes, or learn from the teacher alone (labels=0, --labels 0)."
        )
    known = class_count(slimmed)
    if min(found) < 0 or (known is not None and max(found) >= known):
        raise WrongInput(
            f"The labels run from {min(found)} to {max(found)}, and the model has classes 0 to "
            f"{(known or 0) - 1}. Map the labels of the data to the model's (classes=, --classes)."
        )


def check_layers(slimmed: SlimModel, course: TrainConfig) -> None:
    """Refuses selection in every block where it would remove a share of what is left each time."""
    if not course.layered:
        return
    if not slimmed.method.defers:
        raise BadSetting(
            f"layered={course.layered:g} is for methods whose patches wait and come back (evo); "
            f"{type(slimmed.method).__name__} would remove a share in every block. Use layered=0 "
            "(--layered 0), or shrink."
        )
    slimmed.schedule.in_every_block(slimmed.plan.shape.depth, slimmed.plan.shape.resets)


def choose_teacher(slimmed: SlimModel, teacher: nn.Module | None, course: TrainConfig) -> nn.Module:
    """The model to learn from, after making sure that its answers mean the same classes."""
    host = slimmed.host
    if teacher is None:
        if slimmed.trained is not None:
            raise UnsupportedModel(
                "This model was trained before, if only by calibrate, so its host is not the dense "
                "model any more. Say whom to learn from: teacher=, --teacher; or distil='none'."
            )
        return copy.deepcopy(host)
    if isinstance(teacher, SlimModel) and course.tokens:
        raise UnsupportedModel("tokens= needs a dense teacher; give the SlimModel's .host.")
    parameter = next(host.parameters())
    image = torch.zeros(1, *slimmed.plan.adapter.describe(host).image_shape, dtype=parameter.dtype)
    with eval_mode(host), eval_mode(teacher), torch.no_grad():
        own = logits_of(slimmed.plan.adapter.logits(host(image.to(parameter.device))))
        other = logits_of(teacher(image.to(next(teacher.parameters()).device)))
    if own.shape != other.shape:
        raise UnsupportedModel(
            f"The teacher tells {other.shape[1]} classes apart and the model {own.shape[1]}: its "
            "answers mean something else. Give a teacher that was trained on the same classes."
        )
    return copy.deepcopy(teacher)


def check_new_folder(out: Path, *, resume: bool) -> None:
    """Refuses to begin where another run lies."""
    if not resume and (out / CHECKPOINT_FILE).exists():
        raise BadFile(
            f"{out} holds a run already. Go on with it (resume=True, --resume), or give another "
            "folder."
        )


class distillation_mode:  # noqa: N801 (it reads as the state that it is)
    """While it lasts, a distilled timm host answers its teacher by a head of its own."""

    def __init__(self, host: nn.Module, course: TrainConfig) -> None:
        self.switch: Callable[[bool], object] | None = None
        if course.distil == "token":
            self.switch = getattr(host, "set_distilled_training", None)
            if self.switch is None:
                raise BadSetting(
                    f"distil='token' needs a host with a distillation token and a head for it, "
                    f"such as deit_tiny_distilled_patch16_224; this is a {type(host).__name__}. "
                    "Use 'soft' or 'hard'."
                )

    def __enter__(self) -> None:
        if self.switch is not None:
            self.switch(True)

    def __exit__(self, *_: object) -> None:
        if self.switch is not None:
            self.switch(False)


def _collect_labels(images: Source | Sequence[Batch]) -> set[int]:
    """All labels there are."""
    if isinstance(images, Source):
        found = [images.label_of(place) for place in range(images.count)]
        return {label for label in found if label is not None}
    return {int(each) for _, labels in images if labels is not None for each in labels}


def _check_reusable(validation: Iterable[Batch]) -> Iterable[Batch]:
    """Batches that can be read more than once."""
    if iter(validation) is validation:
        raise WrongInput(
            "validation= is read several times, and an iterator can be read once; give a list or "
            "an Images."
        )
    return validation


def _write_report(
    slimmed: SlimModel, model: SlimModel, validation: Any, out: Path, say: Progress
) -> Report:
    """The trained model beside the dense one and the untrained one."""
    there = next(slimmed.host.parameters()).device
    models = {"untrained": slimmed, "trained": copy.deepcopy(model).to(there)}
    report = measure(models, validation, dense=slimmed.host, repeats=REPEATS, progress=say)
    report = replace(report, title=f"{report.title}, trained")
    report.save(out / REPORT_FILE)
    return report
