"""What a command writes is owned by it from its start, before anything takes long.

torch is not imported here: a second command is refused in a moment.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator

from patchslim.files import check_writable
from patchslim.runs.ownership import own_file, own_folder

GROWING_FOLDERS = (
    "bench",
    "calibrate",
    "demo",
    "train",
)  # commands whose --out is a folder that grows
FOLDERS = (*GROWING_FOLDERS, "slim", "plan")


@contextlib.contextmanager
def own_outputs(args: Namespace) -> Iterator[None]:
    """Within the block, this process alone writes to --out, --csv and --html.

    Raises:
        BadFile: another process writes there, or nobody can.
    """
    with contextlib.ExitStack() as owned:
        for path in (getattr(args, name, None) for name in ("out", "csv", "html")):
            if path is not None:
                folder = path.is_dir() if args.command == "export" else args.command in FOLDERS
                check_writable(path, folder=folder)
                own = own_folder if args.command in GROWING_FOLDERS else own_file
                owned.enter_context(own(path))
        yield
