"""Ctrl-C is remembered, because libraries lose it.

A reader of files may call an interrupted read a broken file. Whatever error comes behind Ctrl-C is
its consequence, and the user wants to hear of Ctrl-C.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_was_interrupted = threading.Event()


@contextlib.contextmanager
def remember_interrupts() -> Iterator[None]:
    """Lets Ctrl-C do within the block what it did before, and remembers it."""
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not callable(before) or not in_main_thread:  # it is ignored, or somebody else handles it
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        _was_interrupted.set()
        before(number, frame)

    _was_interrupted.clear()
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def restore_interrupts() -> Iterator[None]:
    """Turns an error that comes behind Ctrl-C into the KeyboardInterrupt that it hides."""
    try:
        yield
    except Exception as error:
        if _was_interrupted.is_set():
            raise KeyboardInterrupt from error
        raise
