"""The parser of all commands: their names, arguments and help.

This file knows how commands are written, not what they do. It imports no torch, so that `--help`
and a typo are answered at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchslim.cli.bench_parser import add_bench
from patchslim.cli.benchmark_parser import add_benchmark
from patchslim.cli.completion import SHELLS
from patchslim.cli.options import (
    Parser,
    ShowVersion,
    add_classes,
    add_command,
    add_limits,
    add_method,
    add_method_settings,
    add_search_options,
    add_training_options,
    add_weights,
    parse_float,
    parse_number,
    path,
    whole_number,
    word,
)
from patchslim.cli.plan_parser import add_plan
from patchslim.deployment.registry import target_names
from patchslim.settings import BATCH, Range

MODEL_HELP = """\
MODEL is one of
  digits         the embedded example, with its trained weights
  a name         such as deit_small_patch16_224 (`patchslim models` lists them)
  a folder       of a Hugging Face image classifier (config.json and weights)
"""
EXPORTED_HELP = "  an artefact    exported for ONNX Runtime or OpenVINO\n"
SAVED_HELP = "  a folder       saved by patchslim; then leave method and budget out\n"
DATA_HELP = (
    "images: a folder, a .zip or .tar of one, a saved Hugging Face dataset, WebDataset shards, or "
    "`digits`"
)
# Listing all options here would take twenty lines.
SHORT_USAGE = "%(prog)s MODEL --out FOLDER [OPTION ...]"


def make_parser() -> Parser:
    """Makes the parser of all commands."""
    parser = Parser(
        prog="patchslim",
        description="Makes a vision transformer faster by giving it fewer patches, with proof.",
        epilog="example: patchslim demo\nexample: patchslim slim deit_small_patch16_224 --macs 0.6",
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_slim(commands)
    add_plan(commands, MODEL_HELP, DATA_HELP)
    _add_calibrate(commands)
    _add_train(commands)
    _add_export(commands)
    _add_measure(commands)
    add_bench(commands, MODEL_HELP, DATA_HELP)
    add_benchmark(commands)
    _add_macs(commands)
    _add_methods(commands)
    _add_models(commands)
    _add_show(commands)
    _add_completion(commands)
    parser.commands = commands.choices
    return parser


def _add_demo(commands: Any) -> None:
    command = add_command(
        commands,
        "demo",
        "slims the embedded example with every method, and reports accuracy and speed",
        "patchslim demo --out runs/demo",
    )
    add = command.add_argument
    add(
        "--out",
        type=path,
        default=Path("runs/demo"),
        metavar="FOLDER",
        help="where to write report.html and report.json (runs/demo)",
    )
    add(
        "--scenes",
        type=whole_number(Range(1, 1e5)),
        default=100,
        metavar="N",
        help="images to test on (100)",
    )


def _add_slim(commands: Any) -> None:
    command = add_command(
        commands,
        "slim",
        "slims a model, shows what is left of its tokens and operations, and saves it",
        "patchslim slim deit_small_patch16_224 --weights deit.safetensors --method tome \\\n"
        "           --macs 0.6 --out runs/deit-0.6",
        MODEL_HELP,
    )
    command.add_argument("model", type=word, metavar="MODEL")
    command.add_argument(
        "--out", type=path, metavar="FOLDER", help="where to save the slimmed model"
    )
    add_weights(command)
    add_method(command)


def _add_calibrate(commands: Any) -> None:
    command = add_command(
        commands,
        "calibrate",
        "finds on unlabelled images which patches each block can do without, or a threshold",
        "patchslim calibrate deit_small_patch16_224 --weights deit.safetensors --macs 0.6 \\\n"
        "           --data imagenet/train --out runs/deit-ps",
        MODEL_HELP,
    )
    command.usage = SHORT_USAGE
    add = command.add_argument
    add("model", type=word, metavar="MODEL")
    add(
        "--data",
        type=word,
        metavar="PATH",
        help=f"{DATA_HELP} (the default for MODEL digits); no labels",
    )
    add("--out", type=path, required=True, metavar="FOLDER", help="where to write everything")
    add("--resume", action="store_true", help="continue the calibration in --out")
    add_limits(command)
    add_weights(command)
    group = command.add_argument_group("method and goal (give one goal)")
    add = group.add_argument
    add(
        "--method",
        default="patch_slimming",
        metavar="NAME",
        help="patch_slimming (default) or patch_slimming_dynamic; or, for a threshold, similarity, "
        "tome, ats or duplicates, which keep a different number of patches in each image",
    )
    add_method_settings(group)
    add(
        "--macs",
        type=parse_float,
        metavar="X",
        help="operations: a share (0.6) or a number (0.8e9)",
    )
    add(
        "--tolerance",
        type=parse_float,
        metavar="X",
        help="the largest --error, instead of a budget",
    )
    add(
        "--agreement", type=parse_float, metavar="X", help="share of unchanged answers (thresholds)"
    )
    add(
        "--cap",
        type=parse_float,
        metavar="X",
        help="operations of the costliest image (thresholds)",
    )
    add("--schedule", type=path, metavar="FILE", help="a saved schedule: the counts, or the cap")
    add_search_options(command)


def _add_train(commands: Any) -> None:
    command = add_command(
        commands,
        "train",
        "fine-tunes a slimmed model, by default to answer as the untouched model does",
        "patchslim train deit_small_patch16_224 --weights deit.safetensors --method evit \\\n"
        "           --macs 0.6 --data imagenet/train --validation imagenet/val --out runs/evit",
        MODEL_HELP + SAVED_HELP,
    )
    command.usage = SHORT_USAGE
    add = command.add_argument
    add("model", type=word, metavar="MODEL")
    add("--out", type=path, required=True, metavar="FOLDER", help="where to write everything")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--tensorboard", action="store_true", help="also write TensorBoard files, beside log.csv")
    group = command.add_argument_group("images")
    add = group.add_argument
    add("--data", type=word, metavar="PATH", help=f"{DATA_HELP} (the default for MODEL digits)")
    add(
        "--validation",
        type=word,
        metavar="PATH",
        help="other images, to choose the best weights and report",
    )
    add_classes(group)
    add("--limit", type=whole_number(), metavar="N", help="how many images of each, evenly spread")
    add_limits(group)
    add_weights(command)
    add_method(command)
    group = command.add_argument_group("teacher")
    add = group.add_argument
    add(
        "--teacher",
        type=word,
        metavar="MODEL",
        help="the model to learn from; by default the untouched one",
    )
    add("--teacher-weights", type=path, metavar="FILE", help="weights of a teacher built by name")
    add_training_options(command)


def _add_export(commands: Any) -> None:
    command = add_command(
        commands,
        "export",
        "writes a slimmed model for another runtime, if it keeps and answers the same there",
        "patchslim export runs/deit-0.6 --to onnx --out deit-0.6.onnx --data imagenet/val",
        MODEL_HELP + SAVED_HELP,
    )
    command.usage = "%(prog)s MODEL [MODEL ...] --out PATH [OPTION ...]"
    add = command.add_argument
    add(
        "model",
        type=word,
        nargs="+",
        metavar="MODEL",
        help="several of one set of weights become a folder that holds the weights once",
    )
    add(
        "--to",
        choices=target_names(),
        metavar="TARGET",
        help=f"{', '.join(target_names())}; by default the one that PATH ends with",
    )
    add("--out", type=path, required=True, metavar="PATH", help="the file or folder to write")
    add(
        "--precision",
        type=word,
        default="float32",
        metavar="WORD",
        help="float32 (default), bfloat16, float16 or int8, as far as the target can",
    )
    add(
        "--layout",
        choices=("ovms", "triton"),
        metavar="SERVER",
        help="write a folder for ovms (OpenVINO Model Server) or triton, each MODEL a version",
    )
    add(
        "--max-kl",
        type=parse_number,
        metavar="X",
        help="how far a lower precision may be from float32 (mean KL divergence)",
    )
    add(
        "--max-drop",
        type=parse_number,
        metavar="SHARE",
        help="share of images whose first answer a lower precision may change",
    )
    add(
        "--batch",
        type=whole_number(BATCH),
        metavar="N",
        help="images that it takes in a call (by default any number; 1 for executorch)",
    )
    add(
        "--data",
        type=word,
        metavar="PATH",
        help=f"{DATA_HELP}, to check with besides random images",
    )
    add(
        "--limit",
        type=whole_number(),
        metavar="N",
        help="how many of them (16; 200 for int8, which finds ranges with half of them)",
    )
    add("--labels", type=path, metavar="FILE", help="names of the classes, one a line")
    add_limits(command)
    add_weights(command)
    add_method(command)


def _add_measure(commands: Any) -> None:
    command = add_command(
        commands,
        "measure",
        "measures a slimmed model beside its dense host and beside random patches",
        "patchslim measure runs/deit-0.6 --data imagenet/val --classes classes.txt --limit 1000",
        MODEL_HELP + SAVED_HELP + EXPORTED_HELP,
    )
    add = command.add_argument
    add("model", type=word, metavar="MODEL")
    add(
        "--data", type=word, metavar="PATH", help=f"{DATA_HELP}; without it only costs are measured"
    )
    add_classes(command)
    add("--limit", type=whole_number(), metavar="N", help="how many images, evenly spread")
    add_limits(command)
    add(
        "--dense",
        type=word,
        metavar="WEIGHTS",
        help="the model to compare with: before training, a file of weights, `digits`, or a "
        "folder; for an exported model the dense one, exported or saved",
    )
    add("--batch", type=whole_number(BATCH), default=8, metavar="N", help="images per batch (8)")
    add(
        "--repeats",
        type=whole_number(Range(0, 1e6)),
        default=20,
        metavar="N",
        help="rounds of timing (20); 0 for none",
    )
    add("--out", type=path, metavar="FILE", help="where to save the report as JSON")
    add("--csv", type=path, metavar="FILE", help="where to save it as CSV, with timm's columns")
    add("--html", type=path, metavar="FILE", help="where to save it as a page with charts")
    add("--card", action="store_true", help="put it into the model card of MODEL, a saved folder")
    add_weights(command)
    add_method(command)


def _add_macs(commands: Any) -> None:
    command = add_command(
        commands,
        "macs",
        "counts multiply-adds exactly, from shapes alone; needs no weights",
        "patchslim macs deit_small_patch16_224 --method evit --keep-rate 0.7 --at 3,6,9 --json",
        MODEL_HELP,
    )
    command.add_argument("model", type=word, metavar="MODEL")
    command.add_argument(
        "--image-size",
        type=whole_number(Range(1, 2**14)),
        metavar="N",
        help="side of the images (models by name)",
    )
    add_method(command)


def _add_methods(commands: Any) -> None:
    command = add_command(
        commands,
        "methods",
        "lists the methods: what they do, what they need, their settings and training defaults",
        "patchslim methods similarity",
    )
    command.add_argument("name", type=word, nargs="?", metavar="NAME", help="only this one")


def _add_models(commands: Any) -> None:
    command = add_command(
        commands,
        "models",
        "lists the families of models, and the names of models that they serve",
        "patchslim models dinov3",
    )
    command.add_argument("filter", nargs="?", default="", metavar="FILTER", help="part of a name")


def _add_show(commands: Any) -> None:
    command = add_command(
        commands,
        "show",
        "draws which patches of one image survive, at several depths",
        "patchslim show runs/deit-0.6 cat.jpg --out cat-patches.png",
        MODEL_HELP + SAVED_HELP,
    )
    add = command.add_argument
    add("model", type=word, metavar="MODEL")
    add("image", type=path, metavar="IMAGE")
    add_limits(command)
    add(
        "--out",
        type=path,
        default=Path("patches.png"),
        metavar="FILE.png",
        help="where to save the picture (patches.png)",
    )
    add_weights(command)
    add_method(command)


def _add_completion(commands: Any) -> None:
    command = add_command(
        commands,
        "completion",
        "prints a script that completes commands, options and methods in your shell",
        'eval "$(patchslim completion bash)"    in ~/.bashrc',
    )
    command.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
