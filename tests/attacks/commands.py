"""Command lines with hostile words: every command and option, found from the parser.

A command ends with an exit code of its own and at most one `error:` line, shows no control
character, no traceback and no page of text, asks nothing, and leaves nothing half written.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import os
import pkgutil
import sys
from argparse import Action
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import patchslim
from attacks.attack import Attack, Lost, SilentlyWrong
from patchslim.cli.main import main
from patchslim.cli.parser import make_parser
from patchslim.hosts._catalog import family_facts, find_host
from patchslim.methods._registry import find_method, method_names
from patchslim.model.check import check_identity

CODES = (0, 1, 2, 130)
LONGEST_ERROR = 6000  # bytes on stderr
LONGEST_ANSWER = 300_000  # bytes on stdout: `models` lists all names
# For each command the words that make it short where all is well. `absent` is a folder of images
# that is not there, so that a training or a calibration ends before it begins.
BASE: dict[str, tuple[str, ...]] = {
    "demo": ("--out", "file/demo"),
    "slim": ("digits", "--macs", "0.6"),
    "calibrate": ("digits", "--macs", "0.9", "--data", "absent", "--out", "run"),
    "train": ("digits", "--macs", "0.6", "--data", "absent", "--out", "run"),
    "export": ("digits", "--macs", "0.6", "--data", "absent", "--out", "model.pt2"),
    "benchmark": ("model.onnx", "--rounds", "1", "--out", "times.json"),
    "bench": ("digits", "--data", "absent", "--budgets", "0.5", "--out", "run"),
    "plan": ("digits", "--macs", "0.6", "--data", "absent", "--out", "planned"),
    "measure": ("digits", "--macs", "0.6", "--limit", "2", "--batch", "2", "--repeats", "0"),
    "macs": ("digits", "--macs", "0.6"),
    "methods": (),
    "models": ("vit_tiny",),
    "show": ("digits", "image.png", "--macs", "0.6", "--out", "patches.png"),
    "completion": ("bash",),
}
DIGITS = "9" * 400
WORDS = {
    "nothing": "",
    "space": " ",
    "zero": "0",
    "minus one": "-1",
    "fraction": "0.5",
    "400 digits": DIGITS,
    "minus 400 digits": "-" + DIGITS,
    "5000 digits": "9" * 5000,
    "1e400": "1e400",
    "1e9": "1e9",
    "nan": "nan",
    "inf": "inf",
    "minus inf": "-inf",
    "hexadecimal": "0x10",
    "underscore": "1_0",
    "Arabic digits": "\u0663",
    "superscript": "\u00b2",
    "commas": ",,,",
    "list": "1,2,x",
    "huge list": "3," + DIGITS,
    "descending list": "9,6,3",
    "pair": "3:nan",
    "forged error": "a\nerror: forged\x1b[2J\r\x07",
    "escape": "\x1b]0;title\x07\x1b[31m",
    "right to left": "\u202etxt.exe",
    "surrogate": "\udcff",
    "not ascii": "\u00fcber-\U0001f600",
    "long": "x" * 100_000,
    "long path": "/".join("n" * 200 for _ in range(100)),
    "equals": "=",
    "setting": "num_classes=-1",
    "dashes": "--",
    "option": "--no-such-option",
    "format": "%s%d{0}",
    "root": "/",
    "dot": ".",
    "proc": "/proc/nothing/x",
    "dev null": "/dev/null",
    "home of nobody": "~nobody-at-all/x",
    "under a file": "file/x",
    "file": "file",
    "full folder": "full",
    "deep json": "deep.json",
    "folder with deep json": "deep",
}
NUMBERS = (
    "nothing,minus one,fraction,400 digits,minus 400 digits,5000 digits,1e400,nan,inf,minus inf,"
    "hexadecimal,underscore,Arabic digits,superscript,forged error,surrogate,long"
).split(",")
SHORT = (
    "nothing,minus one,400 digits,1e400,nan,forged error,surrogate,long,not ascii,equals,root,"
    "home of nobody,under a file,deep json,folder with deep json,dev null"
).split(",")
SETTINGS = (
    "num_classes=-1 num_classes=0 num_heads=0 num_heads=-1 num_heads=7 depth=0 depth=-1 depth=1e9 "
    f"embed_dim=0 embed_dim=-16 embed_dim={DIGITS} patch_size=0 patch_size=-4 patch_size=17 "
    "img_size=0 img_size=-1 img_size=nan mlp_ratio=-1 mlp_ratio=0 mlp_ratio=inf drop_rate=2 "
    "drop_rate=-1 drop_path_rate=5 global_pool=no norm_layer=no act_layer=os.system in_chans=0 "
    "in_chans=-3 num_classes=1e3 num_classes=None num_classes=True num_classes='a' class_token=7 "
    "reg_tokens=-1 qkv_bias=no init_values=nan no_such=1 =1 a pretrained=True checkpoint_path=file "
    "pretrained_cfg={} weights=file device=cuda dtype=int8 img_size=(1,2,3) img_size=[] "
    "num_classes=10**9 block_fn=1 scriptable=True exportable=True"
).split()


def attacks() -> Iterator[Attack]:
    """All of them."""
    import_everything()
    for lines, every in SHARES.items():
        for name, words in itertools.islice(lines(), 0, None, every):
            run = functools.partial(check_command, tuple(words))
            yield Attack(f"{lines.__name__}: {name}", run)


def import_everything() -> None:
    """Imports what commands import, so that no process has to that is forked for an attack."""
    for module in pkgutil.walk_packages(patchslim.__path__, "patchslim."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("tqdm", "PIL.Image", "PIL.PngImagePlugin", "shtab", "datasets"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    family_facts()
    check_identity(patchslim.slim(find_host("digits"), "tome", r=1))


Line = tuple[str, list[str]]


def every_action() -> Iterator[tuple[str, Action]]:
    """Each argument of each command."""
    for command, parser in make_parser().commands.items():
        for action in parser._actions:
            if action.dest != "help":
                yield command, action


def options() -> Iterator[Line]:
    """Every option that takes a word, with hostile words."""
    for command, action in every_action():
        if not action.option_strings or action.nargs == 0:
            continue
        option = action.option_strings[0]
        is_number = action.metavar in ("N", "X")
        labels = NUMBERS if is_number else SHORT
        for label in labels:
            if command == "demo" and option == "--out" and label != "nothing":
                continue  # the others are in `places`
            base = drop(BASE[command], option)
            yield f"{command} {option}={label}", [command, *base, f"{option}={WORDS[label]}"]
        yield f"{command} {option} without a word", [command, *BASE[command], option]


def drop(words: tuple[str, ...], option: str) -> list[str]:
    """The words without an option and its value, and without another budget beside a new one."""
    budgets = ("--macs", "--keep", "--r", "--keep-rate", "--tolerance", "--agreement", "--schedule")
    dropped = budgets if option in budgets else (option,)
    kept, skipped = [], False
    for word in words:
        if skipped:
            skipped = False
        elif word in dropped:
            skipped = True
        else:
            kept.append(word)
    return kept


def arguments() -> Iterator[Line]:
    """Every argument without a name: models, images, shells, filters."""
    for command, words in BASE.items():
        for place, usual in enumerate(words):
            if usual.startswith("-") or (place and words[place - 1].startswith("--")):
                continue
            for label, word in WORDS.items():
                if command == "models" and label in ("nothing", "zero"):
                    continue  # these list names, which is right
                yield (
                    f"{command} argument {place}={label}",
                    [command, *words[:place], word, *words[place + 1 :]],
                )
    for label, word in WORDS.items():
        yield f"command={label}", [word]


def typos() -> Iterator[Line]:
    """Commands with nothing, twice the same, or an unknown word at the end."""
    yield "no words", []
    for command, words in BASE.items():
        yield f"{command} alone", [command] if command != "demo" else [command, "--scene"]
        for label in ("forged error", "surrogate", "long", "not ascii", "format", "option"):
            yield f"{command} and {label}", [command, *words, WORDS[label]]
            yield f"{command} and an option {label}", [command, *words, "--" + WORDS[label]]
        yield f"{command} twice", [command, *words, command, *words]


def method_settings() -> Iterator[Line]:
    """`--method` and `--set` of every method."""
    for method in method_names():
        for name, parameter in inspect.signature(find_method(method)).parameters.items():
            labels = NUMBERS if isinstance(parameter.default, int | float) else SHORT
            for label in labels:
                words = ["slim", "digits", "--keep-rate", "0.7", "--method", method]
                yield f"{method} {name}={label}", [*words, f"--set={name}={WORDS[label]}"]
        yield f"{method} calibrated", ["calibrate", *BASE["calibrate"], "--method", method]


def model_settings() -> Iterator[Line]:
    """`--model-kwargs`, one by one, and the names of models."""
    for setting in SETTINGS:
        words = ["slim", "vit_tiny_patch16_224", "--r", "2"]
        yield f"{setting[:40]}", [*words, f"--model-kwargs={setting}"]
    names = "vit_tiny timm:nothing torchvision:vit_b_16x transformers:x :x x: hf-hub:a/b hf_hub:a/b"
    for name in [*names.split(), "../..", "C:\\x", "https://localhost/x", "resnet18", "a/b/c"]:
        for command in ("slim", "macs", "measure", "train"):
            words = drop(BASE[command], "")
            yield f"{command} {name}", [command, name, *words[1:]]
    for size in ("1", "15", "17", "1000000000", DIGITS):
        words = ["macs", "vit_tiny_patch16_224", "--r", "2", "--image-size", size]
        yield f"image size {size[:12]}", words


def places() -> Iterator[Line]:
    """Where nothing can be written: said at once, before anything takes long."""
    labels = "root,dot,proc,dev null,home of nobody,under a file,file,full folder,long,long path"
    for command, words in BASE.items():
        written = {
            "slim": "--out",
            "measure": "--out --csv --html",
            "benchmark": "--out --csv",
            "show": "--out",
            "train": "--out",
        }
        options = {"demo": "--out", "calibrate": "--out"} | written
        for option in options.get(command, "").split():
            for label in [*labels.split(","), "nothing", "surrogate", "forged error"]:
                if (command, label) in (("demo", "surrogate"), ("demo", "forged error")):
                    continue  # a name as good as another, and the demo takes a minute
                base = [word if word != "absent" else "digits" for word in drop(words, option)]
                more = ["--steps=1000000"] if command == "train" else []
                more = ["--images=512"] if command == "calibrate" else more
                if command in ("train", "calibrate", "demo") and label in (
                    "dot",
                    "root",
                    "full folder",
                    "surrogate",
                    "forged error",
                ):
                    continue  # good places: a run may stand beside other files
                yield (
                    f"{command} {option} at {label}",
                    [command, *base, *more, option, WORDS[label]],
                )


def whole() -> Iterator[Line]:
    """Good command lines, small, whose answers must be right."""
    yield "help", ["--help"]
    yield "version", ["--version"]
    for command in BASE:
        yield f"{command} --help", [command, "--help"]
        if command not in ("demo", "train", "calibrate"):
            yield f"{command} as JSON", [command, *BASE[command], "--json"]
    for name in ("a\nerror: forged", "\x1b[31mred", "\u202eabc", "x" * 150):
        words = ["slim", *BASE["slim"], "--out", name]
        yield f"saved as {name[:20]!r}", words
        yield f"drawn as {name[:20]!r}", ["show", *BASE["show"][:-1], name + ".png"]
        yield f"saved as {name[:20]!r}, as JSON", [*words, "--json"]
    yield (
        "trained",
        "train digits --macs 0.6 --steps 1 --limit 8 --batch 4 --workers 0 --out run".split(),
    )
    yield "calibrated", "calibrate digits --macs .9 --method tome --images 4 --out run".split()
    yield "measured", "measure digits --macs .6 --limit 4 --out r.json --csv r.csv".split()


# What every command line must end in.


def check_command(words: tuple[str, ...], folder: Path) -> None:
    """Runs the command in this process, as a shell would, and judges what came out."""
    prepare(folder)
    before = sorted(path.name for path in folder.iterdir())
    code, out, err = run(list(words), folder)
    check_streams(code, out, err)
    if not code:
        check_success(words, out, err.decode())
    if words[-1:] != ("file",) or code:  # a report that is asked for there replaces the file
        check_files(folder, before, failed=bool(code))


def check_streams(code: int, out: bytes, err: bytes) -> None:
    """What came out can be read, is short, and is one answer or one error."""
    text = err.decode("utf-8", "strict")
    if code not in CODES:
        raise SilentlyWrong(f"exit code {code}")
    if "Traceback" in text or "Traceback" in out.decode("utf-8", "strict"):
        raise AssertionError(text[-2000:])
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    if len(errors) != (code not in (0, 130)):
        raise SilentlyWrong(f"exit code {code} with {len(errors)} errors:\n{text[:2000]}")
    for stream in (out, err):
        shown = {byte for byte in stream if byte < 32 or byte == 127} - {10}
        if shown:
            raise SilentlyWrong(f"control characters {shown}: {stream[:500]!r}")
        if "\u202e".encode() in stream:
            raise SilentlyWrong("text that runs from right to left")
    if (code and len(err) > LONGEST_ERROR) or len(out) > LONGEST_ANSWER:
        raise SilentlyWrong(f"{len(err)} bytes of errors, {len(out)} of answers")
    if code and out:
        raise SilentlyWrong(f"an answer beside an error: {out[:500]!r}")


def check_success(words: tuple[str, ...], out: bytes, err: str) -> None:
    """The answer of a command that ended well."""
    if "--json" in words:
        json.loads(out)
    elif not out:
        raise SilentlyWrong(f"no answer and no error: {err[:500]!r}")
    numbers = [word for word in words if not word.startswith(PATHS)]  # a file may be called nan
    nonsense = [word for word in numbers if word.partition("=")[2] in NEVER_GOOD]
    if nonsense:
        raise SilentlyWrong(f"{nonsense} is accepted")


PATHS = ("--out=", "--csv=", "--html=", "--classes=")
NEVER_GOOD = {DIGITS, "-" + DIGITS, "9" * 5000, "1e400", "nan", "inf", "-inf", "0x10", "\u00b2"}


def check_files(folder: Path, before: list[str], *, failed: bool) -> None:
    """What was there is there as it was; nothing half written and no empty file is new."""
    if (folder / "file").read_text() != "mine" or not (folder / "full" / "mine.txt").is_file():
        raise Lost("a file of the user's")
    half = [path for path in folder.rglob("*") if path.name.startswith(".")]
    empty = [path for path in folder.rglob("*") if path.is_file() and not path.stat().st_size]
    if half or empty:
        raise Lost(f"left behind: {[*half, *empty]}")
    fresh = sorted({path.name for path in folder.iterdir()} - {*before, "stdout", "stderr"})
    if failed and fresh:
        raise Lost(f"the command failed and left {fresh}")


def prepare(folder: Path) -> None:
    """The files that some of the words name."""
    from PIL import Image

    (folder / "file").write_text("mine")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    deep = "[" * 100_000 + "]" * 100_000
    (folder / "deep.json").write_text(deep)
    (folder / "deep").mkdir()
    for name in ("config.json", "recipe.json", "state.json", "dataset_info.json"):
        (folder / "deep" / name).write_text(deep)
    Image.new("RGB", (28, 28), (90, 120, 30)).save(folder / "image.png")


class Nobody:
    """Stands for stdin: whoever reads it asks, and a command may not ask."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"stdin.{name} is used")


def run(words: list[str], folder: Path) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr of a command."""
    files = [folder / "stdout", folder / "stderr"]
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = Nobody()  # type: ignore[assignment]
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", encoding="utf-8", closefd=False, errors="strict")
        for number in (1, 2)
    )
    try:
        code = main(words)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    out, err = (file.read_bytes() for file in files)
    for file in files:
        file.unlink()
    return code, out, err


# Of some 3,500 lines every so-manieth is tried, so that every option meets some of the words.
SHARES: dict[Callable[[], Iterator[Line]], int] = {
    options: 5,
    arguments: 3,
    typos: 2,
    method_settings: 5,
    model_settings: 1,
    places: 1,
    whole: 1,
}
