"""The door to the terminal: every name and message that a command shows goes through here.

Names come from folders, archives and data sets of other people. A line break or an escape sequence
in one could forge a line of ours, or write over the screen. So characters that do not print are
written as Python would write them (`\\n`, `\\x1b`), and a message is never longer than a screen.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from patchslim.errors import shorten_message

PROGRESS_INTERVAL = 5.0  # seconds between lines of progress in a log, where they add up


def show_name(text: object) -> str:
    """A name as it may stand in an answer: on one line, and every character can be seen."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in str(text)
    )


def show_text(text: str) -> str:
    """An answer of several lines, in which every other character can be seen."""
    return "\n".join(map(show_name, text.split("\n")))


def show_line(text: str) -> str:
    """A message as one line of a readable length."""
    return show_name(shorten_message(text))


def write_text(stream: TextIO, text: str) -> None:
    """Writes and flushes; characters that the terminal does not know are written as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


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
        write_text(self._stream, show_line(line) + "\n")

    def answer(self, text: str) -> None:
        """Prints the answer of the command, of one or more lines, on stdout."""
        self.clear()
        write_text(sys.stdout, show_text(text) + "\n")

    def progress(self, line: str) -> None:
        """Shows a line until the next line replaces it."""
        if self.silent:
            return
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            write_text(self._stream, f"\r{show_name(line)[:width]}\x1b[K")
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
