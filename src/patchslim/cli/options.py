"""Options that commands share: model and weights, method and budget, images, course and search.

It knows how an option is spelled and read, and not what it does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from patchslim.calibration.patch_slimming.config import PatchSlimmingConfig
from patchslim.methods._registry import find_method, method_names
from patchslim.training.config import RECIPES, TrainConfig

EXIT_USAGE_ERROR = 2  # exit code for a user's mistake, as argparse has it
METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """argparse, with its errors in two lines."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and where to find help."""
        sys.stderr.write(f"error: {message}\nhelp: {self.prog} --help\n")
        sys.exit(EXIT_USAGE_ERROR)


def add_command(commands: Any, name: str, purpose: str, example: str, more: str = "") -> Parser:
    """A command with its help, an example, and the option that machines use."""
    one: Parser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{more}".rstrip(),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    one.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    return one


def add_classes(one: Parser) -> None:
    """The names of classes, for images in class folders."""
    one.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="names of the class folders, by label, one a line",
    )


def add_weights(one: Parser) -> None:
    """Where the weights of a model that is built by name come from."""
    group = one.add_argument_group("weights of a model that is built by name")
    group.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors or a torch file")
    group.add_argument("--pretrained", action="store_true", help="let its library fetch them")
    group.add_argument(
        "--model-kwargs",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what its library builds it with, such as timm's global_pool=avg, num_classes=10",
    )


def add_method(one: Parser) -> None:
    """The method with its settings, and every budget."""
    group = one.add_argument_group("method and budget (give one budget)")
    add = group.add_argument
    add("--method", metavar="NAME", help="tome by default; `patchslim methods` lists them")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    add("--macs", type=float, metavar="X", help="operations: a share (0.6) or a number (0.8e9)")
    add(
        "--keep",
        type=_parse_keep,
        metavar="X",
        help="share of patches left at the end, or a count a block",
    )
    add(
        "--r",
        type=_parse_removed,
        metavar="N",
        help="tokens removed a block: 13, or 13,13,...; or 13:-1",
    )
    add("--keep-rate", type=float, metavar="X", help="share of patches kept at each of --at")
    add("--at", type=_parse_ints, metavar="3,6,9", help="blocks, counted from 0")
    add("--schedule", type=Path, metavar="FILE", help="a saved schedule instead of a budget")
    add(
        "--tail", choices=("exact", "full"), help="what the last block computes (exact with --macs)"
    )


def add_training_options(one: Parser) -> None:
    """One option for each field of `Course`; only what is given is in the arguments."""
    own = [
        f"{name}: {_settings_text(find_method(name).training_defaults)}" for name in method_names()
    ]
    told = [line for line in own if not line.endswith(": ")]
    group = one.add_argument_group("course (usual values in brackets)", "; ".join(told))
    group.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="what authors train from scratch with: all of the course that is not said otherwise",
    )
    _add_fields(group, TrainConfig)


def add_search_options(one: Parser) -> None:
    """One option for each field of `Search`; only what is given is in the arguments."""
    _add_fields(one.add_argument_group("search (usual values in brackets)"), PatchSlimmingConfig)


def _add_fields(group: Any, settings: type[TrainConfig] | type[PatchSlimmingConfig]) -> None:
    """One option for each field of a dataclass, by its type and what it says about itself."""
    kinds = get_type_hints(settings)
    for each in fields(settings):
        option, kind = f"--{each.name.replace('_', '-')}", kinds[each.name]
        about = str(each.metadata["about"]).replace("%", "%%")
        if kind is bool:
            group.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=about)
            continue
        default = each.metadata.get("usual", each.default)
        usual = f"{default:g}" if kind is float else str(default)
        group.add_argument(
            option,
            type=str if get_args(kind) else kind,
            choices=get_args(kind) or None,
            default=argparse.SUPPRESS,
            metavar=METAVARS.get(kind),
            help=f"{about} ({usual})" if usual else about,
        )


def positive_int(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _parse_ints(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 3,6,9") from None


def _parse_keep(text: str) -> float | list[int]:
    """A share, or one count a block."""
    return list(_parse_ints(text)) if "," in text else _parse_number(text)


def _parse_removed(text: str) -> float | list[int] | tuple[float, float]:
    """A number a block, one number for each block, or a number and how it is tilted."""
    if "," in text:
        return list(_parse_ints(text))
    number, colon, inflect = text.partition(":")
    return (_parse_number(number), _parse_number(inflect)) if colon else _parse_number(number)


def _parse_number(text: str) -> float:
    """A number, whole where it is."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _settings_text(course: Mapping[str, Any]) -> str:
    """What a method's authors train otherwise, as text."""
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in course.items())
