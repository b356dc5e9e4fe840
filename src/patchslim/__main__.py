"""`patchslim` and `python -m patchslim`: start the command line.

Importing torch and timm takes seconds. Nothing is imported at the top of this file but what Python
has loaded already, so that Ctrl-C ends the program in one line from the beginning.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # importing it from typing takes milliseconds
if TYPE_CHECKING:
    from types import FrameType

EXIT_INTERRUPTED = 130


def main() -> int:
    """Runs one command in this process and returns its exit code."""
    try:
        _exit_when_an_import_is_interrupted()
        from patchslim.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        _write_interrupted()
        return EXIT_INTERRUPTED


def _exit_when_an_import_is_interrupted() -> None:
    """Makes Ctrl-C end this process at once while Python is importing.

    A KeyboardInterrupt there gets lost: libraries catch it, or go on with half a module and fail in
    another place. Ending is safe, because nobody imports while a file is half written.
    """
    import signal

    process = os.getpid()

    def handle(_signal: int, frame: FrameType | None) -> None:
        # A child process of the data loader has this handler too; its parent prints for it.
        while frame is not None and os.getpid() == process:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                _write_interrupted()
                # Where to write may be owned already, so that a second command is refused at once.
                ownership = sys.modules.get("patchslim.runs.ownership")
                if ownership is not None and hasattr(ownership, "remove_traces"):
                    ownership.remove_traces()
                os._exit(EXIT_INTERRUPTED)
            frame = frame.f_back
        raise KeyboardInterrupt

    # If a shell started us in the background, Ctrl-C is not for us: leave it ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)


def _write_interrupted() -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"interrupted\n")


if __name__ == "__main__":
    sys.argv[0] = "patchslim"  # reports quote the command that made them, by its name
    sys.exit(main())
