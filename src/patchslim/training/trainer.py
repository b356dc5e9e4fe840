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
from patchslim.errors import BadFile, BrokenRun, Diverged
from patchslim.hosts._answers import evaluating
from patchslim.measurement.score import Batch, Score, score
from patchslim.model.model import SlimModel
from patchslim.runs import checkpoint
from patchslim.runs.fingerprint import refuse_other
from patchslim.runs.layout import CHECKPOINT
from patchslim.runs.log import Log
from patchslim.runs.progress import Pace
from patchslim.training.augment import mixing
from patchslim.training.config import Course
from patchslim.training.distributed import Processes, spread
from patchslim.training.identity import completed, identity
from patchslim.training.loader import Fed, Feed
from patchslim.training.losses import TERMS, Learner, Target, Teacher
from patchslim.training.optim import grouped

Say = Callable[[str], object]
Weights = dict[str, Tensor]

COLUMNS = (*TERMS, "lr", "gradient", "images_per_second", "kl", "agreement", "accuracy")
RECENT = 50  # losses that a new one is compared with
EXPLODED = 20.0  # times their median is an explosion
LOGGED = 10  # steps between two rows of the log


@dataclass(frozen=True)
class Best:
    """Weights by name, the step after which they were taken, and the score they had there."""

    step: int
    score: float
    state: Weights


class Run:
    """A course in progress: the student, its optimiser, and where it stands."""

    def __init__(
        self,
        slimmed: SlimModel,
        teacher: Teacher | None,
        feed: Feed,
        course: Course,
        crew: Processes,
        out: Path,
    ) -> None:
        self.slimmed, self.teacher, self.feed = slimmed, teacher, feed
        self.course, self.crew, self.out = course, crew, out
        self.student = copy.deepcopy(slimmed).to(crew.device).train()
        self.student.requires_grad_(requires_grad=True)
        if teacher is not None:
            teacher.model.to(crew.device)
        self.learner = Learner(self.student, course)
        if course.compile:
            self.learner.compile()
        self.module = crew.wrap(self.learner, shard=course.shard)
        self.optimizer = torch.optim.AdamW(
            grouped(self.student, course, self.learner.auxiliary.parameters()), lr=course.lr
        )
        half = course.precision == "float16"
        self.scaler = torch.amp.GradScaler(crew.device.type, enabled=half)
        self.mix = mixing(course, class_count(slimmed) or 1)
        self.average = [p.detach().clone() for p in self._learned()] if course.ema else []
        self.given = [p.detach().clone() for p in self._learned()] if course.wise < 1 else []
        self.total = feed.total
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.best: Best | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes this run this run."""
        return identity(self.slimmed, self.teacher, self.feed, self.course)

    @cached_property
    def dense(self) -> nn.Module:
        """What the student is compared with: its teacher, or what it was before."""
        if self.teacher is not None:
            return self.teacher.model
        return copy.deepcopy(self.slimmed.host).to(self.crew.device)

    def go(
        self,
        validation: Iterable[Batch] | None,
        *,
        resume: bool,
        tensorboard: bool,
        say: Say,
    ) -> Best:
        """The weights at the end: the best that were validated, else the last."""
        start = self._restored() if resume else 0
        every = self.course.validate or max(1, math.ceil(self.total / 4))
        pace = Pace(self.total, start, self.course.batch)
        with self._log(start, tensorboard=tensorboard) as log:
            for number, micro in enumerate(self.feed.steps(start), start):
                values = self.step(number, micro)
                values["images_per_second"] = pace.stepped()
                done = number + 1
                last = done == self.total
                if validation is not None and (done % every == 0 or last):
                    values |= self._validated(done, validation, say)
                    pace.rested()
                if log is not None and (done % LOGGED == 0 or last or "kl" in values):
                    log.write(done, values)
                say(pace.line(values, self.feed.unreadable))
                stop = self.crew.any(self.crew.told_to_stop)
                if done % self.course.checkpoint == 0 or last or stop:
                    self._write(done)
                if stop and not last:
                    raise BrokenRun(
                        f"Stopped by SIGTERM after step {done} of {self.total}; a checkpoint was "
                        f"written. Go on with resume=True (--resume) and the folder {self.out}."
                    )
        return self.best or Best(self.total, math.nan, self._weights())

    def step(self, number: int, micro: list[Fed]) -> dict[str, float]:
        """One step of the optimiser; what it cost, by name."""
        pace, frozen = self.course.pace(number, self.total), self.course.frozen(number, self.total)
        for group in self.optimizer.param_groups:
            rests = group["host"] and frozen
            group["lr"] = 0.0 if rests else self.course.lr * pace * group["factor"]
        terms = torch.zeros(len(TERMS))
        for part, fed in enumerate(micro):
            whole = part + 1 == len(micro)
            with contextlib.nullcontext() if whole else self.crew.no_sync(self.module):
                found = self._backward(number, part, fed, len(micro))
            self._refuse_nonsense(number, found, fed)
            terms += found / len(micro)
        values = {name: self.crew.mean(float(t)) for name, t in zip(TERMS, terms, strict=True)}
        self._refuse_explosion(number, values["loss"], micro)
        self.scaler.unscale_(self.optimizer)
        values["gradient"] = self._clipped(number, micro)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, list(self._learned()), 1 - self.course.ema)
        values["lr"] = self.course.lr * pace
        return values

    def plain(self, weights: Weights) -> SlimModel:
        """The slimmed model with these weights, on the CPU, in evaluation mode."""
        model = copy.deepcopy(self.slimmed).cpu()
        model.load_state_dict(weights)
        return model.eval()

    def origin(self, step: int) -> dict[str, Any]:
        """How the weights came to be, for the recipe."""
        teacher = None if self.teacher is None else type(self.teacher.model).__name__
        return {
            "course": self.course.to_json(),
            "images": self.feed.count,
            "step": step,
            "of": self.total,
            "teacher": teacher,
        }

    def _backward(self, number: int, part: int, fed: Fed, parts: int) -> Tensor:
        """The terms of the loss of one part of a batch, whose gradients are added up."""
        _seed(self.course.seed, number, self.crew.rank, part)
        device = self.crew.device
        images = fed.images.to(device)
        labels = None if fed.labels is None or not self.course.labels else fed.labels.to(device)
        if self.mix is not None:
            spare = torch.zeros(len(images), dtype=torch.long, device=device)
            images, mixed = self.mix(images, spare if labels is None else labels)
            labels = None if labels is None else mixed
        dtype = getattr(torch, self.course.precision)
        half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with half:
            target = Target(labels) if self.teacher is None else self.teacher.teach(images, labels)
            eased = self.course.eased(number, self.total)
            layered = self.course.anew(number, self.total)
            terms: Tensor = self.module(images, target, eased, layered)
        self.scaler.scale(terms[0] / parts).backward()
        return terms.detach().cpu()

    def _clipped(self, number: int, micro: list[Fed]) -> float:
        """The norm of the gradient before it was clipped."""
        norm = self.crew.clip(self._learned(), self.course.clip)
        # In float16 the scaler leaves such a step out and scales less from then on.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise Diverged(
                f"The gradient of step {number + 1} is {norm}; first images: "
                f"{', '.join(micro[0].names[:3])}. {self._cure()}"
            )
        return norm

    def _refuse_nonsense(self, number: int, terms: Tensor, fed: Fed) -> None:
        """Stops at a loss that is not finite: the step, the batch, and what can be done."""
        bad = not bool(terms.isfinite().all())
        if not self.crew.any(bad):
            return
        own = ", ".join(f"{name} {float(t):.3g}" for name, t in zip(TERMS, terms, strict=True))
        named = ", ".join(fed.names[:5]) + (", ..." if len(fed.names) > 5 else "")
        where = f"{own}; images {named}" if bad else "in another process"
        raise Diverged(f"The loss of step {number + 1} is not a number ({where}). {self._cure()}")

    def _refuse_explosion(self, number: int, loss: float, micro: list[Fed]) -> None:
        """Stops at a loss far above the ones before it."""
        if len(self.recent) == RECENT:
            usual = statistics.median(self.recent)
            if loss > EXPLODED * usual and loss > usual + 1:
                raise Diverged(
                    f"The loss of step {number + 1} is {loss:.3g}, and {usual:.3g} is the median "
                    f"of the {RECENT} before it; first images: {', '.join(micro[0].names[:3])}. "
                    f"{self._cure()}"
                )
        self.recent.append(loss)

    def _cure(self) -> str:
        """What a person can do about it."""
        written = self.out / CHECKPOINT
        kept = f" {written} is from before that." if written.exists() else ""
        precision = "" if self.course.precision == "float32" else ", use precision='float32'"
        return (
            f"Nothing was changed by that step. Lower lr (now {self.course.lr:g}){precision}, or "
            f"clip gradients harder (clip={self.course.clip:g}), and look at these images.{kept}"
        )

    def _validated(self, done: int, validation: Iterable[Batch], say: Say) -> dict[str, float]:
        """The scores of the student now; the best so far is kept."""
        logits = self.slimmed.adapter.logits

        def dense(images: Tensor) -> Tensor:
            answers: Tensor = logits(self.dense(images.to(self.crew.device)))
            return answers

        def slim(images: Tensor) -> Tensor:
            answers: Tensor = self.module(images.to(self.crew.device))
            return answers

        with evaluating(self.module), evaluating(self.dense), torch.no_grad(), self._leaving():
            found = score({"dense": dense, "slim": slim}, validation, total=None, say=say)["slim"]
        # One process decides, since the weights are gathered by all or by none.
        worse = self.crew.told(_badness(found, by_teacher=self.teacher is not None))
        if self.best is None or worse < self.best.score:
            self.best = Best(done, worse, self._weights())
        right = {} if found.accuracy is None else {"accuracy": found.accuracy.value}
        return {"kl": found.kl.value, "agreement": found.agreement.value, **right}

    def _weights(self) -> Weights:
        """The weights that the student would leave with; only in the first process."""
        with self._leaving():
            return self.crew.gathered(self.student.state_dict())

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """While it lasts, the student has the weights that it would leave with."""
        leaving = self._blended(self.average)
        own = [p.detach().clone() for p in self._learned()] if leaving else []
        try:
            self._take(leaving)
            yield
        finally:
            self._take(own)

    def _blended(self, learned: list[Tensor]) -> list[Tensor]:
        """What was learned, the host's only a share of the way from what was given (WiSE-FT)."""
        if not self.given:
            return learned
        host = {id(p) for p in self.student.host.parameters()}
        share, now = self.course.wise, list(self._learned())
        return [
            given + share * (end.detach() - given) if id(p) in host else end.detach()
            for p, given, end in zip(now, self.given, learned or now, strict=True)
        ]

    def _take(self, values: list[Tensor]) -> None:
        """Gives the student these weights."""
        with torch.no_grad():
            for parameter, value in zip(self._learned() if values else (), values, strict=True):
                parameter.copy_(value)

    def _learned(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        return (p for p in self.learner.parameters() if p.requires_grad)

    def _write(self, done: int) -> None:
        """A checkpoint after `done` steps."""
        full = self.crew.full_state(self.module, self.optimizer)
        average = self.crew.gathered({str(place): t for place, t in enumerate(self.average)})
        if not self.crew.first:
            return
        best = self.best and {**vars(self.best)}
        state = {
            "run": self.identity,
            "step": done,
            "full": full,
            "average": average,
            "scaler": self.scaler.state_dict(),
            "recent": list(self.recent),
            "best": best,
        }
        checkpoint.write(self.out / CHECKPOINT, state)

    def _restored(self) -> int:
        """The step to go on from; 0 where nothing was written before the run was stopped."""
        file = self.out / CHECKPOINT
        if not file.exists():
            return 0
        state = checkpoint.read(file)
        if "run" not in state:
            raise BadFile(f"{file} is not a checkpoint of `train`. Give another folder.")
        begun = completed(state["run"], self.slimmed.reducer)
        if state["best"] is None:  # what was never validated may still leave at another share
            begun["course"]["wise"] = self.course.wise
        refuse_other(file, begun, self.identity)
        self.crew.restore(self.module, self.optimizer, state["full"])
        if self.average:
            own = {str(place): p for place, p in enumerate(self._learned())}
            self.average = list(spread(state["average"], own).values())
        self.scaler.load_state_dict(state["scaler"])
        self.recent.extend(state["recent"])
        self.best = state["best"] and Best(**state["best"])
        return int(state["step"])

    def _log(
        self, start: int, *, tensorboard: bool
    ) -> contextlib.AbstractContextManager[Log | None]:
        """The log; only the first process has one."""
        if not self.crew.first:
            return contextlib.nullcontext()
        return Log(self.out, COLUMNS, tensorboard=tensorboard, after=start)


def _seed(*numbers: int) -> None:
    """Makes all that is drawn from here on follow from these numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup draws from the global generator)


def _badness(found: Score, *, by_teacher: bool) -> float:
    """What the best weights have least of: KL from the teacher, or wrong answers without one."""
    return found.kl.value if by_teacher or found.accuracy is None else 1 - found.accuracy.value
