"""`PlanResult`: the planned model, with what was predicted of it beside what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from patchslim.benchmarking.result import Ratio
from patchslim.methods._registry import method_label
from patchslim.model.model import SlimModel
from patchslim.planning.goal import PlanGoal
from patchslim.report.row import Estimate

DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """A schedule that was considered.

    Attributes:
        method: the name of its method.
        by: how it was found: "search", or "rule" for the method's own, there or in fewer blocks.
        predicted: its time as a share of the dense model's, as the table says.
        kl: its mean KL divergence on the images that are searched.
        counts: tokens after each block.
    """

    method: str
    by: str
    predicted: float
    kl: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class PlanResult:
    """The answer to a plan.

    Attributes:
        model: the slimmed model. Where nothing is faster than the dense model, it removes nothing.
        goal: what was asked for.
        device: what it was planned for: runtime, precision, batch, threads.
        predicted: its time as a share of the dense model's, as the sum over its blocks; None for
            the dense model.
        measured: the same, measured from end to end, with its 95 % interval.
        dense_ms: milliseconds of one call of the dense model in those rounds.
        kl, agreement: what changes in the answers, on images that were not searched.
        images: on how many images that was measured.
        candidates: the schedules that were considered last, best first.
        check_error: how far sums over blocks were off for whole schedules, at most.
    """

    model: SlimModel
    goal: PlanGoal
    device: dict[str, Any]
    predicted: float | None
    measured: Ratio
    dense_ms: float
    kl: Estimate
    agreement: Estimate
    images: int
    candidates: tuple[Candidate, ...]
    check_error: float | None

    @property
    def is_dense(self) -> bool:
        """Whether the answer is the dense model, since nothing that was found is faster."""
        return not self.model.plan.decision_blocks

    @property
    def latency_ms(self) -> float:
        """Milliseconds of one call: the measured share of the dense model's."""
        return self.measured.median * self.dense_ms

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the model as plain data. The recipe of the model holds it, too."""
        return {
            "goal": self.goal.to_json(),
            "method": DENSE if self.is_dense else method_label(self.model.method),
            "counts": list(self.model.plan.counts),
            **self.device,
            "predicted": self.predicted,
            "measured": asdict(self.measured),
            "dense_ms": self.dense_ms,
            "latency_ms": self.latency_ms,
            "kl": asdict(self.kl),
            "agreement": asdict(self.agreement),
            "images": self.images,
            "check_error": self.check_error,
            "candidates": [asdict(each) for each in self.candidates],
        }

    def lines(self) -> list[str]:
        """Says in a few lines what was predicted, and what was measured."""
        device = "{runtime} {precision}, batch {batch}, {threads} threads".format(**self.device)
        measured = f"{self.measured.median:.3f} of dense [{self.measured.low:.3f} "
        measured += f"{self.measured.high:.3f}], {self.latency_ms:.2f} of {self.dense_ms:.2f} ms"
        lines = [f"target         {self.goal}, on {device}"]
        if self.is_dense:
            lines.append("answer         the dense model: nothing that was found is faster")
        if self.predicted is not None:
            lines.append(f"predicted      {self.predicted:.3f} of the dense time")
        if self.check_error is not None:
            lines.append(
                f"self-check     sums over blocks are off by {self.check_error:.1%} at most"
            )
        same = self.agreement.show(percent=True)
        lines.append(f"measured       {measured}")
        lines.append(f"answers        KL {self.kl.show()} nats, {same} % the same")
        lines.append(f"               on {self.images} images that were not searched")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())
