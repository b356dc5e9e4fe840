"""What is learned: the labels, a teacher's answers, its final tokens, and what the method wants.

`Learner` is one module that turns a batch into its losses, so that whatever wraps or compiles a
module does it to the whole step. It knows no optimiser, no data set and no process.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchslim.errors import UnsupportedModel
from patchslim.hosts._registry import find_adapter
from patchslim.methods import LearnedMethod
from patchslim.methods._registry import find_method
from patchslim.model.model import SlimModel
from patchslim.model.plan import plan_schedule
from patchslim.model.training_pass import forward_training
from patchslim.schedules.schedule import Constant, Tail
from patchslim.tokens.rows import take, with_prefix
from patchslim.tokens.tokens import Tokens
from patchslim.training.config import Distil, TrainConfig

LOSS_TERMS = ("loss", "labels", "answers", "tokens", "method")  # of one step, in this order


@dataclass(frozen=True)
class Target:
    """What the answers to a batch of images are compared with; None is what is not.

    Attributes:
        labels: classes (B,), or their probabilities (B, C) where images are mixed.
        answers: the teacher's logits (B, C).
        tokens: the teacher's rows after its last norm (B, N, C).
    """

    labels: Tensor | None = None
    answers: Tensor | None = None
    tokens: Tensor | None = None


class Teacher:
    """A model whose answers are learned: by default the untouched host. It is never trained."""

    def __init__(self, model: nn.Module, course: TrainConfig) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.token_model: SlimModel | None = None
        if course.tokens:
            adapter = find_adapter(model)
            self.token_model = SlimModel(
                model, plan_schedule(model, adapter, find_method("identity")(), Constant(0), "full")
            )

    @torch.no_grad()
    def make_target(self, images: Tensor, labels: Tensor | None) -> Target:
        """What is to be learned of a batch."""
        if self.token_model is None:
            return Target(labels, logits_of(self.model(images)))
        lesson = forward_training(self.token_model, images, tail="full")
        answers = self.token_model.plan.adapter.logits(lesson.output)
        return Target(labels, logits_of(answers), lesson.tokens.x)


class LossModule(nn.Module):
    """A slimmed model with its losses: images and targets in, the terms of the loss out."""

    def __init__(self, slimmed: SlimModel, course: TrainConfig) -> None:
        super().__init__()
        self.slimmed = slimmed
        self.course = course
        self.auxiliary = nn.ModuleList()
        if course.auxiliary:
            answers = 2 if course.distil == "token" else 1  # as the host itself then
            readers = slimmed.plan.adapter.pooled_classifiers(slimmed.host)[:answers]
            self.auxiliary.extend(copy.deepcopy(readers))
        # Where the patch rows are looked at, the last block has to compute them.
        self.tail: Tail = "full" if course.tokens else slimmed.plan.tail

    def forward(
        self,
        images: Tensor,
        target: Target | None = None,
        eased: float = 1.0,
        layered: bool = False,  # noqa: FBT001, FBT002 (wrappers pass it by place)
    ) -> Tensor:
        """The terms of the loss (5,) as `TERMS` names them; the logits where there is no target."""
        if target is None:
            return logits_of(self.slimmed.plan.adapter.logits(self.slimmed(images)))
        course, slimmed = self.course, self.slimmed
        lesson = forward_training(
            slimmed,
            images,
            tail=self.tail,
            eased=eased,
            layered=layered,
            recompute=course.recompute,
        )
        labels, answers = self._compute_losses(slimmed.plan.adapter.logits(lesson.output), target)
        if self.auxiliary:
            row = lesson.tokens.x[:, 0]
            seconds = [reader(row) for reader in self.auxiliary]
            besides = self._compute_losses(
                tuple(seconds) if len(seconds) > 1 else seconds[0], target
            )
            labels = labels.lerp(besides[0], course.auxiliary)
            answers = answers.lerp(besides[1], course.auxiliary)
        tokens = zero = labels.new_zeros(())
        if target.tokens is not None:
            tokens = token_loss(lesson.tokens, target.tokens)
        wanted = None
        if lesson.decisions and isinstance(slimmed.method, LearnedMethod):
            wanted = slimmed.method.loss(lesson.decisions)
        method = zero if wanted is None else wanted.float()
        whole = (
            course.labels * labels
            + course.distil_weight * answers
            + course.tokens * tokens
            + method
        )
        return torch.stack(
            [whole, labels.detach(), answers.detach(), tokens.detach(), method.detach()]
        )

    def _compute_losses(
        self, output: Tensor | tuple[Tensor, ...], target: Target
    ) -> tuple[Tensor, Tensor]:
        """How far an answer is from the labels, and from the teacher's answer."""
        course = self.course
        # A distilled host in training answers twice: for the labels, and for its teacher.
        own, taught = output if isinstance(output, tuple) else (output, output)
        labels = answers = own.new_zeros((), dtype=torch.float32)
        if target.labels is not None and course.labels:
            labels = label_loss(own.float(), target.labels, course.smoothing)
        if target.answers is not None and course.distil != "none":
            answers = answer_loss(
                taught.float(), target.answers.float(), course.distil, course.temperature
            )
        return labels, answers


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with classes (B,), or with their probabilities (B, C), smoothed already."""
    if labels.ndim == 2:
        return -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def answer_loss(logits: Tensor, answers: Tensor, kind: Distil, temperature: float) -> Tensor:
    """KL(teacher || student) in nats times the squared temperature; or the teacher's class."""
    if kind != "soft":
        return F.cross_entropy(logits, answers.argmax(dim=1))
    student = (logits / temperature).log_softmax(dim=1)
    teacher = (answers / temperature).log_softmax(dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def token_loss(tokens: Tokens, taught: Tensor) -> Tensor:
    """Mean squared distance of the final rows from the teacher's rows in the same places.

    Of the prefix and of the patches that are left, one mean each: the class token, which the head
    reads, would otherwise be one row of many. A merged or fused row is compared at the cell that
    speaks for it; a masked row not at all.
    """
    rows = with_prefix(tokens.cells(), tokens.prefix)
    apart = (tokens.x.float() - take(taught, rows).float()).square().mean(dim=2)
    leading, patches = apart[:, : tokens.prefix], apart[:, tokens.prefix :]
    there = torch.ones_like(patches) if tokens.alive is None else tokens.alive.detach().float()
    left = (patches * there).sum() / there.sum().clamp(min=1)
    return left + leading.mean() if tokens.prefix else left


def logits_of(output: Any) -> Tensor:
    """The logits in what a teacher returns: a tensor, or an output that names them."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModel(
            f"Training takes models that answer with class scores (B, C); this one gives {shape}."
        )
    return logits
