"""The arguments of `patchslim bench`. No torch is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from patchslim.cli.options import (
    add_classes,
    add_command,
    add_limits,
    add_weights,
    parse_float,
    path,
    whole_number,
    word,
)
from patchslim.settings import BATCH, SEED, Range


def add_bench(commands: Any, model_help: str, data_help: str) -> None:
    """Adds the command with its arguments and help."""
    command = add_command(
        commands,
        "bench",
        "compares methods, budgets, runtimes, precisions and batches, and reports the best",
        "patchslim bench deit_small_patch16_224 --weights deit.safetensors --data imagenet/val \\\n"
        "           --budgets 0.75,0.5 --runtimes eager,openvino --out runs/bench",
        f"{model_help}\nEach combination is a cell. What is in --out already is not measured again:"
        "\na run that was stopped goes on with the same command.",
    )
    command.usage = "%(prog)s MODEL [MODEL ...] --out FOLDER [OPTION ...]"
    add = command.add_argument
    add("models", type=word, nargs="+", metavar="MODEL")
    add("--out", type=path, required=True, metavar="FOLDER", help="where everything is kept")
    add(
        "--data",
        type=word,
        metavar="PATH",
        help=f"{data_help} (the default for MODEL digits); with labels for accuracy",
    )
    add(
        "--calibration",
        type=word,
        metavar="PATH",
        help="other images, for methods that are calibrated and for int8; no labels",
    )
    add("--limit", type=whole_number(), metavar="N", help="how many images to score")
    add(
        "--corruptions",
        action="store_true",
        help="also score blurred, noisy, compressed and pale copies, at three strengths each",
    )
    add_classes(command)
    add_limits(command)
    add_weights(command)
    group = command.add_argument_group("cells (all combinations of these)")
    add = group.add_argument
    add(
        "--methods",
        type=_list_of(word),
        metavar="A,B",
        help="by default all that there are; resolution is the dense model on smaller images; a "
        "folder is a slimmed model that was saved",
    )
    add(
        "--budgets",
        type=_list_of(parse_float),
        default=(0.75, 0.5),
        metavar="X,Y",
        help="shares of the dense model's operations (0.75,0.5)",
    )
    add(
        "--runtimes",
        type=_list_of(word),
        default=("eager",),
        metavar="A,B",
        help="eager (PyTorch, the default), and targets of `patchslim export`",
    )
    add(
        "--precisions",
        type=_list_of(word),
        default=("float32",),
        metavar="A,B",
        help="float32 (the default), bfloat16, float16, int8",
    )
    add(
        "--batches",
        type=_list_of(whole_number(BATCH)),
        default=(8,),
        metavar="N,M",
        help="images in a call (8)",
    )
    group = command.add_argument_group("timing")
    add = group.add_argument
    add(
        "--rounds",
        type=whole_number(Range(0, 1e6)),
        default=20,
        metavar="N",
        help="how often each is timed (20); 0 for not at all",
    )
    add(
        "--threads",
        type=whole_number(Range(1, 4096)),
        metavar="N",
        help="by default as many as PyTorch has here",
    )
    add(
        "--workers",
        type=whole_number(Range(1, 4096)),
        metavar="N",
        help="let so many processes score, with Ray; times are measured by one",
    )
    add("--seed", type=whole_number(SEED), default=0, metavar="N", help="of random (0)")


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Returns a reader of values separated by commas, each once."""

    def read(text: str) -> tuple[Any, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list like A,B")
        return tuple(dict.fromkeys(parse(part) for part in parts))

    return read
