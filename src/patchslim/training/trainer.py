"""`Trainer`: runs the steps of a training, with checkpoints, validation and a log.

It can continue a run that was stopped. The losses are in `losses.py`, the images come from
`loader.py`, and `distributed.py` connects several processes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchslim.data.source import class_count
from patchslim.errors import BadFile, TrainingStopped
from patchslim.hosts._answers import eval_mode
from patchslim.measurement.score import Batch, Score, score
from patchslim.model.model import SlimModel
from patchslim.runs import checkpoint
from patchslim.runs.fingerprint import check_same_run
from patchslim.runs.layout import CHECKPOINT_FILE
from patchslim.runs.log import Log
from patchslim.runs.progress import Progress, StepTimer
from patchslim.runs.state_checks import refuse_misfits
from patchslim.saving.old_names import rename_old_weights
from patchslim.training.augment import make_mixup
from patchslim.training.checkpoint_state import check_training_state
from patchslim.training.config import TrainConfig
from patchslim.training.distributed import Processes, shard_tensors
from patchslim.training.divergence import DivergenceCheck
from patchslim.training.fingerprint import fill_defaults, run_fingerprint
from patchslim.training.loader import MicroBatch, TrainingLoader
from patchslim.training.losses import LOSS_TERMS, LossModule, Target, Teacher
from patchslim.training.optim import group_parameters

Weights = dict[str, Tensor]

LOG_COLUMNS = (*LOSS_TERMS, "lr", "gradient", "images_per_second", "kl", "agreement", "accuracy")
LOG_INTERVAL = 10  # steps between two rows of the log


@dataclass(frozen=True)
class BestWeights:
    """Weights by name, the step after which they were taken, and their error in the validation."""

    step: int
    score: float
    state: Weights


class Trainer:
    """One training run: the student, its optimiser, and how far it is.

    Args:
        slimmed: the model that is trained. It is copied, and stays as it is.
        teacher: the model to learn from, or None.
        loader: the training images.
        config: how to train.
        processes: the processes that train together.
        out: the folder for checkpoint and log.
    """

    def __init__(
        self,
        slimmed: SlimModel,
        teacher: Teacher | None,
        loader: TrainingLoader,
        config: TrainConfig,
        processes: Processes,
        out: Path,
    ) -> None:
        self.slimmed, self.teacher, self.loader = slimmed, teacher, loader
        self.config, self.processes, self.out = config, processes, out
        self.student = copy.deepcopy(slimmed).to(processes.device).train()
        self.student.requires_grad_(requires_grad=True)
        if teacher is not None:
            teacher.model.to(processes.device)
        self.loss_module = LossModule(self.student, config)
        if config.compile:
            self.loss_module.compile()
        self.module = processes.wrap(self.loss_module, shard=config.shard)
        self.optimizer = torch.optim.AdamW(
            group_parameters(self.student, config, self.loss_module.auxiliary.parameters()),
            lr=config.lr,
        )
        half = config.precision == "float16"
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=half)
        self.mix = make_mixup(config, class_count(slimmed) or 1)
        self.ema_weights = (
            [p.detach().clone() for p in self._trainable_parameters()] if config.ema else []
        )
        self.initial_weights = (
            [p.detach().clone() for p in self._trainable_parameters()] if config.wise < 1 else []
        )
        self.total_steps = loader.total_steps
        self.divergence = DivergenceCheck(config, processes, out / CHECKPOINT_FILE)
        self.best: BestWeights | None = None

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Plain data for the checkpoint that makes this run different from others."""
        return run_fingerprint(self.slimmed, self.teacher, self.loader, self.config)

    @cached_property
    def dense(self) -> nn.Module:
        """Model that the student is compared with: its teacher, or its untrained host."""
        if self.teacher is not None:
            return self.teacher.model
        return copy.deepcopy(self.slimmed.host).to(self.processes.device)

    def fit(
        self,
        validation: Iterable[Batch] | None,
        *,
        resume: bool,
        tensorboard: bool,
        progress: Progress,
    ) -> BestWeights:
        """Runs all steps, or those that are left.

        Args:
            validation: batches to validate on, or None.
            resume: whether to start from the checkpoint, if there is one.
            tensorboard: whether to write event files for TensorBoard too.
            progress: is called with one line of text for each step.

        Returns:
            The best weights that were validated, else the last. They are complete in the first
            process, and empty in the others.

        Raises:
            Diverged: the loss or the gradient is not a number, or the loss exploded.
            TrainingStopped: SIGTERM was received; a checkpoint was written.
        """
        start = self._restore_checkpoint() if resume else 0
        every = self.config.validate or max(1, math.ceil(self.total_steps / 4))
        timer = StepTimer(self.total_steps, start, self.config.batch)
        with self._open_log(start, tensorboard=tensorboard) as log:
            for number, micro in enumerate(self.loader.steps(start), start):
                values = self.step(number, micro)
                values["images_per_second"] = timer.finish_step()
                done = number + 1
                last = done == self.total_steps
                if validation is not None and (done % every == 0 or last):
                    values |= self._validate(done, validation, progress)
                    timer.restart_clock()
                if log is not None and (done % LOG_INTERVAL == 0 or last or "kl" in values):
                    log.write(done, values)
                progress(timer.status_line(values, self.loader.unreadable))
                stop = self.processes.any(self.processes.stop_requested)
                if done % self.config.checkpoint == 0 or last or stop:
                    self._write_checkpoint(done)
                if stop and not last:
                    raise TrainingStopped(
                        f"Stopped by SIGTERM after step {done} of {self.total_steps}; a "
                        "checkpoint was "
                        f"written. Go on with resume=True (--resume) and the folder {self.out}."
                    )
        return self.best or BestWeights(self.total_steps, math.nan, self._final_weights())

    def step(self, number: int, micro: list[MicroBatch]) -> dict[str, float]:
        """Makes one step of the optimiser, and returns the numbers for the log by name."""
        lr = self.config.lr * self.config.lr_factor(number, self.total_steps)
        host_frozen = self.config.is_host_frozen(number, self.total_steps)
        for group in self.optimizer.param_groups:
            frozen = group["host"] and host_frozen
            group["lr"] = 0.0 if frozen else lr * group["factor"]
        terms = torch.zeros(len(LOSS_TERMS))
        for part, batch in enumerate(micro):
            last = part + 1 == len(micro)
            with contextlib.nullcontext() if last else self.processes.no_sync(self.module):
                part_terms = self._backward(number, part, batch, len(micro))
            self.divergence.check_terms(number, part_terms, batch)
            terms += part_terms / len(micro)
        values = {
            name: self.processes.mean(float(t)) for name, t in zip(LOSS_TERMS, terms, strict=True)
        }
        self.divergence.check_loss(number, values["loss"], micro)
        self.scaler.unscale_(self.optimizer)
        values["gradient"] = self._clip_gradients(number, micro)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema_weights:
            with torch.no_grad():
                torch._foreach_lerp_(
                    self.ema_weights, list(self._trainable_parameters()), 1 - self.config.ema
                )
        values["lr"] = lr
        return values

    def build_model(self, weights: Weights) -> SlimModel:
        """Returns the slimmed model with these weights, on the CPU, in evaluation mode."""
        model = copy.deepcopy(self.slimmed).cpu()
        model.load_state_dict(weights)
        return model.eval()

    def training_record(self, step: int) -> dict[str, Any]:
        """Returns how the weights of a step came about, for the recipe of the model."""
        teacher = None if self.teacher is None else type(self.teacher.model).__name__
        return {
            "course": self.config.to_json(),
            "images": self.loader.count,
            "step": step,
            "of": self.total_steps,
            "teacher": teacher,
        }

    def _backward(self, number: int, part: int, batch: MicroBatch, parts: int) -> Tensor:
        """Adds the gradients of one micro-batch, and returns the terms of its loss."""
        _set_seeds(self.config.seed, number, self.processes.rank, part)
        device = self.processes.device
        images = batch.images.to(device)
        labels = (
            batch.labels.to(device) if batch.labels is not None and self.config.labels else None
        )
        if self.mix is not None:
            unused = torch.zeros(len(images), dtype=torch.long, device=device)
            images, mixed = self.mix(images, unused if labels is None else labels)
            labels = None if labels is None else mixed
        dtype = getattr(torch, self.config.precision)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            target = (
                Target(labels) if self.teacher is None else self.teacher.make_target(images, labels)
            )
            removal = self.config.removal_share(number, self.total_steps)
            layered = self.config.is_layered(number, self.total_steps)
            terms: Tensor = self.module(images, target, removal, layered)
        self.scaler.scale(terms[0] / parts).backward()
        return terms.detach().cpu()

    def _clip_gradients(self, number: int, micro: list[MicroBatch]) -> float:
        """Clips the gradient, and returns its norm before that."""
        norm = self.processes.clip(self._trainable_parameters(), self.config.clip)
        # In float16 the scaler skips a step without a finite gradient, and lowers its scale.
        if not self.scaler.is_enabled():
            self.divergence.check_gradient(number, norm, micro)
        return norm

    def _validate(
        self, done: int, validation: Iterable[Batch], progress: Progress
    ) -> dict[str, float]:
        """Scores the student as it is now, and keeps its weights if they are the best so far."""
        logits = self.slimmed.plan.adapter.logits

        def dense(images: Tensor) -> Tensor:
            answers: Tensor = logits(self.dense(images.to(self.processes.device)))
            return answers

        def slim(images: Tensor) -> Tensor:
            answers: Tensor = self.module(images.to(self.processes.device))
            return answers

        with (
            eval_mode(self.module),
            eval_mode(self.dense),
            torch.no_grad(),
            self._use_final_weights(),
        ):
            models = {"dense": dense, "slim": slim}
            scored = score(models, validation, total=None, progress=progress)["slim"]
        # The first process decides for all, since either all gather the weights or none.
        error = self.processes.broadcast(
            _validation_error(scored, by_teacher=self.teacher is not None)
        )
        if self.best is None or error < self.best.score:
            self.best = BestWeights(done, error, self._final_weights())
        found = {"kl": scored.kl, "agreement": scored.agreement, "accuracy": scored.accuracy}
        return {name: each.value for name, each in found.items() if each is not None}

    def _final_weights(self) -> Weights:
        """Returns the weights that would be saved now; empty in all processes but the first."""
        with self._use_final_weights():
            return self.processes.gather(self.student.state_dict())

    @contextlib.contextmanager
    def _use_final_weights(self) -> Iterator[None]:
        """Within the block, the student has the weights that would be saved now."""
        final = self._interpolate_weights(self.ema_weights)
        current = [p.detach().clone() for p in self._trainable_parameters()] if final else []
        try:
            self._set_weights(final)
            yield
        finally:
            self._set_weights(current)

    def _interpolate_weights(self, learned: list[Tensor]) -> list[Tensor]:
        """Moves the host only a share of the way to the learned weights (`wise`, WiSE-FT).

        Args:
            learned: the averaged weights, or an empty list for the student's current ones.
        """
        if not self.initial_weights:
            return learned
        host = {id(p) for p in self.student.host.parameters()}
        share, current = self.config.wise, list(self._trainable_parameters())
        return [
            initial + share * (end.detach() - initial) if id(p) in host else end.detach()
            for p, initial, end in zip(
                current, self.initial_weights, learned or current, strict=True
            )
        ]

    def _set_weights(self, values: list[Tensor]) -> None:
        """Gives the student these weights. An empty list changes nothing."""
        if not values:
            return
        with torch.no_grad():
            for parameter, value in zip(self._trainable_parameters(), values, strict=True):
                parameter.copy_(value)

    def _trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Returns the parameters that learn."""
        return (p for p in self.loss_module.parameters() if p.requires_grad)

    def _write_checkpoint(self, done: int) -> None:
        """Writes a checkpoint after `done` steps."""
        full = self.processes.full_state(self.module, self.optimizer)
        average = self.processes.gather(
            {str(number): t for number, t in enumerate(self.ema_weights)}
        )
        if not self.processes.is_first:
            return
        best = self.best and {**vars(self.best)}
        state = {
            "run": self.fingerprint,
            "step": done,
            "full": full,
            "average": average,
            "scaler": self.scaler.state_dict(),
            "recent": list(self.divergence.recent_losses),
            "best": best,
        }
        checkpoint.write(self.out / CHECKPOINT_FILE, state)

    def _restore_checkpoint(self) -> int:
        """Reads the checkpoint, and returns the step to continue from; 0 if there is none."""
        file = self.out / CHECKPOINT_FILE
        if not file.exists():
            return 0
        state = rename_old_weights(checkpoint.read(file))
        if "run" not in state:
            raise BadFile(f"{file} is not a checkpoint of `train`. Give another folder.")
        like = {str(number): p for number, p in enumerate(self._trainable_parameters())}
        with refuse_misfits(file):
            saved = fill_defaults(state["run"], self.slimmed.method)
            if state["best"] is None:  # without a validation `wise` counts only at the end of a run
                saved["course"]["wise"] = self.config.wise
            check_same_run(file, saved, self.fingerprint)
            check_training_state(
                state,
                module=self.loss_module,
                optimizer=self.optimizer,
                average=like if self.ema_weights else {},
                scaler=self.scaler.state_dict(),
                student=self.student,
                total_steps=self.total_steps,
            )
        self.processes.restore(self.module, self.optimizer, state["full"])
        if self.ema_weights:
            self.ema_weights = list(shard_tensors(state["average"], like).values())
        self.scaler.load_state_dict(state["scaler"])
        self.divergence.recent_losses.extend(state["recent"])
        self.best = state["best"] and BestWeights(**state["best"])
        return int(state["step"])

    def _open_log(
        self, start: int, *, tensorboard: bool
    ) -> contextlib.AbstractContextManager[Log | None]:
        """Opens the log. Only the first process has one."""
        if not self.processes.is_first:
            return contextlib.nullcontext()
        return Log(self.out, LOG_COLUMNS, tensorboard=tensorboard, after=start)


def _set_seeds(*numbers: int) -> None:
    """Seeds all random generators from these numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup draws from the global generator)


def _validation_error(scored: Score, *, by_teacher: bool) -> float:
    """Returns the number that is smallest for the best weights.

    It is the KL divergence from the teacher; without a teacher, the share of wrong answers.
    """
    if scored.accuracy is not None and not by_teacher:
        return 1 - scored.accuracy.value
    return float("inf") if scored.kl is None else scored.kl.value
