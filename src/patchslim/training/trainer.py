"""`Run`: the steps of a course, one after another, with checkpoints, validation and a log.

It knows how to go on where it was stopped. What is learned is in `losses.py`, where the images come
from in `feed.py`, and what several processes do for each other in `processes.py`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchslim.data.source import class_count
from patchslim.errors import BadFile, Diverged, TrainingStopped
from patchslim.hosts._answers import eval_mode
from patchslim.measurement.score import Batch, Score, score
from patchslim.model.model import SlimModel
from patchslim.runs import checkpoint
from patchslim.runs.fingerprint import check_same_run
from patchslim.runs.layout import CHECKPOINT_FILE
from patchslim.runs.log import Log
from patchslim.runs.progress import StepTimer
from patchslim.training.augment import make_mixup
from patchslim.training.config import TrainConfig
from patchslim.training.distributed import Processes, shard_tensors
from patchslim.training.identity import fill_defaults, run_fingerprint
from patchslim.training.loader import MicroBatch, TrainingLoader
from patchslim.training.losses import LOSS_TERMS, LossModule, Target, Teacher
from patchslim.training.optim import group_parameters

Progress = Callable[[str], object]
Weights = dict[str, Tensor]

LOG_COLUMNS = (*LOSS_TERMS, "lr", "gradient", "images_per_second", "kl", "agreement", "accuracy")
RECENT_LOSSES = 50  # losses that a new one is compared with
EXPLOSION_FACTOR = 20.0  # times their median is an explosion
LOG_INTERVAL = 10  # steps between two rows of the log


@dataclass(frozen=True)
class BestWeights:
    """Weights by name, the step after which they were taken, and the score they had there."""

    step: int
    score: float
    state: Weights


class Trainer:
    """A course in progress: the student, its optimiser, and where it stands."""

    def __init__(
        self,
        slimmed: SlimModel,
        teacher: Teacher | None,
        feed: TrainingLoader,
        course: TrainConfig,
        crew: Processes,
        out: Path,
    ) -> None:
        self.slimmed, self.teacher, self.loader = slimmed, teacher, feed
        self.course, self.processes, self.out = course, crew, out
        self.student = copy.deepcopy(slimmed).to(crew.device).train()
        self.student.requires_grad_(requires_grad=True)
        if teacher is not None:
            teacher.model.to(crew.device)
        self.loss_module = LossModule(self.student, course)
        if course.compile:
            self.loss_module.compile()
        self.module = crew.wrap(self.loss_module, shard=course.shard)
        self.optimizer = torch.optim.AdamW(
            group_parameters(self.student, course, self.loss_module.auxiliary.parameters()),
            lr=course.lr,
        )
        half = course.precision == "float16"
        self.scaler = torch.amp.GradScaler(crew.device.type, enabled=half)
        self.mix = make_mixup(course, class_count(slimmed) or 1)
        self.ema_weights = (
            [p.detach().clone() for p in self._trainable_parameters()] if course.ema else []
        )
        self.initial_weights = (
            [p.detach().clone() for p in self._trainable_parameters()] if course.wise < 1 else []
        )
        self.total_steps = feed.total_steps
        self.recent_losses: deque[float] = deque(maxlen=RECENT_LOSSES)
        self.best: BestWeights | None = None

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What makes this run this run."""
        return run_fingerprint(self.slimmed, self.teacher, self.loader, self.course)

    @cached_property
    def dense(self) -> nn.Module:
        """What the student is compared with: its teacher, or what it was before."""
        if self.teacher is not None:
            return self.teacher.model
        return copy.deepcopy(self.slimmed.host).to(self.processes.device)

    def fit(
        self,
        validation: Iterable[Batch] | None,
        *,
        resume: bool,
        tensorboard: bool,
        say: Progress,
    ) -> BestWeights:
        """The weights at the end: the best that were validated, else the last."""
        start = self._restore_checkpoint() if resume else 0
        every = self.course.validate or max(1, math.ceil(self.total_steps / 4))
        pace = StepTimer(self.total_steps, start, self.course.batch)
        with self._open_log(start, tensorboard=tensorboard) as log:
            for number, micro in enumerate(self.loader.steps(start), start):
                values = self.step(number, micro)
                values["images_per_second"] = pace.finish_step()
                done = number + 1
                last = done == self.total_steps
                if validation is not None and (done % every == 0 or last):
                    values |= self._validate(done, validation, say)
                    pace.restart_clock()
                if log is not None and (done % LOG_INTERVAL == 0 or last or "kl" in values):
                    log.write(done, values)
                say(pace.status_line(values, self.loader.unreadable))
                stop = self.processes.any(self.processes.stop_requested)
                if done % self.course.checkpoint == 0 or last or stop:
                    self._write_checkpoint(done)
                if stop and not last:
                    raise TrainingStopped(
                        f"Stopped by SIGTERM after step {done} of {self.total_steps}; a "
                        "checkpoint was "
                        f"written. Go on with resume=True (--resume) and the folder {self.out}."
                    )
        return self.best or BestWeights(self.total_steps, math.nan, self._final_weights())

    def step(self, number: int, micro: list[MicroBatch]) -> dict[str, float]:
        """One step of the optimiser; what it cost, by name."""
        pace, frozen = (
            self.course.lr_factor(number, self.total_steps),
            self.course.is_host_frozen(number, self.total_steps),
        )
        for group in self.optimizer.param_groups:
            rests = group["host"] and frozen
            group["lr"] = 0.0 if rests else self.course.lr * pace * group["factor"]
        terms = torch.zeros(len(LOSS_TERMS))
        for part, fed in enumerate(micro):
            whole = part + 1 == len(micro)
            with contextlib.nullcontext() if whole else self.processes.no_sync(self.module):
                found = self._backward(number, part, fed, len(micro))
            self._check_finite(number, found, fed)
            terms += found / len(micro)
        values = {
            name: self.processes.mean(float(t)) for name, t in zip(LOSS_TERMS, terms, strict=True)
        }
        self._check_explosion(number, values["loss"], micro)
        self.scaler.unscale_(self.optimizer)
        values["gradient"] = self._clip_gradients(number, micro)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema_weights:
            with torch.no_grad():
                torch._foreach_lerp_(
                    self.ema_weights, list(self._trainable_parameters()), 1 - self.course.ema
                )
        values["lr"] = self.course.lr * pace
        return values

    def build_model(self, weights: Weights) -> SlimModel:
        """The slimmed model with these weights, on the CPU, in evaluation mode."""
        model = copy.deepcopy(self.slimmed).cpu()
        model.load_state_dict(weights)
        return model.eval()

    def training_record(self, step: int) -> dict[str, Any]:
        """How the weights came to be, for the recipe."""
        teacher = None if self.teacher is None else type(self.teacher.model).__name__
        return {
            "course": self.course.to_json(),
            "images": self.loader.count,
            "step": step,
            "of": self.total_steps,
            "teacher": teacher,
        }

    def _backward(self, number: int, part: int, fed: MicroBatch, parts: int) -> Tensor:
        """The terms of the loss of one part of a batch, whose gradients are added up."""
        _set_seeds(self.course.seed, number, self.processes.rank, part)
        device = self.processes.device
        images = fed.images.to(device)
        labels = None if fed.labels is None or not self.course.labels else fed.labels.to(device)
        if self.mix is not None:
            spare = torch.zeros(len(images), dtype=torch.long, device=device)
            images, mixed = self.mix(images, spare if labels is None else labels)
            labels = None if labels is None else mixed
        dtype = getattr(torch, self.course.precision)
        half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with half:
            target = (
                Target(labels) if self.teacher is None else self.teacher.make_target(images, labels)
            )
            eased = self.course.removal_share(number, self.total_steps)
            layered = self.course.is_layered(number, self.total_steps)
            terms: Tensor = self.module(images, target, eased, layered)
        self.scaler.scale(terms[0] / parts).backward()
        return terms.detach().cpu()

    def _clip_gradients(self, number: int, micro: list[MicroBatch]) -> float:
        """The norm of the gradient before it was clipped."""
        norm = self.processes.clip(self._trainable_parameters(), self.course.clip)
        # In float16 the scaler leaves such a step out and scales less from then on.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise Diverged(
                f"The gradient of step {number + 1} is {norm}; first images: "
                f"{', '.join(micro[0].names[:3])}. {self._cure()}"
            )
        return norm

    def _check_finite(self, number: int, terms: Tensor, fed: MicroBatch) -> None:
        """Stops at a loss that is not finite: the step, the batch, and what can be done."""
        bad = not bool(terms.isfinite().all())
        if not self.processes.any(bad):
            return
        own = ", ".join(f"{name} {float(t):.3g}" for name, t in zip(LOSS_TERMS, terms, strict=True))
        named = ", ".join(fed.names[:5]) + (", ..." if len(fed.names) > 5 else "")
        where = f"{own}; images {named}" if bad else "in another process"
        raise Diverged(f"The loss of step {number + 1} is not a number ({where}). {self._cure()}")

    def _check_explosion(self, number: int, loss: float, micro: list[MicroBatch]) -> None:
        """Stops at a loss far above the ones before it."""
        if len(self.recent_losses) == RECENT_LOSSES:
            usual = statistics.median(self.recent_losses)
            if loss > EXPLOSION_FACTOR * usual and loss > usual + 1:
                raise Diverged(
                    f"The loss of step {number + 1} is {loss:.3g}, and {usual:.3g} is the median "
                    f"of the {RECENT_LOSSES} before it; first images: "
                    f"{', '.join(micro[0].names[:3])}. "
                    f"{self._cure()}"
                )
        self.recent_losses.append(loss)

    def _cure(self) -> str:
        """What a person can do about it."""
        written = self.out / CHECKPOINT_FILE
        kept = f" {written} is from before that." if written.exists() else ""
        precision = "" if self.course.precision == "float32" else ", use precision='float32'"
        return (
            f"Nothing was changed by that step. Lower lr (now {self.course.lr:g}){precision}, or "
            f"clip gradients harder (clip={self.course.clip:g}), and look at these images.{kept}"
        )

    def _validate(self, done: int, validation: Iterable[Batch], say: Progress) -> dict[str, float]:
        """The scores of the student now; the best so far is kept."""
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
            scores = score({"dense": dense, "slim": slim}, validation, total=None, progress=say)
            found = scores["slim"]
        # One process decides, since the weights are gathered by all or by none.
        worse = self.processes.broadcast(
            _validation_error(found, by_teacher=self.teacher is not None)
        )
        if self.best is None or worse < self.best.score:
            self.best = BestWeights(done, worse, self._final_weights())
        right = {} if found.accuracy is None else {"accuracy": found.accuracy.value}
        return {"kl": found.kl.value, "agreement": found.agreement.value, **right}

    def _final_weights(self) -> Weights:
        """The weights that the student would leave with; only in the first process."""
        with self._use_final_weights():
            return self.processes.gather(self.student.state_dict())

    @contextlib.contextmanager
    def _use_final_weights(self) -> Iterator[None]:
        """While it lasts, the student has the weights that it would leave with."""
        leaving = self._interpolate_weights(self.ema_weights)
        own = [p.detach().clone() for p in self._trainable_parameters()] if leaving else []
        try:
            self._set_weights(leaving)
            yield
        finally:
            self._set_weights(own)

    def _interpolate_weights(self, learned: list[Tensor]) -> list[Tensor]:
        """What was learned, the host's only a share of the way from what was given (WiSE-FT)."""
        if not self.initial_weights:
            return learned
        host = {id(p) for p in self.student.host.parameters()}
        share, now = self.course.wise, list(self._trainable_parameters())
        return [
            given + share * (end.detach() - given) if id(p) in host else end.detach()
            for p, given, end in zip(now, self.initial_weights, learned or now, strict=True)
        ]

    def _set_weights(self, values: list[Tensor]) -> None:
        """Gives the student these weights."""
        with torch.no_grad():
            for parameter, value in zip(
                self._trainable_parameters() if values else (), values, strict=True
            ):
                parameter.copy_(value)

    def _trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        return (p for p in self.loss_module.parameters() if p.requires_grad)

    def _write_checkpoint(self, done: int) -> None:
        """A checkpoint after `done` steps."""
        full = self.processes.full_state(self.module, self.optimizer)
        average = self.processes.gather({str(place): t for place, t in enumerate(self.ema_weights)})
        if not self.processes.is_first:
            return
        best = self.best and {**vars(self.best)}
        state = {
            "run": self.fingerprint,
            "step": done,
            "full": full,
            "average": average,
            "scaler": self.scaler.state_dict(),
            "recent": list(self.recent_losses),
            "best": best,
        }
        checkpoint.write(self.out / CHECKPOINT_FILE, state)

    def _restore_checkpoint(self) -> int:
        """The step to go on from; 0 where nothing was written before the run was stopped."""
        file = self.out / CHECKPOINT_FILE
        if not file.exists():
            return 0
        state = checkpoint.read(file)
        if "run" not in state:
            raise BadFile(f"{file} is not a checkpoint of `train`. Give another folder.")
        begun = fill_defaults(state["run"], self.slimmed.method)
        if state["best"] is None:  # what was never validated may still leave at another share
            begun["course"]["wise"] = self.course.wise
        check_same_run(file, begun, self.fingerprint)
        self.processes.restore(self.module, self.optimizer, state["full"])
        if self.ema_weights:
            own = {str(place): p for place, p in enumerate(self._trainable_parameters())}
            self.ema_weights = list(shard_tensors(state["average"], own).values())
        self.scaler.load_state_dict(state["scaler"])
        self.recent_losses.extend(state["recent"])
        self.best = state["best"] and BestWeights(**state["best"])
        return int(state["step"])

    def _open_log(
        self, start: int, *, tensorboard: bool
    ) -> contextlib.AbstractContextManager[Log | None]:
        """The log; only the first process has one."""
        if not self.processes.is_first:
            return contextlib.nullcontext()
        return Log(self.out, LOG_COLUMNS, tensorboard=tensorboard, after=start)


def _set_seeds(*numbers: int) -> None:
    """Makes all that is drawn from here on follow from these numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup draws from the global generator)


def _validation_error(found: Score, *, by_teacher: bool) -> float:
    """What the best weights have least of: KL from the teacher, or wrong answers without one."""
    return found.kl.value if by_teacher or found.accuracy is None else 1 - found.accuracy.value
