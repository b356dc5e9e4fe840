"""`Goal`: what a calibration has to reach. Plain values, checked for their types."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Real

from patchslim.errors import BadSchedule
from patchslim.schedules.schedule import Schedule


@dataclass(frozen=True)
class Goal:
    """What a calibration has to reach. Each kind of method takes some of these.

    Attributes:
        macs: a budget, as a share of the host's multiply-adds or as a number of them. Where images
            keep different numbers of patches, it is the mean over the images.
        tolerance: the largest error of a block's features.
        agreement: the share of images whose answer must stay the dense model's.
        cap: the most that any image may cost, written like `macs`.
        schedule: the token count after each block. Where images keep different numbers of patches,
            it is the most that any image may keep.

    Raises:
        BadSchedule: a value has the wrong type.
    """

    macs: float | None = None
    tolerance: float | None = None
    agreement: float | None = None
    cap: float | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None:
                continue
            if each.name == "schedule":
                if not isinstance(value, Schedule):
                    raise BadSchedule(
                        f"schedule={value!r}: give a Schedule, such as Schedule.load(path)."
                    )
            elif isinstance(value, bool) or not isinstance(value, Real):
                raise BadSchedule(f"{each.name}={value!r}: give a number, such as 0.6.")

    def check_same_counts(self, name: str) -> None:
        """Refuses `agreement` and `cap` for a method that keeps the same number in all images.

        Args:
            name: the method, for the error message.
        """
        if self.agreement is not None or self.cap is not None:
            raise BadSchedule(
                "agreement and cap are for methods that let images keep different numbers of "
                f"patches; {name} takes macs, tolerance or schedule."
            )
