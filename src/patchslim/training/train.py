"""`train`: trains a slimmed model to work with fewer tokens. Every method is trained by it.

The model that is given is not changed. Its host is the teacher, and a copy learns. All random
numbers follow from the seed and the number of the step. So a run that was stopped and resumed ends
with the same weights as one that was not.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchslim.data.source import Source, class_count
from patchslim.errors import BadData, BadFile, BadSetting, UnsupportedModel, WrongInput
from patchslim.hosts._answers import eval_mode
from patchslim.hosts._weights import check_plain
from patchslim.measurement.measure import measure
from patchslim.measurement.score import Batch, check_batches
from patchslim.model.model import SlimModel, name_slimmed_part
from patchslim.report.report import Report
from patchslim.runs.layout import MODEL_FOLDER, REPORT_FILE, resolve_run_folder
from patchslim.runs.ownership import own_folder
from patchslim.runs.progress import Progress, check_progress
from patchslim.saving.folder import check_saveable
from patchslim.settings import check_type
from patchslim.training.augment import temporary_seed
from patchslim.training.config import TrainConfig
from patchslim.training.distributed import Processes
from patchslim.training.loader import TrainingLoader
from patchslim.training.losses import Teacher, logits_of
from patchslim.training.trainer import Trainer

REPEATS = 5  # rounds of timing in the report: few, since training changes the accuracy alone


@dataclass(frozen=True)
class TrainingResult:
    """What a training run produced.

    Attributes:
        model: the trained model, in evaluation mode, on the CPU.
        step: the step whose weights it has: the best one that was validated, else the last.
        report: the trained model beside the dense one and the untrained one. None in all processes
            but the first.
        unreadable: the training images that could not be read and were replaced by others.
    """

    model: SlimModel
    step: int
    report: Report | None
    unreadable: tuple[str, ...]


def train(  # noqa: PLR0913 (one word for each thing that a training run is made of)
    slimmed: SlimModel,
    images: Source | Sequence[Batch],
    config: TrainConfig | None = None,
    *,
    out: str | Path,
    validation: Iterable[Batch] | None = None,
    teacher: nn.Module | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> TrainingResult:
    """Trains a copy of `slimmed` on images, and writes it, with logs, into a folder.

    Args:
        slimmed: the model, which is not changed.
        images: `Images`, `Dataset` or `Shards`, or a list of batches that are prepared already.
        config: how to train; by default as is usual for the method.
        out: the folder for model/, checkpoint.pt, log.csv and report.json.
        validation: batches to validate and report on, other than `images`.
        teacher: the model whose answers are learned; by default the untouched host.
        resume: continues the run in `out` from its checkpoint.
        tensorboard: whether to write event files for TensorBoard too.
        progress: is called with one line of text at a time.

    Raises:
        PatchslimError: with what was given, what is needed and the cure.
    """
    if not isinstance(slimmed, SlimModel):
        kind, inner = type(slimmed).__name__, name_slimmed_part(slimmed)
        cure = f"give {inner}" if inner else "patchslim.slim(...)"
        raise UnsupportedModel(f"train() takes a slimmed model, not {kind}: {cure}.")
    check_plain(slimmed, "trained")
    if config is None:
        config = TrainConfig.of(slimmed.method.training_defaults, {})
    check_type("config", config, TrainConfig, "Give a patchslim.TrainConfig, or leave it out.")
    check_batches("images", images)
    for name, value in (("resume", resume), ("tensorboard", tensorboard)):
        check_type(name, value, bool, "Give True or False.")
    if teacher is not None:
        check_type("teacher", teacher, nn.Module, "Give a torch.nn.Module.", UnsupportedModel)
    progress = check_progress(progress)
    validation = None if validation is None else _check_reusable(validation)
    folder = resolve_run_folder(out, kind="run", resume=resume)
    check_saveable(folder / MODEL_FOLDER)
    check_layers(slimmed, config)
    with Processes.connect() as processes, own_for_all(processes, folder):
        resolve_run_folder(out, kind="run", resume=resume)  # nobody can begin one there any more
        loader = TrainingLoader(images, config, rank=processes.rank, world=processes.world)
        processes.check_same_settings(
            {**config.to_json(), "resume": resume, "images": loader.count}
        )
        check_labels(slimmed, images, config)
        check_first_batch(slimmed, images)
        chosen = None
        if config.needs_teacher:
            chosen = Teacher(choose_teacher(slimmed, teacher, config), config)
        trainer = Trainer(slimmed, chosen, loader, config, processes, folder)
        # The caller's random numbers afterwards do not depend on those drawn in training.
        with distillation_mode(trainer.student.host, config), temporary_seed(config.seed):
            best = trainer.fit(
                validation, resume=resume, tensorboard=tensorboard, progress=progress
            )
            # Until now only the first process has the complete weights.
            best = processes.broadcast(best)
        model = trainer.build_model(best.state)
        model.trained = trainer.training_record(best.step)
        report = None
        if processes.is_first:
            model.save(folder / MODEL_FOLDER)
            report = _write_report(slimmed, model, validation, folder, progress)
            model.save(folder / MODEL_FOLDER, results=report)
        processes.barrier()
    return TrainingResult(model, best.step, report, tuple(loader.unreadable))


@contextlib.contextmanager
def own_for_all(processes: Processes, folder: Path) -> Iterator[None]:
    """Within the block, the first process owns the folder; where it is refused, all processes are.

    Raises:
        BadFile: somebody else writes into the folder.
    """
    with contextlib.ExitStack() as owned:
        refusal = None
        if processes.is_first:
            try:
                owned.enter_context(own_folder(folder))
            except BadFile as error:
                refusal = str(error)
        refusal = processes.broadcast(refusal)
        if refusal is not None:
            raise BadFile(refusal)
        yield


def check_first_batch(slimmed: SlimModel, images: Source | Sequence[Batch]) -> None:
    """Refuses prepared batches that the model cannot take; those of a `Source` are made for it."""
    if not isinstance(images, Source):
        first = images[0][0][:1]
        with torch.no_grad():
            device = next(slimmed.host.parameters()).device
            slimmed.start_pass().embed(first.to(device), {}, track=False)


def check_labels(slimmed: SlimModel, images: Source | Sequence[Batch], config: TrainConfig) -> None:
    """Refuses labels that are missing, all the same, or not among the model's classes."""
    if not config.labels:
        if not config.needs_teacher:
            raise BadSetting("labels=0 and distil='none': there is nothing left to learn from.")
        return
    labels = _collect_labels(images)
    if not labels:
        raise BadData(
            "The images have no labels that are the model's. Learn from the teacher alone "
            "(labels=0, --labels 0), or give labels (class folders; classes=, --classes)."
        )
    if len(labels) == 1:
        raise BadData(
            f"All images have the label {min(labels)}; of one class nothing can be learned. Give "
            "images of several classes, or learn from the teacher alone (labels=0, --labels 0)."
        )
    classes = class_count(slimmed)
    if min(labels) < 0 or (classes is not None and max(labels) >= classes):
        raise WrongInput(
            f"The labels run from {min(labels)} to {max(labels)}, and the model has classes 0 to "
            f"{(classes or 0) - 1}. Map the labels of the data to the model's (classes=, "
            "--classes)."
        )


def check_layers(slimmed: SlimModel, config: TrainConfig) -> None:
    """Refuses `layered` for a method whose removed patches do not come back.

    Selecting in every block would then remove a share of the remaining patches each time.
    """
    if not config.layered:
        return
    if not slimmed.method.defers:
        raise BadSetting(
            f"layered={config.layered:g} is for methods whose patches wait and come back (evo); "
            f"{type(slimmed.method).__name__} would remove a share in every block. Use layered=0 "
            "(--layered 0), or shrink."
        )
    slimmed.schedule.in_every_block(slimmed.plan.shape.depth, slimmed.plan.shape.resets)


def choose_teacher(slimmed: SlimModel, teacher: nn.Module | None, config: TrainConfig) -> nn.Module:
    """Returns a copy of the model to learn from, which has to know the same number of classes.

    Raises:
        UnsupportedModel: the teacher does not fit, or one has to be given and was not.
    """
    host = slimmed.host
    if teacher is None:
        if slimmed.trained is not None:
            raise UnsupportedModel(
                "This model was trained before, if only by calibrate, so its host is not the dense "
                "model any more. Say whom to learn from: teacher=, --teacher; or distil='none'."
            )
        return copy.deepcopy(host)
    if isinstance(teacher, SlimModel) and config.tokens:
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


@contextlib.contextmanager
def distillation_mode(host: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Within the block, and with distil="token", timm's distilled host returns both its heads.

    Raises:
        BadSetting: distil="token", and the host has no second head.
    """
    if config.distil != "token":
        yield
        return
    switch: Callable[[bool], object] | None = getattr(host, "set_distilled_training", None)
    if switch is None:
        raise BadSetting(
            f"distil='token' needs a host with a distillation token and a head for it, such as "
            f"deit_tiny_distilled_patch16_224; this is a {type(host).__name__}. Use 'soft' or "
            "'hard'."
        )
    switch(True)
    try:
        yield
    finally:
        switch(False)


def _collect_labels(images: Source | Sequence[Batch]) -> set[int]:
    """Returns all labels that occur."""
    if isinstance(images, Source):
        labels = (images.label_of(index) for index in range(images.count))
        return {label for label in labels if label is not None}
    return {int(each) for _, labels in images if labels is not None for each in labels}


def _check_reusable(validation: Iterable[Batch]) -> Iterable[Batch]:
    """Returns the batches, and refuses those that can be read only once."""
    check_batches("validation", validation)
    if isinstance(validation, Sequence) and not validation:
        raise BadData("There are no images to validate on: the list of batches is empty.")
    if iter(validation) is validation:
        raise WrongInput(
            "validation= is read several times, and an iterator can be read once; give a list or "
            "an Images."
        )
    return validation


def _write_report(
    slimmed: SlimModel, model: SlimModel, validation: Any, out: Path, progress: Progress
) -> Report:
    """Measures the trained model beside the dense and the untrained one, and saves the report."""
    device = next(slimmed.host.parameters()).device
    models = {"untrained": slimmed, "trained": copy.deepcopy(model).to(device)}
    report = measure(models, validation, dense=slimmed.host, repeats=REPEATS, progress=progress)
    report = replace(report, title=f"{report.title}, trained")
    report.save(out / REPORT_FILE)
    return report
