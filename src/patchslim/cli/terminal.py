"""What a command prints while it works: single lines on stderr, since stdout is for the answer."""

from __future__ import annotations

import shutil
import sys
import time

PROGRESS_INTERVAL = 5.0  # seconds between lines of progress in a log, where they add up


class Terminal:
    """Prints notes, and progress that overwrites itself on a terminal and is rare in a log.

    Attributes:
        silent: print nothing but errors, since another process prints for all of them.
    """

    def __init__(self) -> None:
        self.silent = False
        self._stream = sys.stderr
        self._live = self._stream.isatty()
        self._has_progress = False
        self._last_progress = -PROGRESS_INTERVAL

    def note(self, line: str) -> None:
        """Prints a line that stays."""
        if not self.silent:
            self.fail(line)

    def fail(self, line: str) -> None:
        """Prints the reason why this process ends."""
        self.clear()
        self._stream.write(line + "\n")
        self._stream.flush()

    def progress(self, line: str) -> None:
        """Shows a line until the next line replaces it."""
        if self.silent:
            return
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{line[:width]}\x1b[K")
            self._stream.flush()
            self._has_progress = True
        elif time.monotonic() - self._last_progress >= PROGRESS_INTERVAL:
            self._last_progress = time.monotonic()
            self.note(line)

    def clear(self) -> None:
        """Removes the line of progress that is on the screen."""
        if self._has_progress:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._has_progress = False
