"""`Pace`: how fast the steps of a run are, how long the rest takes, and one line that says so."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence

RECENT_STEPS = 50  # steps whose time counts


class StepTimer:
    """A clock for steps that are `total` in number, of which `done` are done."""

    def __init__(self, total: int, done: int, batch: int) -> None:
        self.total_steps = total
        self.batch = batch
        self.seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._done = done
        self._begun = time.perf_counter()

    def finish_step(self) -> float:
        """Images a second in the step that ends now, the wait for its images included."""
        now = time.perf_counter()
        self.seconds.append(now - self._begun)
        self._begun = now
        self._done += 1
        return self.batch / self.seconds[-1]

    def restart_clock(self) -> None:
        """What was done since the last step is no part of the next."""
        self._begun = time.perf_counter()

    def time_left(self) -> str:
        """How long the rest takes."""
        return _format_time(statistics.median(self.seconds) * (self.total_steps - self._done))

    def status_line(self, values: Mapping[str, float], unreadable: Sequence[str]) -> str:
        """Where the run is, in one line."""
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
    """A time as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
