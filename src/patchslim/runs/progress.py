"""Progress of a long run: the callback that takes it, and a timer for the steps."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from patchslim.settings import check_type

Progress = Callable[[str], object]  # is called with one line of text at a time

RECENT_STEPS = 50  # the speed is the median over this many of the latest steps


def ignore_progress(_: str) -> None:
    """Does nothing. It is the `Progress` of a caller who gave none."""


def check_progress(progress: Progress | None) -> Progress:
    """The callback that a caller gave, or one that does nothing."""
    if progress is None:
        return ignore_progress
    cure = "Give a function that takes a line of text, such as print."
    check_type("progress", progress, Callable, cure)
    return progress


class StepTimer:
    """Measures how fast the steps of a run are, and estimates how long the rest takes.

    Args:
        total: how many steps the run has.
        done: how many of them were done before this timer was made.
        batch: how many images a step has.
    """

    def __init__(self, total: int, done: int, batch: int) -> None:
        self.total_steps = total
        self.batch = batch
        self.seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._done = done
        self._begun = time.perf_counter()

    def finish_step(self) -> float:
        """Counts one more step, and returns its images a second. Waiting for images counts too."""
        now = time.perf_counter()
        self.seconds.append(now - self._begun)
        self._begun = now
        self._done += 1
        return self.batch / self.seconds[-1]

    def restart_clock(self) -> None:
        """Starts the next step now. A validation between two steps counts for neither."""
        self._begun = time.perf_counter()

    def time_left(self) -> str:
        """Returns how long the remaining steps will take, as text."""
        return _format_time(statistics.median(self.seconds) * (self.total_steps - self._done))

    def status_line(self, values: Mapping[str, float], unreadable: Sequence[str]) -> str:
        """Returns one line of text that says how far the run is."""
        usual = statistics.median(self.seconds)
        parts = [
            f"step {self._done}/{self.total_steps}",
            f"loss {values['loss']:.4g}",
            f"{self.batch / usual:.0f} img/s",
            f"{self.time_left()} left",
        ]
        if "kl" in values:
            parts.append(f"KL {values['kl']:.4f}")
        if unreadable:
            parts.append(f"{len(unreadable)} unreadable")
        return ", ".join(parts)


def _format_time(seconds: float) -> str:
    """Formats a duration: "2 h 05 min", "3 min 20 s" or "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
