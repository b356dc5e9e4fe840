"""`Goal`: what a calibration has to reach. Plain values, checked for their types."""

from __future__ import annotations

from dataclasses import dataclass, fields

from patchslim.errors import BadSchedule
from patchslim.schedules.schedule import Schedule
from patchslim.settings import FINITE, Range, check_type, check_value

POSITIVE = Range(0, 1e30, above=True)
SHARE_OF_COST = "Give a share such as 0.6, or a number of multiply-adds."
# Whether a budget can be met is said where the host's own cost is known.
NEEDED: dict[str, tuple[Range, str]] = {
    "macs": (FINITE, SHARE_OF_COST),
    "cap": (FINITE, SHARE_OF_COST),
    "tolerance": (POSITIVE, "Give the largest error, such as 0.02."),
    "agreement": (
        Range(0, 1, above=True, below=True),
        "Give the share of answers that stay, such as 0.95.",
    ),
}


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
                cure = "Give a Schedule, such as Schedule.load(path)."
                check_type("schedule", value, Schedule, cure, BadSchedule)
            else:
                within, cure = NEEDED[each.name]
                plain = check_value(each.name, value, float, within, BadSchedule, cure)
                object.__setattr__(self, each.name, plain)  # frozen, but still being made

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
