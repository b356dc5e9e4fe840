"""`PlanGoal`: what a plan has to reach, as one number of one kind."""

from __future__ import annotations

from dataclasses import dataclass, fields

from patchslim.errors import BadSchedule
from patchslim.settings import Range, check_value

POSITIVE = Range(0, 1e30, above=True)
NEEDED = {
    "latency_ms": "Give milliseconds of one call with the whole batch, such as 12.5.",
    "images_per_second": "Give how many images a second, such as 80.",
    "macs": "Give a share of the model's own (0.6), or multiply-adds an image (0.8e9).",
    "max_kl": "Give nats of the mean KL divergence from the dense answers, such as 0.01.",
}


@dataclass(frozen=True)
class PlanGoal:
    """What a plan has to reach: exactly one of these is given.

    Attributes:
        latency_ms: milliseconds that one call with a whole batch may take.
        images_per_second: how many images a second there have to be.
        macs: multiply-adds of an image, as a share of the host's or as a number.
        max_kl: how far answers may be from the dense model's, as mean KL divergence in nats; what
            is then asked for is the fastest.
    """

    latency_ms: float | None = None
    images_per_second: float | None = None
    macs: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        given = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        if len(given) != 1:
            told = f"Got {' and '.join(given)}" if given else "No target was given"
            raise BadSchedule(
                f"{told}. Give one of latency_ms=, images_per_second=, macs= and max_kl= "
                "(--latency-ms, --images-per-second, --macs, --max-kl)."
            )
        name = given[0]
        plain = check_value(name, getattr(self, name), float, POSITIVE, BadSchedule, NEEDED[name])
        object.__setattr__(self, name, float(plain))  # frozen, but still being made

    def seconds(self, batch: int) -> float | None:
        """Returns how long one call with a batch may take; None if the goal is of another kind."""
        if self.latency_ms is not None:
            return self.latency_ms / 1000
        return None if self.images_per_second is None else batch / self.images_per_second

    def to_json(self) -> dict[str, float]:
        """Returns the one target by its name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        ((name, value),) = self.to_json().items()
        return f"{name}={value:g}"
