"""The losses of training: labels, a teacher's answers, its final tokens, and the method's own loss.

`LossModule` turns a batch into its losses. It is one module, so that DDP, FSDP2 or torch.compile
can wrap the whole step. It knows no optimiser, no data set and no processes.
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

LOSS_TERMS = ("loss", "labels", "answers", "tokens", "method")  # the total, and its terms


@dataclass(frozen=True)
class Target:
    """What a batch's outputs are compared with. What is None takes no part.

    Attributes:
        labels: classes (B,), or class probabilities (B, C) if images are mixed.
        answers: the teacher's logits (B, C).
        tokens: the teacher's tokens after its last norm (B, N, C).
    """

    labels: Tensor | None = None
    answers: Tensor | None = None
    tokens: Tensor | None = None


class Teacher:
    """A model to learn from: by default the untouched host. It is never trained itself.

    Args:
        model: the model, which is put in evaluation mode and takes no gradients any more.
        config: how to train. With `tokens` the model must be of a known family.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.token_model: SlimModel | None = None
        if config.tokens:
            adapter = find_adapter(model)
            plan = plan_schedule(model, adapter, find_method("identity")(), Constant(0), "full")
            self.token_model = SlimModel(model, plan)

    @torch.no_grad()
    def make_target(self, images: Tensor, labels: Tensor | None) -> Target:
        """Runs the teacher, and returns what the student has to learn of a batch."""
        if self.token_model is None:
            return Target(labels, logits_of(self.model(images)))
        result = forward_training(self.token_model, images, tail="full")
        answers = self.token_model.plan.adapter.logits(result.output)
        return Target(labels, logits_of(answers), result.tokens.x)


class LossModule(nn.Module):
    """A slimmed model and its losses: images and targets in, the terms of the loss out."""

    def __init__(self, slimmed: SlimModel, config: TrainConfig) -> None:
        super().__init__()
        self.slimmed = slimmed
        self.config = config
        self.auxiliary = nn.ModuleList()
        if config.auxiliary:
            heads = 2 if config.distil == "token" else 1  # as many as the host has then
            classifiers = slimmed.plan.adapter.pooled_classifiers(slimmed.host)[:heads]
            self.auxiliary.extend(copy.deepcopy(classifiers))
        # The loss on tokens needs the patch rows of the last block.
        self.tail: Tail = "full" if config.tokens else slimmed.plan.tail

    def forward(
        self,
        images: Tensor,
        target: Target | None = None,
        removal: float = 1.0,
        layered: bool = False,  # noqa: FBT001, FBT002 (wrappers pass it by place)
    ) -> Tensor:
        """Returns the terms of the loss (5,), as `LOSS_TERMS` names them.

        Args:
            images: the batch.
            target: what to compare with. Without it, the logits are returned instead.
            removal: the share of what the schedule removes that is removed now.
            layered: whether every block selects again now.
        """
        if target is None:
            return logits_of(self.slimmed.plan.adapter.logits(self.slimmed(images)))
        config, slimmed = self.config, self.slimmed
        result = forward_training(
            slimmed,
            images,
            tail=self.tail,
            eased=removal,
            layered=layered,
            recompute=config.recompute,
        )
        labels, answers = self._compute_losses(slimmed.plan.adapter.logits(result.output), target)
        if self.auxiliary:
            class_token = result.tokens.x[:, 0]
            logits = [classifier(class_token) for classifier in self.auxiliary]
            second_labels, second_answers = self._compute_losses(
                tuple(logits) if len(logits) > 1 else logits[0], target
            )
            labels = labels.lerp(second_labels, config.auxiliary)
            answers = answers.lerp(second_answers, config.auxiliary)
        tokens = zero = labels.new_zeros(())
        if target.tokens is not None:
            tokens = token_loss(result.tokens, target.tokens)
        own = None
        if result.decisions and isinstance(slimmed.method, LearnedMethod):
            own = slimmed.method.loss(result.decisions)
        method = zero if own is None else own.float()
        total = (
            config.labels * labels
            + config.distil_weight * answers
            + config.tokens * tokens
            + method
        )
        return torch.stack(
            [total, labels.detach(), answers.detach(), tokens.detach(), method.detach()]
        )

    def _compute_losses(
        self, output: Tensor | tuple[Tensor, ...], target: Target
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of an output against the labels, and against the teacher's answers."""
        config = self.config
        # A distilled host in training has two heads: one for the labels, and one for its teacher.
        for_labels, for_teacher = output if isinstance(output, tuple) else (output, output)
        labels = answers = for_labels.new_zeros((), dtype=torch.float32)
        if target.labels is not None and config.labels:
            labels = label_loss(for_labels.float(), target.labels, config.smoothing)
        if target.answers is not None and config.distil != "none":
            answers = answer_loss(
                for_teacher.float(), target.answers.float(), config.distil, config.temperature
            )
        return labels, answers


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Returns the cross-entropy with classes (B,) or with probabilities (B, C).

    Only classes are smoothed here: mixup has smoothed its probabilities already.
    """
    if labels.ndim == 2:
        return -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def answer_loss(logits: Tensor, answers: Tensor, kind: Distil, temperature: float) -> Tensor:
    """Returns the loss against a teacher's logits.

    With kind="soft" it is KL(teacher || student) in nats times the squared temperature, otherwise
    the cross-entropy with the teacher's class.
    """
    if kind != "soft":
        return F.cross_entropy(logits, answers.argmax(dim=1))
    student = (logits / temperature).log_softmax(dim=1)
    teacher = (answers / temperature).log_softmax(dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def token_loss(tokens: Tokens, teacher_tokens: Tensor) -> Tensor:
    """Returns the mean squared distance of the final tokens from the teacher's at the same cells.

    The prefix and the remaining patches have a mean each, and these are added. In a single mean the
    class token, which the head reads, would be one row of many. A merged or fused row is compared
    at the cell that it is assigned to, a masked row not at all.
    """
    rows = with_prefix(tokens.cells(), tokens.prefix)
    distances = (tokens.x.float() - take(teacher_tokens, rows).float()).square().mean(dim=2)
    prefix, patches = distances[:, : tokens.prefix], distances[:, tokens.prefix :]
    alive = torch.ones_like(patches) if tokens.alive is None else tokens.alive.detach().float()
    patch_loss = (patches * alive).sum() / alive.sum().clamp(min=1)
    return patch_loss + prefix.mean() if tokens.prefix else patch_loss


def logits_of(output: Any) -> Tensor:
    """Returns the logits in a model's output, which is a tensor or has the attribute `logits`.

    Raises:
        UnsupportedModel: they are not class scores (B, C).
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedModel(
            f"Training takes models that answer with class scores (B, C); this one gives {shape}."
        )
    return logits
