"""`completion`: a script that lets a shell complete commands, options, methods and files.

shtab writes the script from the parser, so that a new option is completed without further work.
"""

from __future__ import annotations

from argparse import Action, Namespace

from patchslim.cli.options import Parser
from patchslim.cli.result import CommandResult
from patchslim.methods._registry import method_names
from patchslim.versions import check_version

SHELLS = ("bash", "zsh", "fish")
FILES = {"FILE", "FILE.png", "IMAGE", "MODEL", "PATH", "WEIGHTS"}
FOLDERS = {"FOLDER"}


def completion(args: Namespace, parser: Parser) -> CommandResult:
    """Writes the completion script for one shell."""
    check_version("shtab", (1, 13))
    import shtab

    for action in parser.all_actions():
        _choose_what_completes(action, shtab.FILE, shtab.DIRECTORY)
    script = shtab.complete(parser, args.shell)
    return CommandResult(script, {"shell": args.shell, "script": script})


def _choose_what_completes(action: Action, files: object, folders: object) -> None:
    """Tells shtab what may follow an option, by its placeholder in `--help`."""
    if action.dest == "method":
        action.choices = method_names()
    elif action.metavar in FILES:
        action.complete = files  # type: ignore[attr-defined]  # shtab looks for this attribute
    elif action.metavar in FOLDERS:
        action.complete = folders  # type: ignore[attr-defined]
