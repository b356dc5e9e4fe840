"""What a command writes is owned by it from its start, before anything takes long.

torch is not imported here: a second command is refused in a moment.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator

from patchslim.runs.ownership import own_file, own_folder

FOLDER_COMMANDS = ("calibrate", "demo", "train")  # their --out is a folder that grows


@contextlib.contextmanager
def own_outputs(args: Namespace) -> Iterator[None]:
    """Within the block, this process alone writes to --out and --csv.

    Raises:
        BadFile: another process writes there, or nobody can.
    """
    with contextlib.ExitStack() as owned:
        for path in (getattr(args, "out", None), getattr(args, "csv", None)):
            if path is not None:
                own = own_folder if args.command in FOLDER_COMMANDS else own_file
                owned.enter_context(own(path))
        yield
