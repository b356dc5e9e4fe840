"""The parser class, and the options that several commands share.

This file knows how an option is written and read, not what it does. It imports no torch.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.cli.terminal import show_line, write_text
from patchslim.errors import LONGEST_WORD, shorten
from patchslim.methods._registry import DEFAULT_METHOD
from patchslim.settings import Range, group_settings
from patchslim.training.config import RECIPES, TrainConfig

EXIT_USAGE_ERROR = 2  # as in argparse
COUNT = Range(1, 1e9)
METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """argparse with errors in two lines, which name the nearest known name.

    Attributes:
        commands: the parser of each command, by its name.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )
        self.commands: dict[str, Parser] = {}

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and where to find help."""
        write_text(sys.stderr, f"{show_line(f'error: {message}')}\nhelp: {self.prog} --help\n")
        sys.exit(EXIT_USAGE_ERROR)

    def parse_command(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses the arguments of a command; the command itself refuses unknown options."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.commands[args.command].refuse_unknown(unknown)
        return args

    def refuse_unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Ends the program with the arguments that are not known and the nearest options."""
        hints = [
            _nearest(each.partition("=")[0], self._option_string_actions)
            for each in arguments
            if each.startswith("-")
        ]
        self.error(f"unrecognized arguments: {' '.join(arguments)}.{''.join(hints)}")

    def all_actions(self) -> Iterator[argparse.Action]:
        """Lists every argument of this parser and of all its commands."""
        yield from self._actions
        for command in self.commands.values():
            yield from command.all_actions()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuses what is not among the choices, and names the nearest of them."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(each) for each in action.choices]
        raise argparse.ArgumentError(
            action,
            f"invalid choice: {value!r}.{_nearest(str(value), choices)} "
            f"Known: {', '.join(choices)}.",
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    """Asks whether the nearest known name was meant; nothing if none is near."""
    bare = {each.lstrip("-"): each for each in known}  # dashes would make all options alike
    near = difflib.get_close_matches(shorten(name, LONGEST_WORD).lstrip("-"), bare, n=1)
    return f" Did you mean {bare[near[0]]!r}?" if near else ""


class ShowVersion(argparse.Action):
    """`--version`. The version is read only on request, since that takes a while."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Prints the version and ends the program."""
        from patchslim.versions import package_version

        sys.stdout.write(f"patchslim {package_version()}\n")
        parser.exit()


def add_command(commands: Any, name: str, purpose: str, example: str, more: str = "") -> Parser:
    """Adds a command with its help, an example, and `--json`."""
    command: Parser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{more}".rstrip(),
        epilog=f"example:\n  {example}",
    )
    command.add_argument(
        "--json", action="store_true", help="print the answer as JSON, and nothing else, on stdout"
    )
    return command


def add_classes(group: Any) -> None:
    """Adds `--classes`: the names of classes, for images in class folders."""
    group.add_argument(
        "--classes",
        type=path,
        metavar="FILE",
        help="names of the class folders in the order of the labels, one per line",
    )


def add_limits(group: Any) -> None:
    """Adds `--limits`: how large images and archives may be."""
    group.add_argument(
        "--limits",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="how much is read at most: file_bytes, pixels, members, ratio or shards (see the page "
        "on security); may be repeated",
    )


def add_weights(command: Parser) -> None:
    """Adds the options for a model that is built by name: how, and with which weights."""
    group = command.add_argument_group("weights of a model that is built by name")
    add = group.add_argument
    add("--weights", type=path, metavar="FILE", help="a .safetensors or torch file")
    add("--pretrained", action="store_true", help="let its library download them")
    add(
        "--model-kwargs",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a keyword for its library, such as timm's global_pool=avg or num_classes=10; may be "
        "repeated",
    )


def add_method(command: Parser) -> None:
    """Adds the method with its settings, and every kind of budget."""
    group = command.add_argument_group("method and budget (give one budget)")
    add = group.add_argument
    add(
        "--method",
        metavar="NAME",
        help=f"{DEFAULT_METHOD} by default; `patchslim methods` lists them all",
    )
    add_method_settings(group)
    add(
        "--macs",
        type=parse_float,
        metavar="X",
        help="operations: a share (0.6) or a number (0.8e9)",
    )
    add(
        "--keep",
        type=_parse_keep,
        metavar="X",
        help="share of patches left at the end, or a count for each block: 90,80,...",
    )
    add(
        "--r",
        type=_parse_removed,
        metavar="N",
        help="tokens removed per block: 13, or a list 13,12,..., or decreasing 13:-1",
    )
    add(
        "--keep-rate",
        type=parse_float,
        metavar="X",
        help="share of patches kept at each block of --at",
    )
    add("--at", type=_parse_ints, metavar="3,6,9", help="blocks, counted from 0")
    add("--schedule", type=path, metavar="FILE", help="a saved schedule, instead of a budget")
    add(
        "--tail",
        choices=("exact", "full"),
        help="rows that the last block computes: only those the head reads (exact), or all (full); "
        "exact with --macs",
    )


def add_method_settings(group: Any) -> None:
    """Adds `--set`: the settings of the method."""
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the method; may be repeated",
    )


def add_training_options(command: Parser) -> None:
    """Adds `--recipe` and one option for each setting of `TrainConfig`."""
    group = command.add_argument_group(
        "training settings (defaults in brackets)",
        "Some methods have defaults of their own; `patchslim methods` lists them.",
    )
    group.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="published settings for training from scratch; options given beside it win",
    )
    _add_settings(command, TrainConfig)


def add_search_options(command: Parser) -> None:
    """Adds one option for each setting of `PatchSlimmingConfig`."""
    _add_settings(command, PatchSlimmingConfig)


def _add_settings(command: Parser, config: type[TrainConfig] | type[PatchSlimmingConfig]) -> None:
    """Adds one option for each field of a dataclass, in the group that the field names.

    An option that is not given is not in the parsed arguments, so that other defaults can apply.
    """
    kinds = get_type_hints(config)
    for title, settings in group_settings(config).items():
        add = command.add_argument_group(title).add_argument
        for each in settings:
            option, kind = f"--{each.name.replace('_', '-')}", kinds[each.name]
            about = str(each.metadata["about"]).replace("%", "%%")
            if kind is bool:
                add(option, action="store_true", default=argparse.SUPPRESS, help=about)
                continue
            usual = each.metadata["usual"]
            shown = f"{usual:g}" if kind is float else str(usual)
            add(
                option,
                type=str if get_args(kind) else kind,
                choices=get_args(kind) or None,
                default=argparse.SUPPRESS,
                metavar=METAVARS.get(kind),
                help=f"{about} ({shown})" if shown else about,
            )


def whole_number(within: Range = COUNT) -> Callable[[str], int]:
    """A reader of whole numbers in a range, for the `type` of an argument."""

    def read(text: str) -> int:
        value = _parse_digits(text)
        if value is None or value not in within:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of {within.low:g} or more, up to {within.high:.0f}"
            )
        return value

    return read


def word(text: str) -> str:
    """Reads a name or a path, which may be anything but empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a name or a path")
    return text


def path(text: str) -> Path:
    """Reads the path of a file or a folder."""
    return Path(word(text))


def _parse_digits(text: str) -> int | None:
    """Reads a whole number of a size that some machine could count to; None for anything else."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def _parse_ints(text: str) -> tuple[int, ...]:
    """Reads whole numbers separated by commas."""
    numbers = [_parse_digits(part.strip()) for part in text.split(",")]
    if None in numbers:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3,6,9")
    return tuple(number for number in numbers if number is not None)


def _parse_keep(text: str) -> float | list[int]:
    """Reads a share, or one count per block."""
    return list(_parse_ints(text)) if "," in text else parse_number(text)


def _parse_removed(text: str) -> float | list[int] | tuple[float, float]:
    """Reads one number for all blocks, one for each block, or a number and how it changes."""
    if "," in text:
        return list(_parse_ints(text))
    number, colon, inflect = text.partition(":")
    return (parse_number(number), parse_number(inflect)) if colon else parse_number(number)


def parse_float(text: str) -> float:
    """Reads a number, as a float."""
    return float(parse_number(text))


def parse_number(text: str) -> float:
    """Reads a number, as an int if it is whole."""
    whole = _parse_digits(text)
    if whole is not None:
        return whole
    try:
        return float(text)
    except ValueError:
        share = " A share is written as 0.6." if text.endswith("%") else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a number.{share}") from None
