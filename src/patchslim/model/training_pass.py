"""`forward_training`: a forward pass with all that a loss may read."""

from __future__ import annotations

from torch import Tensor

from patchslim.methods import Decision
from patchslim.model.model import SlimModel
from patchslim.model.step import TrainingOutput
from patchslim.schedules.schedule import Tail


def forward_training(
    slimmed: SlimModel,
    images: Tensor,
    *,
    tail: Tail,
    eased: float = 1.0,
    layered: bool = False,
    recompute: bool = False,
) -> TrainingOutput:
    """Runs a forward pass for training: returns the answer, and what the losses read.

    Args:
        slimmed: the model.
        images: as in a call.
        tail: "full" if a loss reads the patch tokens, else the model's own.
        eased: the share in (0, 1] of what the schedule removes that is removed now.
        layered: whether every block from the first decision on decides again.
        recompute: whether activations are computed again in the backward pass, not kept.
    """
    forward = slimmed.start_pass()
    host, adapter = forward.host, forward.adapter
    tokens = forward.embed(images, {}, track=forward.facts.returns_rows)
    entered = tokens.patches
    steps = forward.steps(tokens, tail=tail, eased=eased, layered=layered)
    if tail == "exact" and steps[-1].place is not None:
        # A loss reads what the last block decides.
        steps = forward.steps(tokens, tail="full", eased=eased, layered=layered)
    decisions: list[Decision] = []
    for step in steps:
        tokens = forward.run_or_recompute(step, tokens, recompute=recompute)
        if step.place is not None:
            share = (step.left - tokens.prefix) / entered
            decisions.append(Decision(step.index, share, tokens.alive))
    tokens = tokens.rejoin()
    output = adapter.head(host, tokens, {})
    normed = tokens.with_x(adapter.norm(host, tokens.x))
    return TrainingOutput(output, normed, tuple(decisions))
