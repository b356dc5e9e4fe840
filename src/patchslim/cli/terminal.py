"""What a command says while it works: single lines on stderr, so that stdout is for the answer.

It does not know what it is told.
"""

from __future__ import annotations

import shutil
import sys
import time

PROGRESS_INTERVAL = (
    5.0  # seconds between two lines of progress where they cannot replace each other
)


class Terminal:
    """Notes that stay, and progress that is overwritten on a terminal and thinned out in a log.

    Attributes:
        silent: whether another process speaks for this one; only an error is said all the same.
    """

    def __init__(self) -> None:
        self.silent = False
        self._stream = sys.stderr
        self._live = self._stream.isatty()
        self._shown = False
        self._said = -PROGRESS_INTERVAL

    def note(self, line: str) -> None:
        """Writes a line that stays."""
        if not self.silent:
            self.fail(line)

    def fail(self, line: str) -> None:
        """Writes the line that says why this process ends."""
        self.clear()
        self._stream.write(line + "\n")
        self._stream.flush()

    def progress(self, line: str) -> None:
        """Shows a line until the next one comes."""
        if self.silent:
            return
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{line[:width]}\x1b[K")
            self._stream.flush()
            self._shown = True
        elif time.monotonic() - self._said >= PROGRESS_INTERVAL:
            self._said = time.monotonic()
            self.note(line)

    def clear(self) -> None:
        """Takes away the line that was shown last."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._shown = False
