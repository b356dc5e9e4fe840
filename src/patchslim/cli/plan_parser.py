"""The arguments of `patchslim plan`. No torch is imported here."""

from __future__ import annotations

from typing import Any

from patchslim.cli.options import (
    add_command,
    add_limits,
    add_method_settings,
    add_weights,
    parse_number,
    path,
    whole_number,
    word,
)
from patchslim.settings import BATCH, Range


def add_plan(commands: Any, model_help: str, data_help: str) -> None:
    """Adds the command with its arguments and help."""
    command = add_command(
        commands,
        "plan",
        "finds what is as fast as asked on this device, and changes the answers least",
        "patchslim plan deit_small_patch16_224 --weights deit.safetensors \\\n"
        "           --data imagenet/train --latency-ms 40 --batch 8 --out runs/deit-40ms",
        model_help,
    )
    command.usage = "%(prog)s MODEL --data PATH [OPTION ...]"
    add = command.add_argument
    add("model", type=word, metavar="MODEL")
    add(
        "--data",
        type=word,
        metavar="PATH",
        help=f"{data_help} (the default for MODEL digits); no labels",
    )
    add("--limit", type=whole_number(), default=256, metavar="N", help="how many images (256)")
    add("--out", type=path, metavar="FOLDER", help="where to save the planned model")
    add_limits(command)
    add_weights(command)
    group = command.add_argument_group("target (give one)")
    add = group.add_argument
    add("--latency-ms", type=parse_number, metavar="X", help="milliseconds of a call with a batch")
    add("--images-per-second", type=parse_number, metavar="X", help="how many there have to be")
    add("--macs", type=parse_number, metavar="X", help="operations: a share, or a number")
    add("--max-kl", type=parse_number, metavar="X", help="KL from the dense answers; the fastest")
    group = command.add_argument_group("method, and what it runs on")
    add = group.add_argument
    add("--method", default="auto", metavar="NAME", help="auto (default): the best of all")
    add_method_settings(group)
    add("--batch", type=whole_number(BATCH), default=8, metavar="N", help="images in a call (8)")
    add("--runtime", type=word, default="eager", metavar="NAME", help="eager, openvino or onnx")
    add("--precision", type=word, metavar="WORD", help="of an exported model (float32)")
    add(
        "--threads",
        type=whole_number(Range(1, 4096)),
        metavar="N",
        help="by default as many as PyTorch has here",
    )
    add(
        "--seconds",
        type=parse_number,
        default=30.0,
        metavar="X",
        help="how long the blocks of one method may be timed (30)",
    )
    add("--fresh", action="store_true", help="time blocks again that were timed on this device")
