"""The arguments of `patchslim benchmark`. No torch is imported here."""

from __future__ import annotations

from typing import Any

from patchslim.cli.options import add_command, path, whole_number, word
from patchslim.settings import BATCH, SEED, Range


def add_benchmark(commands: Any) -> None:
    """Adds the command with its arguments and help."""
    command = add_command(
        commands,
        "benchmark",
        "times exported and saved models on the CPU, one process a file, in turns",
        "patchslim benchmark dense.onnx slim.onnx --batch 8 --threads 2 --out times.json",
        "FILE is an ONNX file, a folder for OpenVINO, or a folder saved by patchslim, which PyTorch"
        "\nruns. The others are compared with the first one: give the model with all its tokens, on"
        "\nthe same runtime.",
    )
    command.usage = "%(prog)s FILE [FILE ...] [OPTION ...]"
    add = command.add_argument
    add("files", type=word, nargs="+", metavar="FILE")
    add(
        "--batch",
        type=whole_number(BATCH),
        default=8,
        metavar="N",
        help="images in a call (8); a batch of 1 is timed, too",
    )
    add(
        "--threads",
        type=whole_number(Range(1, 4096)),
        metavar="N",
        help="threads of each runtime; by default as many as PyTorch has here",
    )
    add(
        "--streams",
        type=whole_number(Range(1, 4096)),
        metavar="N",
        help="also run artefacts for OpenVINO with N calls at a time, for throughput",
    )
    add(
        "--rounds",
        type=whole_number(Range(1, 1e6)),
        default=20,
        metavar="N",
        help="how often each is timed (20)",
    )
    add(
        "--warmup",
        type=whole_number(Range(1, 1e6)),
        default=3,
        metavar="N",
        help="rounds before that, which are not counted (3)",
    )
    add(
        "--seed",
        type=whole_number(SEED),
        default=0,
        metavar="N",
        help="of the noise that stands in for images, and of the order (0)",
    )
    add("--out", type=path, metavar="FILE", help="where to save everything as JSON")
    add("--csv", type=path, metavar="FILE", help="where to save it as CSV, with timm's columns")
